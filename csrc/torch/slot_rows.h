// One pass over rows that all hold as many tokens: its keys and values go in, its queries see what is there then.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace elastikv::torch {

// Stores `keys` and `values`, [row, head, token, dim], behind the first `before` tokens of rows 0 to `rows` - 1 of two
// windows [row * pitch + token, head, dim]. Returns views [row, head, token, dim] of all tokens of these rows, old and
// new.
//
// The rows must have memory for them. Enqueued on the current stream. Throws InvalidArgument for what does not fit, in
// shape, dtype or device, and for what wants a gradient; nothing is stored then.
std::pair<at::Tensor, at::Tensor> store_rows(const at::Tensor& key_window, const at::Tensor& value_window,
                                             const at::Tensor& keys, const at::Tensor& values, std::int64_t rows,
                                             std::int64_t pitch, std::int64_t before);

// As store_rows, and then attention [row, 1, query head, dim] of one query a row, [row, query head, 1, dim], on the
// last `window` tokens, or on all: by the flash kernels, or on the CPU by whatever torch has. In one call, because a
// decode step makes it once a layer, and Python's share of eager decoding is what one waits for.
at::Tensor attend_even(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& query,
                       const at::Tensor& keys, const at::Tensor& values, std::int64_t rows, std::int64_t pitch,
                       std::int64_t before, std::optional<std::int64_t> window, std::optional<double> scale);

}  // namespace elastikv::torch
