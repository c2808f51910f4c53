#include "torch/step_kernels.h"

#include "base/error.h"

#if ELASTIKV_TORCH_CUDA
#include <ATen/ops/empty.h>

#include <algorithm>

#include "torch/kernel_call.h"
#include "torch/step_kernels_source.h"
#endif

namespace elastikv::torch {

#if ELASTIKV_TORCH_CUDA

namespace {

constexpr std::int64_t threads = 128;

DeviceProgram& program() {
    static auto* const made = new DeviceProgram(step_kernels_source, {});  // leaked: the modules are the process's
    return *made;
}

bool is(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes, const at::Device& device) {
    return tensor.scalar_type() == dtype && tensor.sizes() == sizes && tensor.is_contiguous() &&
           tensor.device() == device;
}

}  // namespace

std::string why_no_step_kernels(const at::Device& device) {
    if (!device.is_cuda()) return "they run on CUDA, not on " + device.str();
    return why_not(device, program());
}

std::string compiled_step_kernels(int major, int minor) { return program().compile(major, minor); }

StepPlan fused_plan(const at::Tensor& all_lengths, const at::Tensor& slots, const at::Tensor& starts) {
    const at::Device device = slots.device();
    const std::int64_t rows = slots.numel();
    if (!device.is_cuda() || !is(slots, at::kLong, {rows}, device) || !is(starts, at::kLong, {rows}, device) ||
        !is(all_lengths, at::kInt, {all_lengths.numel()}, device)) {
        refuse("lengths, slots and starts do not fit", {&all_lengths, &slots, &starts});
    }
    const auto wide = slots.options(), narrow = slots.options().dtype(at::kInt);
    StepPlan made{at::empty({rows}, narrow), at::empty({rows, 1}, wide), at::empty({rows}, wide),
                  at::empty({rows + 1}, narrow), at::empty({rows}, narrow)};
    KernelCall(slots, program())
        .launch("plan", (rows + threads - 1) / threads, 1, threads, read(all_lengths), read(slots), read(starts),
                made.positions.mutable_data_ptr(), made.places.mutable_data_ptr(), made.lengths.mutable_data_ptr(),
                made.starts.mutable_data_ptr(), made.seen.mutable_data_ptr(), static_cast<int>(rows));
    return made;
}

void fused_take(const at::Tensor& chosen, const Answers& answers, const std::optional<Stored>& stored) {
    const at::Device device = chosen.device();
    const std::int64_t rows = chosen.numel(), capacity = answers.history.numel() / std::max<std::int64_t>(rows, 1);
    const auto wide = [&](const at::Tensor& tensor, at::IntArrayRef sizes) {
        return is(tensor, at::kLong, sizes, device);
    };
    bool fits = device.is_cuda() && chosen.dim() == 1;
    fits = fits && wide(answers.tokens, {rows, 1}) && wide(answers.count, {rows}) && wide(answers.limits, {rows}) &&
           wide(answers.history, {rows, capacity}) && capacity > 0 && wide(answers.pad, {}) &&
           wide(answers.stops, {answers.stops.numel()}) && is(answers.ended, at::kBool, {rows}, device) &&
           is(answers.ended_here, at::kBool, {rows}, at::kCPU) && answers.ended_here.is_pinned();
    if (fits && stored) {
        fits = wide(stored->slots, {rows}) && is(stored->lengths, at::kInt, {rows}, device) &&
               is(stored->all_lengths, at::kInt, {stored->all_lengths.numel()}, device);
    }
    if (!fits) {
        refuse("chosen tokens and what is kept of rows do not fit",
               {&chosen, &answers.tokens, &answers.count, &answers.history, &answers.ended, &answers.ended_here,
                &answers.limits, &answers.stops, &answers.pad});
    }
    const at::Tensor tokens = chosen.to(at::kLong).contiguous();
    KernelCall(chosen, program())
        .launch("take", (rows + threads - 1) / threads, 1, threads, read(tokens), answers.tokens.mutable_data_ptr(),
                answers.count.mutable_data_ptr(), answers.history.mutable_data_ptr(), answers.ended.mutable_data_ptr(),
                answers.ended_here.mutable_data_ptr(), read(answers.limits), read(answers.stops), read(answers.pad),
                static_cast<int>(answers.stops.numel()), capacity,
                stored ? stored->all_lengths.mutable_data_ptr() : nullptr, stored ? read(stored->slots) : nullptr,
                stored ? read(stored->lengths) : nullptr, static_cast<int>(rows));
}

#else

std::string why_no_step_kernels(const at::Device&) { return "built without CUDA"; }

std::string compiled_step_kernels(int, int) { throw DeviceUnavailable("built without CUDA"); }

StepPlan fused_plan(const at::Tensor&, const at::Tensor&, const at::Tensor&) {
    throw DeviceUnavailable("built without CUDA");
}

void fused_take(const at::Tensor&, const Answers&, const std::optional<Stored>&) {
    throw DeviceUnavailable("built without CUDA");
}

#endif

}  // namespace elastikv::torch
