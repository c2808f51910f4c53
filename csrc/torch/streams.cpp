#include "torch/streams.h"

#if ELASTIKV_TORCH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace elastikv::torch {

Stream current_stream(const Capabilities& device) {
#if ELASTIKV_TORCH_CUDA
    if (device.kind == DeviceKind::cuda) {
        const auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device.index));
        return {reinterpret_cast<std::uintptr_t>(stream.stream())};
    }
#endif
    (void)device;
    return {};
}

}  // namespace elastikv::torch
