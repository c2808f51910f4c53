#include "torch/decode_kernels.h"

#include "base/error.h"

#if ELASTIKV_TORCH_CUDA
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include "torch/decode_kernels_source.h"
#include "torch/kernel_call.h"
#endif

namespace elastikv::torch {

#if ELASTIKV_TORCH_CUDA

namespace {

constexpr unsigned most_threads = 512;

DeviceProgram& program_of(at::ScalarType dtype) {
    // Leaked: the modules are the process's.
    static const std::string source = std::string(element_source) + decode_kernels_source;
    static auto* const half = new DeviceProgram(source, {"-DELEMENT_FLOAT16"});
    static auto* const brain = new DeviceProgram(source, {});
    return dtype == at::kHalf ? *half : *brain;
}

// [row, elements] such that rows can be read by eights.
at::Tensor by_eights(const at::Tensor& states) {
    at::Tensor rows = states.reshape({-1, states.size(-1)});
    const bool fits = rows.stride(1) == 1 && rows.stride(0) % 8 == 0 && by_sixteen(rows);
    return fits ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

std::int64_t threads_for(std::int64_t elements) {
    return std::clamp<std::int64_t>((elements + 31) / 32 * 32, 32, most_threads);
}

// Keys and values [row, head, dim]; without places row i's to i * pitch + number.
void launch_store(const at::Tensor& key_window, const at::Tensor& value_window, const std::int64_t* places,
                  std::int64_t pitch, std::int64_t number, const at::Tensor& keys, const at::Tensor& values) {
    const at::Tensor from[] = {dense(keys), dense(values)};
    const auto key_dim = static_cast<int>(keys.size(2)), value_dim = static_cast<int>(values.size(2));
    KernelCall(keys, program_of(keys.scalar_type()))
        .launch("store", keys.size(0), keys.size(1), threads_for(std::max(key_dim, value_dim)), read(key_window),
                read(value_window), places, pitch, number, read(from[0]), read(from[1]), key_dim, value_dim,
                key_window.stride(0), key_window.stride(1), value_window.stride(0), value_window.stride(1),
                from[0].stride(0), from[0].stride(1), from[1].stride(0), from[1].stride(1));
}

// Whether a tensor of a dtype that is served finds them on its device. Remembered where it does, as it is asked once a
// layer and step; a refusal may pass. A capture may load nothing: what ran before it decides.
bool there_are(const at::Tensor& like) {
    static std::array<std::array<std::atomic<bool>, 2>, C10_COMPILE_TIME_MAX_GPUS> known{};
    const bool half = like.scalar_type() == at::kHalf;
    std::atomic<bool>& answer = known[static_cast<std::size_t>(like.get_device())][half ? 1 : 0];
    if (!answer && c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
        answer = why_no_decode_kernels(like.device(), like.scalar_type()).empty();
    }
    return answer;
}

}  // namespace

std::string why_no_decode_kernels(const at::Device& device, at::ScalarType dtype) {
    if (!device.is_cuda()) return "they run on CUDA, not on " + device.str();
    if (dtype != at::kHalf && dtype != at::kBFloat16) return "they compute in float16 and bfloat16";
    return why_not(device, program_of(dtype));
}

std::string compiled_decode_kernels(at::ScalarType dtype, int major, int minor) {
    return program_of(dtype).compile(major, minor);
}

at::Tensor fused_rms_norm(const at::Tensor& states, const at::Tensor& weight, double eps) {
    const bool fits = states.dim() > 0 && weight.dim() == 1 && states.size(-1) == weight.size(0) &&
                      weight.size(0) % 8 == 0 && weight.size(0) > 0;
    if (!fits || !alike({&states, &weight})) refuse("states and weight of a norm do not fit", {&states, &weight});
    require_no_gradient({&states, &weight});
    const at::Tensor dense_states = states.contiguous();
    const at::Tensor rows = by_eights(dense_states), factors = by_eights(weight);
    at::Tensor out = at::empty_like(dense_states);
    const auto size = static_cast<int>(weight.size(0));
    KernelCall(states, program_of(states.scalar_type()))
        .launch("rms_norm", rows.size(0), 1, threads_for(size / 8), read(rows), read(factors), out.mutable_data_ptr(),
                size, static_cast<float>(eps));
    return out;
}

std::pair<at::Tensor, at::Tensor> fused_rotate(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& cosines, const at::Tensor& sines) {
    bool fits = query.dim() == 4 && key.dim() == 4 && cosines.dim() == 3 && sines.sizes() == cosines.sizes();
    fits = fits && query.size(0) == key.size(0) && query.size(2) == 1 && key.size(2) == 1 && cosines.size(1) == 1;
    fits = fits && (cosines.size(0) == query.size(0) || cosines.size(0) == 1) && query.size(3) == key.size(3);
    fits = fits && cosines.size(2) == query.size(3) && query.size(3) % 2 == 0;
    if (!fits || !alike({&query, &key, &cosines, &sines})) {
        refuse("queries, keys, cosines and sines do not fit", {&query, &key, &cosines, &sines});
    }
    require_no_gradient({&query, &key});
    const at::Tensor from[] = {dense(query), dense(key), dense(cosines), dense(sines)};
    const auto row_of = [](const at::Tensor& angles) {
        return angles.size(0) == 1 ? std::int64_t{0} : angles.stride(0);
    };
    at::Tensor turned = at::empty(query.sizes(), query.options()), turned_key = at::empty(key.sizes(), key.options());
    const auto heads = static_cast<int>(query.size(1)), key_heads = static_cast<int>(key.size(1));
    const auto dim = static_cast<int>(query.size(3));
    KernelCall(query, program_of(query.scalar_type()))
        .launch("rotate", query.size(0), heads + key_heads, threads_for(dim / 2), read(from[0]), read(from[1]),
                read(from[2]), read(from[3]), turned.mutable_data_ptr(), turned_key.mutable_data_ptr(), heads,
                key_heads, dim, from[0].stride(0), from[0].stride(1), from[1].stride(0), from[1].stride(1),
                row_of(from[2]), row_of(from[3]));
    return {turned, turned_key};
}

void fused_store(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& places,
                 const at::Tensor& keys, const at::Tensor& values) {
    const auto suits = [&](const at::Tensor& window, const at::Tensor& states) {
        return window.dim() == 3 && states.dim() == 3 && window.stride(2) == 1 && states.size(0) == places.size(0) &&
               states.size(1) == window.size(1) && states.size(2) == window.size(2);
    };
    const bool fits = places.dim() == 1 && places.scalar_type() == at::kLong && places.is_contiguous() &&
                      places.device() == keys.device() && suits(key_window, keys) && suits(value_window, values) &&
                      keys.size(1) == values.size(1);
    if (!fits || !alike({&key_window, &value_window, &keys, &values})) {
        refuse("windows, places, keys and values do not fit", {&key_window, &value_window, &places, &keys, &values});
    }
    require_no_gradient({&keys, &values});
    launch_store(key_window, value_window, static_cast<const std::int64_t*>(read(places)), 0, 0, keys, values);
}

bool try_fused_store_even(const at::Tensor& key_window, const at::Tensor& value_window, const at::Tensor& keys,
                          const at::Tensor& values, std::int64_t pitch, std::int64_t before) {
    const bool suits = key_window.stride(2) == 1 && value_window.stride(2) == 1;
    if (!suits || !alike({&key_window, &value_window, &keys, &values}) || !there_are(keys)) return false;
    launch_store(key_window, value_window, nullptr, pitch, before, keys.select(2, 0), values.select(2, 0));
    return true;
}

at::Tensor fused_gate(const at::Tensor& gates, const at::Tensor& factors) {
    const bool fits = gates.dim() > 0 && gates.sizes() == factors.sizes() && gates.size(-1) % 8 == 0;
    if (!fits || !alike({&gates, &factors})) refuse("gates and factors do not fit", {&gates, &factors});
    require_no_gradient({&gates, &factors});
    const at::Tensor left = by_eights(gates), right = by_eights(factors);
    at::Tensor out = at::empty(gates.sizes(), gates.options());
    const auto size = static_cast<int>(gates.size(-1));
    const std::int64_t threads = 256;
    KernelCall(gates, program_of(gates.scalar_type()))
        .launch("gate", left.size(0), (size / 8 + threads - 1) / threads, threads, read(left), read(right),
                out.mutable_data_ptr(), size, left.stride(0), right.stride(0));
    return out;
}

std::pair<at::Tensor, at::Tensor> fused_angles(const at::Tensor& positions, const at::Tensor& frequencies,
                                               double scaling, at::ScalarType dtype) {
    const bool fits = positions.dim() == 2 && positions.scalar_type() == at::kLong && positions.is_cuda() &&
                      frequencies.dim() == 1 && frequencies.scalar_type() == at::kFloat &&
                      frequencies.device() == positions.device() && (dtype == at::kHalf || dtype == at::kBFloat16);
    if (!fits) refuse("positions and frequencies do not fit", {&positions, &frequencies});
    require_no_gradient({&frequencies});
    const at::Tensor numbers = positions.contiguous(), factors = frequencies.contiguous();
    const std::int64_t half = factors.size(0);
    const auto options = positions.options().dtype(dtype);
    const std::int64_t shape[] = {positions.size(0), positions.size(1), 2 * half};
    at::Tensor cosines = at::empty(shape, options), sines = at::empty(shape, options);
    KernelCall(positions, program_of(dtype))
        .launch("angles", numbers.numel(), 1, threads_for(half), read(numbers), read(factors),
                cosines.mutable_data_ptr(), sines.mutable_data_ptr(), static_cast<int>(half),
                static_cast<float>(scaling));
    return {cosines, sines};
}

at::Tensor fused_argmax(const at::Tensor& logits) {
    const bool fits = logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) % 8 == 0 && alike({&logits});
    if (!fits) refuse("logits do not fit", {&logits});
    const at::Tensor rows = by_eights(logits);
    at::Tensor out = at::empty({rows.size(0)}, logits.options().dtype(at::kLong));
    const auto size = static_cast<int>(rows.size(1));
    const std::int64_t threads = std::clamp<std::int64_t>((size / 8 + 31) / 32 * 32, 32, 1024);
    KernelCall(logits, program_of(logits.scalar_type()))
        .launch("likeliest", rows.size(0), 1, threads, read(rows), out.mutable_data_ptr(), size, rows.stride(0));
    return out;
}

#else

std::string why_no_decode_kernels(const at::Device&, at::ScalarType) { return "built without CUDA"; }

std::string compiled_decode_kernels(at::ScalarType, int, int) { throw DeviceUnavailable("built without CUDA"); }

at::Tensor fused_rms_norm(const at::Tensor&, const at::Tensor&, double) {
    throw DeviceUnavailable("built without CUDA");
}

std::pair<at::Tensor, at::Tensor> fused_rotate(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                               const at::Tensor&) {
    throw DeviceUnavailable("built without CUDA");
}

void fused_store(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&) {
    throw DeviceUnavailable("built without CUDA");
}

bool try_fused_store_even(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, std::int64_t,
                          std::int64_t) {
    return false;
}

at::Tensor fused_gate(const at::Tensor&, const at::Tensor&) { throw DeviceUnavailable("built without CUDA"); }

std::pair<at::Tensor, at::Tensor> fused_angles(const at::Tensor&, const at::Tensor&, double, at::ScalarType) {
    throw DeviceUnavailable("built without CUDA");
}

at::Tensor fused_argmax(const at::Tensor&) { throw DeviceUnavailable("built without CUDA"); }

#endif

}  // namespace elastikv::torch
