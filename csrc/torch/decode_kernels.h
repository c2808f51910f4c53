// What a decode step does around its matrices and its attention, in one kernel each: norms, rotary embeddings, storing
// keys and values, gates, the likeliest token. In steps of a millisecond the number of kernels is what one waits for.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>

namespace elastikv::torch {

// For bfloat16 and float16 on CUDA, of compute capability 8.0 and later. They are compiled on the machine they run on,
// at their first use for a device and dtype; a graph may capture them from then on. All are enqueued on the current
// stream and round where transformers' models do. Thread safe. Throw InvalidArgument for shapes, dtypes and devices
// that do not fit, DeviceUnavailable where there are no such kernels.

// Compiles them for a device and dtype, unless that was done. Why they can't be used there; empty if they can.
std::string why_no_decode_kernels(const at::Device& device, at::ScalarType dtype);

// Their machine code for compute capability major.minor, to look at: it takes NVRTC and no GPU. dtype: as above.
std::string compiled_decode_kernels(at::ScalarType dtype, int major, int minor);

// weight * states / sqrt(mean(states^2) + eps), over the last dimension, of a multiple of eight elements.
at::Tensor fused_rms_norm(const at::Tensor& states, const at::Tensor& weight, double eps);

// Queries and keys [row, head, 1, dim] turned by cosines and sines [row or 1, 1, dim], as transformers' rotary
// embeddings do: the halves of a head make the pairs.
std::pair<at::Tensor, at::Tensor> fused_rotate(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& cosines, const at::Tensor& sines);

// Keys and values [row, head, dim] to places[row], int64, of windows [token, head, dim].
void fused_store(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& places,
                 const at::Tensor& keys, const at::Tensor& values);

// Keys and values [row, head, 1, dim] of rows that hold `before` tokens each to those windows, row by row a `pitch`
// apart. False, and nothing has happened, where these kernels don't serve them. Shapes are the caller's to check.
bool try_fused_store_even(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& keys,
                          const at::Tensor& values, std::int64_t pitch, std::int64_t before);

// silu(gates) * factors, of a multiple of eight elements in the last dimension.
at::Tensor fused_gate(const at::Tensor& gates, const at::Tensor& factors);

// Cosines and sines [row, token, 2 * half] of rotary embeddings at positions [row, token], int64: of a position times
// frequencies [half], float32, computed in float32, times `scaling`. The second half of a head is like the first.
std::pair<at::Tensor, at::Tensor> fused_angles(const at::Tensor& positions, const at::Tensor& frequencies,
                                               double scaling, at::ScalarType dtype);

// As torch.argmax of each row: int64 [row] of logits [row, vocabulary], a multiple of eight elements. The first of
// equals; what is no number is above all.
at::Tensor fused_argmax(const at::Tensor& logits);

}  // namespace elastikv::torch
