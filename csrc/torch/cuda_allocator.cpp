// CudaAllocator: allocating, freeing, and running out.
#include "torch/cuda_allocator.h"

#if ELASTIKV_TORCH_CUDA

#include <c10/core/impl/GPUTrace.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <utility>

#include "torch/elastic_block.h"
#include "torch/out_of_memory.h"

namespace elastikv::torch {
namespace {

constexpr std::size_t exbibyte = std::size_t{1} << 60;

DeviceIndex current_device() {
    DeviceIndex index = 0;
    C10_CUDA_CHECK(c10::cuda::GetDevice(&index));
    return index;
}

// Other libraries that can give something up, like tensors whose receivers in other processes are done with them.
void run_free_memory_callbacks() {
    for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
        c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
    }
}

}  // namespace

bool CudaAllocator::is_ours(const c10::DataPtr& data) { return data.get_deleter() == &CudaAllocator::delete_block; }

c10::DataPtr CudaAllocator::allocate(std::size_t size) {
    const DeviceIndex index = current_device();
    DeviceHeap* const device = serving(index);
    if (!isEnabled()) return before_->allocate(size);
    if (device == nullptr) {
        c10::DataPtr data = before_->allocate(size);
        // raw_deleter() promises ours, which hands it on.
        (void)data.compare_exchange_deleter(before_->raw_deleter(), &CudaAllocator::delete_block);
        return data;
    }
    void* const pointer = allocate_on(*device, size, c10::cuda::getCurrentCUDAStream(index).stream());
    return {pointer, pointer, &CudaAllocator::delete_block, c10::Device(c10::DeviceType::CUDA, index)};
}

c10::DeleterFnPtr CudaAllocator::raw_deleter() const {
    return isEnabled() ? &CudaAllocator::delete_block : before_->raw_deleter();
}

bool CudaAllocator::is_simple_data_ptr(const c10::DataPtr& data) const { return data.get() == data.get_context(); }

// In the order of the current stream, as whatever wrote the data is.
void CudaAllocator::copy_data(void* to, const void* from, std::size_t size) const {
    C10_CUDA_CHECK(
        cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, c10::cuda::getCurrentCUDAStream().stream()));
}

void* CudaAllocator::raw_alloc(std::size_t size) {
    const DeviceIndex index = current_device();
    DeviceHeap* const device = serving(index);
    if (device == nullptr || !isEnabled()) return before_->raw_alloc(size);
    return allocate_on(*device, size, c10::cuda::getCurrentCUDAStream(index).stream());
}

void* CudaAllocator::raw_alloc_with_stream(std::size_t size, cudaStream_t stream) {
    DeviceHeap* const device = serving(current_device());
    if (device == nullptr || !isEnabled()) return before_->raw_alloc_with_stream(size, stream);
    return allocate_on(*device, size, stream);
}

void* CudaAllocator::allocate_on(DeviceHeap& device, std::size_t size, cudaStream_t stream) {
    if (size == 0) return nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, size < exbibyte, "CUDA out of memory. Tried to allocate more than 1EB memory.");
    HeapRequest request;
    request.requested = size;
    request.size = DeviceHeap::rounded(size);
    request.stream = to_stream(stream);
    request.arena = device.routes().arena_for(stream);
    request.note = gather_context(caching::RecordContext::STATE);
    device.model_heap().require_awake();
    Address address = device.try_allocate_cached(request);
    if (address == 0) address = allocate_slowly(device, request);
    void* const pointer = to_pointer(address);
    if (c10::memoryProfilingEnabled()) report_use(device, pointer, 1);
    const c10::impl::PyInterpreter* const tracer = c10::impl::GPUTrace::get_trace();
    if (tracer != nullptr) (*tracer)->trace_gpu_memory_allocation(c10::kCUDA, address);
    return pointer;
}

Address CudaAllocator::allocate_slowly(DeviceHeap& device, const HeapRequest& request) {
    run_free_memory_callbacks();
    try {
        return device.heap().allocate(request);
    } catch (const OutOfPhysicalMemory&) {
    } catch (const OutOfVirtualMemory&) {
    } catch (const InvalidSize&) {  // beyond all addresses
    }
    out_of_memory(device, request);
}

void CudaAllocator::out_of_memory(DeviceHeap& device, const HeapRequest& request) {
    const DeviceIndex index = device.index();
    OutOfMemoryReport report = report_for(device.heap(), request.size);
    report.memory = device.memory();
    report.allowed = device.allowed();
    device.history().add(TraceEntry::OOM, report.memory->free, request.size, request.stream, request.arena,
                         std::static_pointer_cast<c10::GatheredContext>(request.note));
    c10::reportOutOfMemoryToProfiler(static_cast<std::int64_t>(request.requested), report.allocated, report.reserved,
                                     c10::Device(c10::DeviceType::CUDA, index));
    std::vector<caching::OutOfMemoryObserver> observers;
    {
        const std::lock_guard lock(mutex_);
        observers = observers_;
    }
    for (const auto& observer : observers) {
        observer(index, request.size, report.allowed.value_or(report.memory->total), report.memory->free);
    }
    throw_out_of_memory(report);
}

// `change`: 1 for a block just handed out, -1 for one about to be freed.
void CudaAllocator::report_use(DeviceHeap& device, void* pointer, std::int64_t change) {
    const auto block = device.heap().find(to_address(pointer));
    if (!block) return;
    const HeapStats stats = device.heap().stats();
    const auto size = static_cast<std::int64_t>(block->size);
    const std::int64_t allocated = stats.allocated_bytes.of[0].current - (change < 0 ? size : 0);
    c10::reportMemoryUsageToProfiler(pointer, change * size, static_cast<std::size_t>(allocated),
                                     static_cast<std::size_t>(stats.reserved_bytes.of[0].current),
                                     c10::Device(c10::DeviceType::CUDA, device.index()));
}

void CudaAllocator::delete_block(void* pointer) { instance().free(pointer); }

void CudaAllocator::raw_delete(void* pointer) { free(pointer); }

void CudaAllocator::free(void* pointer) {
    if (pointer == nullptr) return;
    const Address address = to_address(pointer);
    DeviceHeap* device = owner_of(address);
    if (device == nullptr) device = holder_of(address);
    if (device == nullptr) {
        before_->raw_delete(pointer);
        return;
    }
    if (c10::memoryProfilingEnabled()) report_use(*device, pointer, -1);
    const c10::impl::PyInterpreter* const tracer = c10::impl::GPUTrace::get_trace();
    if (tracer != nullptr) (*tracer)->trace_gpu_memory_deallocation(c10::kCUDA, address);
    TORCH_CHECK(device->free(address), "invalid device pointer: ", pointer);
}

DeviceHeap* CudaAllocator::owner_of(Address address) const {
    for (DeviceHeap* each = heaps_.load(std::memory_order_acquire); each != nullptr; each = each->next) {
        if (each->contains(address)) return each;
    }
    return nullptr;
}

DeviceHeap* CudaAllocator::holder_of(Address address) const {
    for (DeviceHeap* each = heaps_.load(std::memory_order_acquire); each != nullptr; each = each->next) {
        if (each->heap().find(address)) return each;
    }
    return nullptr;
}

void CudaAllocator::recordStream(const c10::DataPtr& data, c10::Stream stream) {
    recordStream(data, c10::cuda::CUDAStream(stream));
}

void CudaAllocator::recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) {
    if (data.get() == nullptr) return;
    if (ElasticBlock* const block = ElasticBlock::from(data)) {
        block->record_stream(to_stream(stream.stream()));
        return;
    }
    if (!is_ours(data)) {
        before_->recordStream(data, stream);
        return;
    }
    const Address address = to_address(data.get());
    DeviceHeap* device = owner_of(address);
    if (device == nullptr) device = holder_of(address);
    if (device != nullptr) {
        TORCH_CHECK(device->heap().record_stream(address, to_stream(stream.stream())), "no allocated block starts at ",
                    data.get());
        return;
    }
    // From the allocator before, with our deleter: it knows its own by theirs.
    c10::DataPtr theirs(data.get(), data.get_context(), before_->raw_deleter(), data.device());
    before_->recordStream(theirs, stream);
    theirs.release_context();
}

void CudaAllocator::enable(bool value) {
    before_->enable(value);
    enabled_ = value;
}

void CudaAllocator::cacheInfo(DeviceIndex index, std::size_t* largest) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) {
        before_->cacheInfo(index, largest);
        return;
    }
    if (*largest == 0) *largest = device->memory().free;
    *largest = std::max<std::size_t>(*largest, device->heap().largest_free());
}

void* CudaAllocator::getBaseAllocation(void* pointer, std::size_t* size) {
    const Address address = to_address(pointer);
    DeviceHeap* device = owner_of(address);
    if (device == nullptr) device = holder_of(address);
    if (device == nullptr) return before_->getBaseAllocation(pointer, size);
    const auto base = device->heap().base_of(address);
    TORCH_CHECK(base, "invalid device pointer: ", pointer);
    if (size != nullptr) *size = base->second;
    return to_pointer(base->first);
}

cudaError_t CudaAllocator::memcpyAsync(void* to, int to_device, const void* from, int from_device, std::size_t size,
                                       cudaStream_t stream, bool p2p_enabled) {
    // Memory that was not made by cudaMalloc is copied between devices by the peer call, unless they reach each other.
    if (p2p_enabled || to_device == from_device) {
        return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
    }
    return cudaMemcpyPeerAsync(to, to_device, from, from_device, size, stream);
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
