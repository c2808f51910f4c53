// The plain C entry points, for torch.cuda.memory.CUDAPluggableAllocator: they need no Python, only the names below and
// this library's path. They serve from one heap a device, for the life of the process.
//
// The heap is made at the first use, on the pool that serve_entry_points() named for the device. Without one it is a
// pool of the device's whole memory, or of what ELASTIKV_PHYSICAL_LIMIT says then: bytes, as in 34359738368, or a share
// of the device's memory, as in 0.9.
//
// All are thread safe and may be called at any time, at exit too. Nothing here is ever destroyed.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#include "shared/shared_memory_pool.h"
#include "torch/model_heap.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as the CUDA runtime has it

namespace elastikv::torch {

// torch's MempoolId_t, which moves between headers.
using MempoolId = std::pair<unsigned long long, unsigned long long>;

// The entry points take the memory of the pool's device from this pool, as its client `name`, for good.
// Throws InvalidArgument where they have another heap for the device already, and register_model's errors.
void serve_entry_points(SharedMemoryPool& pool, const std::string& name);

// The heap behind the entry points, or null where there is none yet.
ModelHeapPtr entry_points_heap(int device);

}  // namespace elastikv::torch

extern "C" {

// Null for size 0. Throws c10::OutOfMemoryError with who holds what, and other c10::Errors; torch does not check for
// null.
void* elastikv_malloc(std::size_t size, int device, cudaStream_t stream);
// Null and pointers from elsewhere are ignored.
void elastikv_free(void* pointer, std::size_t size, int device, cudaStream_t stream);

// The hooks that torch has beside. None of them is needed, but a graph may only be captured with those of pools.
void elastikv_init(int device_count);
// Gives all idle memory back to the driver.
void elastikv_reset();
void elastikv_memory_fraction(double fraction, int device);
// Where the contiguous memory around the pointer begins, and its size.
void* elastikv_base_alloc(void* pointer, std::size_t* size);
void elastikv_record_stream(void* pointer, cudaStream_t stream);
// From begin to end, what the filter says yes to comes from memory of the pool's own, which stays in place until the
// pool is released as often as it was begun.
void elastikv_begin_allocate_to_pool(int device, elastikv::torch::MempoolId pool,
                                     std::function<bool(cudaStream_t)> filter);
void elastikv_end_allocate_to_pool(int device, elastikv::torch::MempoolId pool);
void elastikv_release_pool(int device, elastikv::torch::MempoolId pool);
}
