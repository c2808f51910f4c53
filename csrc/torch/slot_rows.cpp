#include "torch/slot_rows.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>
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

// Tokens of rows 0 to `rows` - 1, [row, head, token, dim].
at::Tensor tokens_of(const at::Tensor& window, std::int64_t rows, std::int64_t pitch, std::int64_t begin,
                     std::int64_t count) {
    const std::int64_t token = window.stride(0);
    return window.as_strided({rows, window.size(1), count, window.size(2)}, {pitch * token, window.stride(1), token, 1},
                             window.storage_offset() + begin * token);
}

// The same, [row, token, head, dim].
at::Tensor by_token(const at::Tensor& window, std::int64_t rows, std::int64_t pitch, std::int64_t begin,
                    std::int64_t count) {
    const std::int64_t token = window.stride(0);
    return window.as_strided({rows, count, window.size(1), window.size(2)}, {pitch * token, token, window.stride(1), 1},
                             window.storage_offset() + begin * token);
}

void store(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& keys,
           const at::Tensor& values, std::int64_t rows, std::int64_t pitch, std::int64_t before) {
    require_fit(key_window, keys, rows, pitch, before);
    require_fit(value_window, values, rows, pitch, before);
    tokens_of(key_window, rows, pitch, before, keys.size(2)).copy_(keys);
    tokens_of(value_window, rows, pitch, before, values.size(2)).copy_(values);
}

}  // namespace

std::pair<at::Tensor, at::Tensor> store_rows(const at::Tensor& key_window, const at::Tensor& value_window,
                                             const at::Tensor& keys, const at::Tensor& values, std::int64_t rows,
                                             std::int64_t pitch, std::int64_t before) {
    store(key_window, value_window, keys, values, rows, pitch, before);
    return {tokens_of(key_window, rows, pitch, 0, before + keys.size(2)),
            tokens_of(value_window, rows, pitch, 0, before + values.size(2))};
}

at::Tensor attend_even(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& query,
                       const at::Tensor& keys, const at::Tensor& values, std::int64_t rows, std::int64_t pitch,
                       std::int64_t before, std::optional<std::int64_t> window, std::optional<double> scale) {
    store(key_window, value_window, keys, values, rows, pitch, before);
    const std::int64_t held = before + keys.size(2);
    const std::int64_t seen = window ? std::min(*window, held) : held;
    if (query.is_cpu()) {
        const bool grouped = query.dim() == 4 && query.size(1) != key_window.size(1);
        return at::scaled_dot_product_attention(query, tokens_of(key_window, rows, pitch, held - seen, seen),
                                                tokens_of(value_window, rows, pitch, held - seen, seen), {}, 0.0, false,
                                                scale, grouped)
            .transpose(1, 2);
    }
    // The operator that SDPA's flash back end ends in, without the six views on the way there.
    return std::get<0>(at::_flash_attention_forward(
        query.transpose(1, 2), by_token(key_window, rows, pitch, held - seen, seen),
        by_token(value_window, rows, pitch, held - seen, seen), {}, {}, query.size(2), seen, 0.0, false, false, scale));
}

}  // namespace elastikv::torch
