// What the functions that launch our own kernels share. Only where torch has CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

#include "base/error.h"
#include "driver/device_program.h"

namespace elastikv::torch {

// Launches kernels of a program on a tensor's device, on torch's current stream there. Its device is the calling
// thread's meanwhile.
class KernelCall {
  public:
    KernelCall(const at::Tensor& like, DeviceProgram& program) : guard_(like.device()), program_(program) {
        bind_context(like.device());
    }

    // The guard leaves a thread without a context where its device is the default one.
    static void bind_context(const at::Device& device) { C10_CUDA_CHECK(cudaSetDevice(device.index())); }

    // Nothing where there are no blocks. The arguments are passed as they are: pointers, int, long long, float.
    template <typename... Arguments>
    void launch(const char* kernel, std::int64_t blocks_x, std::int64_t blocks_y, std::int64_t threads,
                Arguments... arguments) {
        if (blocks_x == 0 || blocks_y == 0) return;
        const auto stream = c10::cuda::getCurrentCUDAStream();
        const Launch how{static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y),
                         static_cast<unsigned>(threads), Stream{reinterpret_cast<std::uintptr_t>(stream.stream())}};
        void* pointers[] = {static_cast<void*>(&arguments)...};
        program_.launch(kernel, how, pointers);
    }

  private:
    const c10::cuda::CUDAGuard guard_;
    DeviceProgram& program_;
};

// Why the program can't be used on this CUDA device, or empty. Compiles and loads it, unless that was done.
inline std::string why_not(const at::Device& device, DeviceProgram& program) {
    try {
        const c10::cuda::CUDAGuard guard(device);
        KernelCall::bind_context(device);
        program.load();
    } catch (const DeviceUnavailable& problem) {
        return problem.what();
    }
    return {};
}

// What a kernel reads. What it writes beneath a window, too: the window's memory is nobody's to track.
inline const void* read(const at::Tensor& tensor) { return tensor.const_data_ptr(); }

// Whether it begins where sixteen bytes may be loaded at once.
inline bool by_sixteen(const at::Tensor& tensor) { return reinterpret_cast<std::uintptr_t>(read(tensor)) % 16 == 0; }

// Such that a head's elements lie side by side.
inline at::Tensor dense(const at::Tensor& states) { return states.stride(-1) == 1 ? states : states.contiguous(); }

inline void require_no_gradient(std::initializer_list<const at::Tensor*> tensors) {
    if (!at::GradMode::is_enabled()) return;
    for (const at::Tensor* const each : tensors) {
        if (each->requires_grad()) {
            throw InvalidArgument("elastikv's kernels have no gradient: run the model under torch.inference_mode()");
        }
    }
}

// Whether all are of one dtype, bfloat16 or float16, on one CUDA device.
inline bool alike(std::initializer_list<const at::Tensor*> tensors) {
    const at::Tensor& first = **tensors.begin();
    const bool served = first.is_cuda() && (first.scalar_type() == at::kHalf || first.scalar_type() == at::kBFloat16);
    return served && std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor* each) {
               return each->device() == first.device() && each->scalar_type() == first.scalar_type();
           });
}

[[noreturn]] inline void refuse(const char* what, std::initializer_list<const at::Tensor*> tensors) {
    std::ostringstream text;
    text << what << ":";
    for (const at::Tensor* const each : tensors) {
        text << " " << each->sizes() << " of " << each->dtype() << " on " << each->device();
    }
    throw InvalidArgument(text.str());
}

}  // namespace elastikv::torch
