#include "torch/elastic_allocator.h"

#include <c10/util/Exception.h>

#include "torch/elastic_block.h"
#include "torch/streams.h"

#if ELASTIKV_TORCH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace elastikv::torch {

c10::DataPtr ElasticAllocator::allocate(std::size_t bytes) {
    if (bytes == 0) return {nullptr, torch_device(model_->pool().device())};
    try {
        RowLayout layout;
        layout.unit = bytes;
        layout.stride = bytes;
        layout.max_length = 1;
        auto block = std::make_unique<ElasticBlock>(model_, layout, TensorGeometry{}, scrub_, tag_);
        block->grow(1, true);
        return ElasticBlock::into_data_ptr(std::move(block));
    } catch (const OutOfPhysicalMemory& error) {
        TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
    }
}

void ElasticAllocator::copy_data(void* to, const void* from, std::size_t bytes) const {
    const Capabilities& device = model_->pool().device();
    if (device.kind == DeviceKind::host) {
        default_copy_data(to, from, bytes);
        return;
    }
#if ELASTIKV_TORCH_CUDA
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device.index));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream.stream()));
#else
    TORCH_CHECK(false, "this elastikv was built for a torch without CUDA");
#endif
}

}  // namespace elastikv::torch
