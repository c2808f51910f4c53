// One pass's keys and values into rows that all hold as many tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

namespace elastikv::torch {

// Stores `keys` and `values`, [row, head, token, dim], behind the first `before` tokens of rows 0 to `rows` - 1 of two
// windows [row * pitch + token, head, dim]. Returns views [row, head, token, dim] of all tokens of these rows, old and
// new. In one call, checks included, because a decode step makes it once a layer, and Python's share of eager decoding
// is what one waits for.
//
// The rows must have memory for them. Enqueued on the current stream. Throws InvalidArgument for what does not fit, in
// shape, dtype or device, and for what wants a gradient; nothing is stored then.
std::pair<at::Tensor, at::Tensor> store_rows(const at::Tensor& key_window, const at::Tensor& value_window,
                                             const at::Tensor& keys, const at::Tensor& values, std::int64_t rows,
                                             std::int64_t pitch, std::int64_t before);

}  // namespace elastikv::torch
