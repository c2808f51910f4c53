#include "torch/slot_rows.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <tuple>

#include "base/error.h"
#include "torch/decode_kernels.h"

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

// One token of each row with one launch instead of two, in dtypes that no kernel of ours has: a place of keys and the
// place of its values are seen as two steps of one dimension, and the states are concatenated into it. Rows that lie
// further apart than 32-bit offsets reach take a launch for each part of them that does not: a copy would halve its
// work until offsets fit, in bytes, for keys and for values. False where the states don't lie so.
bool store_token(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& keys,
                 const at::Tensor& values, std::int64_t rows, std::int64_t pitch, std::int64_t before) {
    const std::int64_t apart = value_window.storage_offset() - key_window.storage_offset();
    const bool alike = key_window.storage().is_alias_of(value_window.storage()) &&
                       key_window.strides() == value_window.strides() && keys.sizes() == values.sizes();
    if (!alike || apart <= 0 || !keys.is_contiguous() || !values.is_contiguous()) return false;
    const std::int64_t token = key_window.stride(0), row = pitch * token;
    const std::int64_t at_once = 1 + (std::numeric_limits<std::int32_t>::max() - token) / row;
    for (std::int64_t first = 0; first < rows; first += at_once) {
        const std::int64_t count = std::min(at_once, rows - first);
        at::Tensor places =
            key_window.as_strided({count, keys.size(1), 2, keys.size(3)}, {row, key_window.stride(1), apart, 1},
                                  key_window.storage_offset() + first * row + before * token);
        if (count == rows) {
            at::cat_out(places, {keys, values}, 2);
        } else {
            at::cat_out(places, {keys.narrow(0, first, count), values.narrow(0, first, count)}, 2);
        }
    }
    return true;
}

void store(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& keys,
           const at::Tensor& values, std::int64_t rows, std::int64_t pitch, std::int64_t before) {
    require_fit(key_window, keys, rows, pitch, before);
    require_fit(value_window, values, rows, pitch, before);
    if (keys.size(2) == 1 && try_fused_store_even(key_window, value_window, keys, values, pitch, before)) return;
    if (keys.size(2) == 1 && store_token(key_window, value_window, keys, values, rows, pitch, before)) return;
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
