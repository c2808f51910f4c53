#include "torch/slot_rows.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <sstream>
#include <tuple>

#include "base/error.h"

namespace elastikv::torch {
namespace {

void require_fit(const at::Tensor& window, const at::Tensor& states, std::int64_t rows, std::int64_t pitch,
                 std::int64_t before) {
    const bool ranks = window.dim() == 3 && states.dim() == 4;
    const bool fits = ranks && before >= 0 && pitch >= 1 && states.size(2) <= pitch - before &&
                      states.size(0) == rows && rows <= window.size(0) / pitch && states.size(1) == window.size(1) &&
                      states.size(3) == window.size(2);
    if (!fits || states.scalar_type() != window.scalar_type() || states.device() != window.device()) {
        std::ostringstream text;
        text << "states " << states.sizes() << " of " << states.dtype() << " on " << states.device()
             << " do not fit behind " << before << " tokens of " << rows << " rows of " << pitch << " in a window "
             << window.sizes() << " of " << window.dtype() << " on " << window.device();
        throw InvalidArgument(text.str());
    }
    if (at::GradMode::is_enabled() && states.requires_grad()) {
        throw InvalidArgument("ElasticCache is written in place: run the model under torch.inference_mode()");
    }
}

at::Tensor store(const at::Tensor& window, const at::Tensor& states, std::int64_t pitch, std::int64_t before) {
    const std::int64_t tokens = states.size(2), token = window.stride(0);
    const auto part = [&](std::int64_t begin, std::int64_t count) {
        return window.as_strided({states.size(0), states.size(1), count, states.size(3)},
                                 {pitch * token, window.stride(1), token, 1}, window.storage_offset() + begin * token);
    };
    part(before, tokens).copy_(states);
    return part(0, before + tokens);
}

}  // namespace

std::pair<at::Tensor, at::Tensor> store_rows(const at::Tensor& key_window, const at::Tensor& value_window,
                                             const at::Tensor& keys, const at::Tensor& values, std::int64_t rows,
                                             std::int64_t pitch, std::int64_t before) {
    require_fit(key_window, keys, rows, pitch, before);
    require_fit(value_window, values, rows, pitch, before);
    at::Tensor held = store(key_window, keys, pitch, before);
    return {std::move(held), store(value_window, values, pitch, before)};
}

at::Tensor attend_even(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& query,
                       const at::Tensor& keys, const at::Tensor& values, std::int64_t rows, std::int64_t pitch,
                       std::int64_t before, std::optional<std::int64_t> window, std::optional<double> scale) {
    auto [all_keys, all_values] = store_rows(key_window, value_window, keys, values, rows, pitch, before);
    if (const std::int64_t held = all_keys.size(2); window && *window < held) {
        all_keys = all_keys.narrow(2, held - *window, *window);
        all_values = all_values.narrow(2, held - *window, *window);
    }
    const bool grouped = query.dim() == 4 && query.size(1) != all_keys.size(1);
    const at::Tensor output =
        query.is_cpu() ? at::scaled_dot_product_attention(query, all_keys, all_values, {}, 0.0, false, scale, grouped)
                       : std::get<0>(at::_scaled_dot_product_flash_attention(query, all_keys, all_values, 0.0, false,
                                                                             false, scale));
    return output.transpose(1, 2);
}

}  // namespace elastikv::torch
