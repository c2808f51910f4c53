// One device's part of the installed allocator: its heap, which arena a request goes to, and its history.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "shared/shared_memory_pool.h"
#include "torch/allocation_history.h"
#include "torch/graph_order.h"
#include "torch/ipc_memory.h"
#include "torch/model_heap.h"

namespace elastikv::torch {

// Which requests go to a private pool: those on streams that the filter picks, on whatever thread.
class PoolRoutes {
  public:
    using Filter = std::function<bool(cudaStream_t)>;

    // Throws c10::Error where the pool already has a route (add) or has none (remove).
    void add(ArenaId arena, Filter filter);
    void remove(ArenaId arena);
    // The common arena, if no filter picks the stream; that costs one load where there are no routes. The latest route
    // comes first. Filters run without a lock.
    ArenaId arena_for(cudaStream_t stream) const {
        return count_.load(std::memory_order_acquire) == 0 ? ArenaId{} : search(stream);
    }

  private:
    struct Route {
        ArenaId arena;
        std::shared_ptr<const Filter> filter;
    };
    ArenaId search(cudaStream_t stream) const;

    std::atomic<std::size_t> count_{0};
    mutable std::mutex mutex_;  // guards routes_
    std::vector<Route> routes_;
};

// Lives for ever once made: tensors may outlive all else. Thread safe.
class DeviceHeap {
  public:
    DeviceHeap(std::shared_ptr<SharedMemoryPool> pool, ModelHeapPtr heap)
        : index_(static_cast<DeviceIndex>(heap->model()->pool().device().index)),
          pool_(std::move(pool)),
          heap_(std::move(heap)),
          ipc_(heap_->model()->shared_pool()),
          history_(index_) {
        // What goes back to the pool can't be shared any more, and its descriptors must not keep it.
        this->heap().set_before_release([this](ByteRange pages) { ipc_.forget(pages); });
    }

    DeviceIndex index() const { return index_; }
    Heap& heap() { return heap_->heap(); }
    ModelHeap& model_heap() { return *heap_; }
    AllocationHistory& history() { return history_; }
    IpcMemory& ipc() { return ipc_; }
    PoolRoutes& routes() { return routes_; }
    bool contains(Address address) const { return heap_->contains(address); }

    // As torch rounds it under roundup_power2_divisions.
    static Bytes rounded(Bytes size);
    // 0 if nothing is at hand.
    Address try_allocate_cached(const HeapRequest& request) {
        follow_settings();
        return heap().try_allocate_cached(request);
    }
    // False if the block is not this heap's.
    bool free(Address address);

    // The share of the device's memory that the heap may hold. Throws c10::ValueError beyond [0, 1].
    void set_fraction(double fraction);
    double fraction() const { return fraction_.load(); }
    // In bytes; none where the fraction was never set.
    std::optional<Bytes> allowed() const;
    MemoryInfo memory() const;

    // To be called after a change of what listens.
    void update_observer() { heap().set_observer(history_.active() ? &history_ : nullptr); }

    // From now on it only takes back what it handed out, and keeps none of it.
    void retire();
    bool retired() const { return retired_.load(std::memory_order_relaxed); }
    const std::shared_ptr<SharedMemoryPool>& pool() const { return pool_; }

    DeviceHeap* next = nullptr;  // of all that were ever made; set once

  private:
    void follow_settings();

    const DeviceIndex index_;
    std::shared_ptr<SharedMemoryPool> pool_;  // let go of when retired
    const ModelHeapPtr heap_;
    IpcMemory ipc_;
    AllocationHistory history_;
    PoolRoutes routes_;
    GraphOrder graph_order_;
    std::atomic<double> fraction_{1.0};
    std::atomic<Bytes> allowed_{~Bytes{0}};
    std::atomic<Bytes> max_split_size_{~Bytes{0}};
    std::mutex reuse_mutex_;                       // held while that is changed
    std::atomic<bool> reuses_in_captures_{false};  // whether the heap has graph_order_
    std::atomic<bool> retired_{false};
};

inline Address to_address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
inline void* to_pointer(Address address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); }
inline Stream to_stream(cudaStream_t stream) { return {reinterpret_cast<std::uintptr_t>(stream)}; }
inline ArenaId to_arena(const PoolId& pool) { return {pool.first, pool.second}; }
inline PoolId to_pool_id(const ArenaId& arena) { return {arena.first, arena.second}; }

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
