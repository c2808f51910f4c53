// Attention of one query a row over rows of a window, whose lengths only the device need know. Beside torch's flash
// kernels it reads memory faster, spares copies of queries and results, and cuts rows by their true lengths.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace elastikv::torch {

// Why fused_attend can't serve `group` query heads a KV head of `dim` elements there, or empty: it serves bfloat16 and
// float16 on CUDA of compute capability 8.0 and later, heads of 64 and 128 elements, up to eight of them a KV head.
// Compiles the kernels, unless that was done. Thread safe.
std::string why_no_decode_attention(const at::Device& device, at::ScalarType dtype, std::int64_t dim,
                                    std::int64_t group);

// Its machine code for compute capability major.minor, to look at: it takes NVRTC and no GPU. Throws InvalidArgument,
// DeviceUnavailable.
std::string compiled_decode_attention(at::ScalarType dtype, std::int64_t dim, std::int64_t group, int major, int minor);

// softmax(scale * query keys) values, [row, query head, dim] like the query: row i sees lengths[i] tokens of the
// windows [token, KV head, dim] from starts[i] on, both int32 and on the device. `longest` is an upper bound of the
// lengths, by which the work is cut into parts; without a scale it is 1 / sqrt(dim). Nothing beyond the lengths is
// read. A row of length 0 gets what is no number.
//
// Enqueued on the current stream; a graph may capture it once it ran for these heads. Thread safe. Throws
// InvalidArgument for what does not fit, DeviceUnavailable where there are no such kernels.
at::Tensor fused_attend(const at::Tensor& query, const at::Tensor& key_window, const at::Tensor& value_window,
                        const at::Tensor& starts, const at::Tensor& lengths, std::int64_t longest,
                        std::optional<double> scale);

}  // namespace elastikv::torch
