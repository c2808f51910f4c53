// CudaAllocator: private pools, which graphs and torch.cuda.MemPool use, and their checkpoints.
#include "torch/cuda_allocator.h"

#if ELASTIKV_TORCH_CUDA

#include <utility>

namespace elastikv::torch {
namespace {

// Another allocator as the source of a pool's segments.
class AllocatorSource final : public SegmentSource {
  public:
    explicit AllocatorSource(std::shared_ptr<caching::CUDAAllocator> allocator) : allocator_(std::move(allocator)) {}

    Address try_allocate(Bytes size, Stream stream) override {
        try {
            return to_address(allocator_->raw_alloc_with_stream(size, reinterpret_cast<cudaStream_t>(stream.value)));
        } catch (const c10::OutOfMemoryError&) {
            return 0;
        }
    }

    void free(Address address, Bytes, Stream) noexcept override {
        try {
            allocator_->raw_delete(to_pointer(address));
        } catch (const std::exception& error) {
            TORCH_WARN("a memory pool's allocator did not take its memory back: ", error.what());
        }
    }

  private:
    const std::shared_ptr<caching::CUDAAllocator> allocator_;
};

struct SavedState final : caching::AllocatorState {
    explicit SavedState(ArenaState saved) : state(std::move(saved)) {}
    const ArenaState state;
};

}  // namespace

void CudaAllocator::use_pool(DeviceIndex index, PoolId pool, std::shared_ptr<caching::CUDAAllocator> source) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) {
        forward::use_pool(*before_, index, pool, std::move(source));
        return;
    }
    std::shared_ptr<SegmentSource> segments;
    if (source) segments = std::make_shared<AllocatorSource>(std::move(source));
    device->heap().use_arena(to_arena(pool), std::move(segments));
}

void CudaAllocator::beginAllocateToPool(DeviceIndex index, PoolId pool, std::function<bool(cudaStream_t)> filter) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) {
        before_->beginAllocateToPool(index, pool, std::move(filter));
        return;
    }
    device->routes().add(to_arena(pool), std::move(filter));
    device->heap().use_arena(to_arena(pool));
}

void CudaAllocator::endAllocateToPool(DeviceIndex index, PoolId pool) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) {
        before_->endAllocateToPool(index, pool);
        return;
    }
    device->routes().remove(to_arena(pool));
}

// A pool that was made before this allocator was installed, or on one that has gone since, is known to another.
void CudaAllocator::releasePool(DeviceIndex index, PoolId pool) {
    const ArenaId arena = to_arena(pool);
    for (DeviceHeap* each = heaps_.load(std::memory_order_acquire); each != nullptr; each = each->next) {
        if (each->index() != index || each->heap().arena_use_count(arena) == 0) continue;
        each->heap().release_arena(arena);
        return;
    }
    before_->releasePool(index, pool);
}

int CudaAllocator::getPoolUseCount(DeviceIndex index, PoolId pool) {
    const ArenaId arena = to_arena(pool);
    for (DeviceHeap* each = heaps_.load(std::memory_order_acquire); each != nullptr; each = each->next) {
        if (each->index() != index) continue;
        if (const int count = each->heap().arena_use_count(arena); count > 0) return count;
    }
    return serving(index) != nullptr ? 0 : before_->getPoolUseCount(index, pool);
}

void CudaAllocator::set_use_on_oom(DeviceIndex index, PoolId pool, bool use) {
    DeviceHeap* const device = serving(index);
    if (device != nullptr) {
        device->heap().set_use_on_oom(to_arena(pool), use);
    } else {
        forward::set_use_on_oom(*before_, index, pool, use);
    }
}

void CudaAllocator::set_no_split(DeviceIndex index, PoolId pool) {
    DeviceHeap* const device = serving(index);
    if (device != nullptr) {
        device->heap().set_no_split(to_arena(pool));
    } else {
        forward::set_no_split(*before_, index, pool);
    }
}

bool CudaAllocator::checkPoolLiveAllocations(DeviceIndex index, PoolId pool,
                                             const std::unordered_set<void*>& expected) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) return before_->checkPoolLiveAllocations(index, pool, expected);
    TORCH_CHECK(device->heap().arena_use_count(to_arena(pool)) > 0, "Could not find pool of id: ", pool.first, ", ",
                pool.second);
    std::size_t live = 0;
    for (const SegmentView& segment : device->heap().snapshot(to_arena(pool))) {
        for (const BlockView& block : segment.blocks) {
            if (!block.allocated) continue;
            if (expected.count(to_pointer(block.address)) == 0) return false;
            ++live;
        }
    }
    return live == expected.size();
}

std::shared_ptr<caching::AllocatorState> CudaAllocator::getCheckpointState(DeviceIndex index, PoolId pool) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) return before_->getCheckpointState(index, pool);
    return std::make_shared<SavedState>(device->heap().checkpoint(to_arena(pool)));
}

caching::CheckpointDelta CudaAllocator::setCheckpointPoolState(DeviceIndex index,
                                                               std::shared_ptr<caching::AllocatorState> state) {
    const auto* const saved = dynamic_cast<const SavedState*>(state.get());
    if (saved == nullptr) return before_->setCheckpointPoolState(index, std::move(state));
    DeviceHeap* const device = serving(index);
    TORCH_CHECK(device != nullptr, "device ", static_cast<int>(index),
                " is no longer served by the allocator that made this state");
    const RestoreResult result = device->heap().restore(saved->state, gather_context(caching::RecordContext::ALL));
    caching::CheckpointDelta delta;
    for (const Address address : result.freed) delta.ptrs_freed.push_back(to_pointer(address));
    for (const Address address : result.allocated) {
        void* const pointer = to_pointer(address);
        delta.dataptrs_allocd.emplace_back(pointer, pointer, &CudaAllocator::delete_block,
                                           c10::Device(c10::DeviceType::CUDA, index));
    }
    return delta;
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
