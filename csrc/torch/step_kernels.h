// What a decode step does before and after the model, in one kernel each: where each row's token goes and what it sees,
// and what becomes of the tokens that were chosen.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace elastikv::torch {

// On CUDA. Compiled on the machine they run on, at their first use for a device; a graph may capture them from then on.
// Enqueued on the current stream. Thread safe. Throw InvalidArgument for shapes, dtypes and devices that do not fit,
// DeviceUnavailable where there are no such kernels.

// Compiles them for a device, unless that was done. Why they can't be used there; empty if they can.
std::string why_no_step_kernels(const at::Device& device);

// Their machine code for compute capability major.minor, to look at: it takes NVRTC and no GPU.
std::string compiled_step_kernels(int major, int minor);

struct StepPlan {
    at::Tensor lengths;    // int32 [row]: tokens of the row before this one
    at::Tensor positions;  // int64 [row, 1]: of this one
    at::Tensor places;     // int64 [row]: where in the windows it goes
    at::Tensor starts;     // int32 [row + 1]: where what it sees begins; one more, as flash ops want it
    at::Tensor seen;       // int32 [row]: how many tokens it sees, itself among them
};

// For one token in each of these slots, int64 [row], whose tokens begin at starts, int64 [row]. all_lengths: int32, by
// slot.
StepPlan fused_plan(const at::Tensor& all_lengths, const at::Tensor& slots, const at::Tensor& starts);

// What a decoder keeps of its rows on the device. All int64 but `ended`; contiguous.
struct Answers {
    at::Tensor tokens;      // [row, 1]: what the next step takes in
    at::Tensor count;       // [row]: new tokens so far
    at::Tensor history;     // [row, capacity]: those
    at::Tensor ended;       // bool [row]
    at::Tensor ended_here;  // bool [row], in pinned memory, which the kernel writes to: a copy for the host
    at::Tensor limits;      // [row]: a row ends with so many new tokens
    at::Tensor stops;       // [any]: a row ends with one of these
    at::Tensor pad;         // []: what rows that have ended get
};

// Tokens that were stored since: all_lengths[slots[row]] becomes lengths[row], and one more unless the row had ended.
struct Stored {
    at::Tensor all_lengths;  // int32, by slot
    at::Tensor slots;        // int64 [row]
    at::Tensor lengths;      // int32 [row]
};

// The next tokens, [row]: into the history, unless the row had ended; and who ends with them.
void fused_take(const at::Tensor& chosen, const Answers& answers, const std::optional<Stored>& stored);

}  // namespace elastikv::torch
