// Compiled by scripts/compat against each torch: nothing of torch's allocator interface is left abstract, and what is
// thrown, returned and passed on has the types that this torch has. The script then reads the table of virtual functions
// that the compiler makes of it.
#include <type_traits>

#include "torch/cuda_allocator.h"

using elastikv::torch::CudaAllocator;

static_assert(!std::is_abstract_v<CudaAllocator>);
static_assert(std::is_final_v<CudaAllocator>);
static_assert(std::is_base_of_v<c10::cuda::CUDACachingAllocator::CUDAAllocator, CudaAllocator>);
static_assert(std::is_abstract_v<elastikv::torch::UniformAllocator>, "then its hooks are not pure");

// Where it goes: torch's slot takes it.
void put_in_place() { c10::cuda::CUDACachingAllocator::allocator.store(&CudaAllocator::instance()); }
