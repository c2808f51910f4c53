#include "torch/decode_attention.h"

#include "base/error.h"

#if ELASTIKV_TORCH_CUDA
#include <ATen/ops/empty.h>

#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>

#include "torch/decode_attention_source.h"
#include "torch/decode_kernels_source.h"
#include "torch/kernel_call.h"
#endif

namespace elastikv::torch {

#if ELASTIKV_TORCH_CUDA

namespace {

constexpr std::int64_t threads = 128;
constexpr std::int64_t blocks_a_processor = 3;  // that registers are left for
constexpr std::int64_t most_splits = 64;        // whole warps
constexpr std::int64_t combining = 4;           // threads an element, which share its parts
// What a block costs beside its tokens, and putting parts together, in tokens that a block reads in that time (H200).
constexpr std::int64_t block_cost = 48;
constexpr std::int64_t combine_cost = 64;

bool serves(std::int64_t dim, std::int64_t group) { return (dim == 64 || dim == 128) && group >= 1 && group <= 8; }

DeviceProgram& program_of(at::ScalarType dtype, std::int64_t dim, std::int64_t group) {
    // Leaked: the modules are the process's.
    static auto* const mutex = new std::mutex();
    static auto* const made = new std::map<std::array<std::int64_t, 3>, std::unique_ptr<DeviceProgram>>();
    const std::lock_guard lock(*mutex);
    std::unique_ptr<DeviceProgram>& program = (*made)[{dtype == at::kHalf, dim, group}];
    if (program == nullptr) {
        std::vector<std::string> options{"-DDIM=" + std::to_string(dim), "-DGROUP=" + std::to_string(group),
                                         "-DMOST_SPLITS=" + std::to_string(most_splits),
                                         "-DCOMBINING=" + std::to_string(combining)};
        if (dtype == at::kHalf) options.emplace_back("-DELEMENT_FLOAT16");
        program = std::make_unique<DeviceProgram>(std::string(element_source) + decode_attention_source, options);
    }
    return *program;
}

// Parts that a row is cut into: those with which the blocks, as many at once as the device has room for, are done
// first.
std::int64_t splits_for(std::int64_t blocks, std::int64_t longest, const at::Device& device) {
    int processors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device.index()));
    const std::int64_t at_once = processors * blocks_a_processor;
    const auto cost = [&](std::int64_t splits) {
        const std::int64_t turns = (blocks * splits + at_once - 1) / at_once;
        return turns * (longest / splits + block_cost) + (splits > 1 ? combine_cost : 0);
    };
    std::int64_t best = 1;
    for (std::int64_t splits = 2; splits <= most_splits; ++splits) {
        if (cost(splits) < cost(best)) best = splits;
    }
    return best;
}

}  // namespace

std::string why_no_decode_attention(const at::Device& device, at::ScalarType dtype, std::int64_t dim,
                                    std::int64_t group) {
    if (!device.is_cuda()) return "it runs on CUDA, not on " + device.str();
    if (dtype != at::kHalf && dtype != at::kBFloat16) return "it computes in float16 and bfloat16";
    if (!serves(dim, group)) {
        return std::to_string(group) + " heads of " + std::to_string(dim) + " elements a KV head are not served";
    }
    return why_not(device, program_of(dtype, dim, group));
}

std::string compiled_decode_attention(at::ScalarType dtype, std::int64_t dim, std::int64_t group, int major,
                                      int minor) {
    if (!serves(dim, group)) throw InvalidArgument("no kernels for these heads: " + std::to_string(dim));
    return program_of(dtype, dim, group).compile(major, minor);
}

at::Tensor fused_attend(const at::Tensor& query, const at::Tensor& key_window, const at::Tensor& value_window,
                        const at::Tensor& starts, const at::Tensor& lengths, std::int64_t longest,
                        std::optional<double> scale) {
    const auto is_window = [&](const at::Tensor& window) {
        return window.dim() == 3 && window.stride(2) == 1 && window.stride(0) % 8 == 0 && window.stride(1) % 8 == 0 &&
               by_sixteen(window);
    };
    const auto counts = [&](const at::Tensor& numbers) {
        return numbers.dim() == 1 && numbers.scalar_type() == at::kInt && numbers.is_contiguous() &&
               numbers.size(0) >= query.size(0) && numbers.device() == query.device();
    };
    bool fits = query.dim() == 3 && is_window(key_window) && is_window(value_window) && counts(starts);
    fits = fits && counts(lengths) && key_window.sizes() == value_window.sizes() && key_window.size(1) > 0;
    fits = fits && query.size(2) == key_window.size(2) && query.size(1) % key_window.size(1) == 0 && longest >= 0;
    const std::int64_t kv_heads = fits ? key_window.size(1) : 1, dim = fits ? query.size(2) : 0;
    const std::int64_t group = fits ? query.size(1) / kv_heads : 0;
    if (!fits || !serves(dim, group) || !alike({&query, &key_window, &value_window})) {
        refuse("query, windows, starts and lengths do not fit",
               {&query, &key_window, &value_window, &starts, &lengths});
    }
    require_no_gradient({&query});
    const bool by_eights =
        query.stride(2) == 1 && query.stride(0) % 8 == 0 && query.stride(1) % 8 == 0 && by_sixteen(query);
    const at::Tensor from = by_eights ? query : query.clone(at::MemoryFormat::Contiguous);
    const std::int64_t blocks = query.size(0) * kv_heads, heads = query.size(0) * query.size(1);
    const std::int64_t splits = splits_for(blocks, longest, query.device());
    at::Tensor out = at::empty(query.sizes(), query.options());
    const auto floats = query.options().dtype(at::kFloat);
    const std::int64_t parts = splits > 1 ? heads * splits : 0;
    at::Tensor sums = at::empty({parts, dim}, floats), bounds = at::empty({parts, 2}, floats);
    constexpr double log2_of_e = 1.4426950408889634;
    const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(dim))) * log2_of_e;
    KernelCall call(query, program_of(query.scalar_type(), dim, group));
    call.launch("attend", blocks, splits, threads, read(from), read(key_window), read(value_window), read(starts),
                read(lengths), sums.mutable_data_ptr(), bounds.mutable_data_ptr(), out.mutable_data_ptr(),
                static_cast<int>(kv_heads), static_cast<float>(factor), from.stride(0), from.stride(1),
                key_window.stride(0), key_window.stride(1), value_window.stride(0), value_window.stride(1));
    if (splits > 1) {
        call.launch("combine", heads, 1, combining * dim, read(sums), read(bounds), out.mutable_data_ptr(),
                    static_cast<int>(splits));
    }
    return out;
}

#else

std::string why_no_decode_attention(const at::Device&, at::ScalarType, std::int64_t, std::int64_t) {
    return "built without CUDA";
}

std::string compiled_decode_attention(at::ScalarType, std::int64_t, std::int64_t, int, int) {
    throw DeviceUnavailable("built without CUDA");
}

at::Tensor fused_attend(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        std::int64_t, std::optional<double>) {
    throw DeviceUnavailable("built without CUDA");
}

#endif

}  // namespace elastikv::torch
