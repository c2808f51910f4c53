// CudaAllocator: coming and going, and what goes beyond one device or process.
#include "torch/cuda_allocator.h"

#if ELASTIKV_TORCH_CUDA

#include <algorithm>
#include <utility>

namespace elastikv::torch {
namespace {

// Address space costs nothing, and each stream takes two ranges of a share of it.
constexpr Bytes ranges_of_whole_pool = 64;

Bytes plenty(const SharedMemoryPool& pool) {
    return std::max<Bytes>(pool.global_stats().physical_limit * ranges_of_whole_pool, 1024 * GiB);
}

}  // namespace

CudaAllocator& CudaAllocator::instance() {
    static auto* const one = new CudaAllocator();  // tensors may outlive everything
    return *one;
}

void CudaAllocator::install(const std::shared_ptr<SharedMemoryPool>& pool, const std::string& name, Bytes addresses,
                            const HeapOptions& options) {
    const Capabilities& capabilities = pool->device();
    if (capabilities.kind != DeviceKind::cuda) {
        throw InvalidArgument("only a pool on a CUDA device can be torch's CUDA memory, not one on " +
                              device_name(capabilities));
    }
    const std::lock_guard lock(mutex_);
    const auto index = static_cast<unsigned char>(capabilities.index);
    if (devices_[index].load() != nullptr) {
        throw InvalidArgument("torch's memory on " + device_name(capabilities) +
                              " is in a pool already; elastikv.torch.uninstall() first");
    }
    const Bytes wanted = align_up(addresses == 0 ? plenty(*pool) : addresses, pool->page_size()).value_or(addresses);
    // The heap keeps what is idle; what it gives back goes to the driver.
    const ModelPtr model = pool->register_model(name, wanted, 0);
    try {
        // Never freed: tensors hold addresses, not owners.
        auto* const made = new DeviceHeap(pool, ModelHeap::make(model, wanted, options));
        made->history().record(history_);
        for (const auto& tracker : trackers_) made->history().add_tracker(tracker);
        made->update_observer();
        prepare_front();
        made->next = heaps_.load();
        heaps_.store(made, std::memory_order_release);
        devices_[index].store(made, std::memory_order_release);
    } catch (...) {
        pool->unregister_model(name);
        throw;
    }
    step_in_front();
}

void CudaAllocator::prepare_front() {
    if (installed_) return;
    // Never another, as memory of the first one's may still come back; so it is written once.
    caching::CUDAAllocator* const present = caching::allocator.load();
    if (before_ != nullptr && before_ != present) {
        throw InvalidArgument(
            "torch's allocator was changed since the first install, and memory of that time "
            "may still be in use; install before anything else changes it");
    }
    if (before_ == nullptr) before_ = present;
    enabled_ = before_->isEnabled();
}

void CudaAllocator::step_in_front() {
    if (installed_) return;
    caching::allocator.store(this);
    c10::SetAllocator(c10::DeviceType::CUDA, this);
    installed_ = true;
}

void CudaAllocator::accept_handles() {
    const std::lock_guard lock(mutex_);
    prepare_front();
    step_in_front();
}

void CudaAllocator::uninstall() {
    std::vector<DeviceHeap*> retired;
    {
        const std::lock_guard lock(mutex_);
        if (!installed_) throw InvalidArgument("no pool is installed as torch's CUDA memory");
        if (caching::allocator.load() != this) {
            throw InvalidArgument("another allocator was put in place after this one; take it away first");
        }
        caching::allocator.store(before_);
        c10::SetAllocator(c10::DeviceType::CUDA, before_);
        installed_ = false;
        for (auto& device : devices_) {
            if (DeviceHeap* const gone = device.exchange(nullptr)) retired.push_back(gone);
        }
    }
    for (DeviceHeap* const each : retired) {
        const std::shared_ptr<SharedMemoryPool> pool = each->pool();
        const std::string name = each->model_heap().model()->name();
        each->retire();
        try {
            pool->unregister_model(name);
        } catch (const ModelNotFound&) {  // its owner did
        } catch (const PoolClosed&) {
        }
    }
}

std::map<int, DeviceHeap*> CudaAllocator::installed() const {
    std::map<int, DeviceHeap*> out;
    for (const auto& each : devices_) {
        if (DeviceHeap* const device = each.load()) out.emplace(device->index(), device);
    }
    return out;
}

// torch sets CUDA up, with us in place already.
void CudaAllocator::init(int device_count) { before_->init(device_count); }

void CudaAllocator::mark_capture(DeviceIndex index, bool begins) {
    if (serving(index) == nullptr) forward::mark_capture(*before_, index, begins);
}

c10::DataPtr CudaAllocator::allocate_at(std::size_t size, void* address) {
    DeviceIndex index = 0;
    C10_CUDA_CHECK(c10::cuda::GetDevice(&index));
    if (serving(index) == nullptr) return forward::allocate_at(*before_, size, address);
    TORCH_CHECK_NOT_IMPLEMENTED(false, "the memory of an elastikv pool can't be allocated at a given address, here ",
                                address, " (", size, " bytes)");
}

void CudaAllocator::enablePeerAccess(DeviceIndex device, DeviceIndex accessed) {
    before_->enablePeerAccess(device, accessed);
}

caching::ShareableHandle CudaAllocator::shareIpcHandle(void* pointer) {
    const Address address = to_address(pointer);
    DeviceHeap* const device = holder_of(address);
    if (device == nullptr) return before_->shareIpcHandle(pointer);
    const std::optional<ByteRange> pages = device->heap().pages_of(address);
    TORCH_CHECK_NOT_IMPLEMENTED(pages,
                                "memory of a torch.cuda.MemPool with an allocator of its own can't be shared "
                                "between processes: elastikv has no handle for it");
    SharedMemoryHandle shared = device->ipc().share(*pages, address);
    return {shared.offset, std::move(shared.handle)};
}

std::shared_ptr<void> CudaAllocator::getIpcDevPtr(std::string handle) {
    if (IpcMemory::is_ours(handle)) return IpcMemory::open(handle);
    return before_->getIpcDevPtr(std::move(handle));
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
