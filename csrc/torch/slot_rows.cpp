#include "torch/slot_rows.h"

#include <sstream>

#include "base/error.h"

namespace elastikv::torch {
namespace {

at::Tensor store(const at::Tensor& window, const at::Tensor& states, std::int64_t pitch, std::int64_t before) {
    const bool ranks = window.dim() == 3 && states.dim() == 4;
    const std::int64_t tokens = ranks ? states.size(2) : 0;
    const bool fits = ranks && before >= 0 && pitch >= 1 && tokens <= pitch - before &&
                      states.size(0) <= window.size(0) / pitch && states.size(1) == window.size(1) &&
                      states.size(3) == window.size(2);
    if (!fits) {
        std::ostringstream text;
        text << "states " << states.sizes() << " do not fit behind " << before << " tokens of rows of " << pitch
             << " in a window " << window.sizes();
        throw InvalidArgument(text.str());
    }
    const at::Tensor held = window.as_strided({states.size(0), before + tokens, states.size(1), states.size(3)},
                                              {pitch * window.stride(0), window.stride(0), window.stride(1), 1});
    held.narrow(1, before, tokens).copy_(states.transpose(1, 2));
    return held;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> store_rows(const at::Tensor& key_window, const at::Tensor& value_window,
                                             const at::Tensor& keys, const at::Tensor& values, std::int64_t pitch,
                                             std::int64_t before) {
    at::Tensor held = store(key_window, keys, pitch, before);
    return {std::move(held), store(value_window, values, pitch, before)};
}

}  // namespace elastikv::torch
