#include "torch/cuda_allocator_device.h"

#if ELASTIKV_TORCH_CUDA

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace elastikv::torch {

void PoolRoutes::add(ArenaId arena, Filter filter) {
    auto kept = std::make_shared<const Filter>(std::move(filter));
    const std::lock_guard lock(mutex_);
    for (const Route& route : routes_) {
        TORCH_CHECK(route.arena != arena, "beginAllocateToPool: already recording to mempool_id");
    }
    routes_.push_back({arena, std::move(kept)});
    count_.store(routes_.size(), std::memory_order_release);
}

void PoolRoutes::remove(ArenaId arena) {
    std::shared_ptr<const Filter> last;  // goes without the lock: it may hold anything
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(routes_.begin(), routes_.end(), [&](const auto& r) { return r.arena == arena; });
    TORCH_CHECK(found != routes_.end(), "endAllocatePool: not currently recording to mempool_id");
    last = std::move(found->filter);
    routes_.erase(found);
    count_.store(routes_.size(), std::memory_order_release);
}

ArenaId PoolRoutes::search(cudaStream_t stream) const {
    std::vector<Route> routes;
    {
        const std::lock_guard lock(mutex_);
        routes = routes_;
    }
    for (auto route = routes.rbegin(); route != routes.rend(); ++route) {
        if ((*route->filter)(stream)) return route->arena;
    }
    return {};
}

Bytes DeviceHeap::rounded(Bytes size) {
    if (size < heap_unit) return heap_unit;
    const Bytes divisions = roundup_divisions(size);
    if (divisions > 1 && size > heap_unit * divisions && !is_power_of_two(size)) {
        // Steps between a power of two and the next, that many of them.
        const Bytes step = std::bit_floor(size) / std::bit_floor(divisions);
        return align_up(size, std::max(step, heap_unit)).value_or(size);
    }
    return size;
}

// Settings may change at any time, and nobody tells.
void DeviceHeap::follow_settings() {
    if (reuse_in_captures() != reuses_in_captures_.load(std::memory_order_relaxed)) {
        const std::lock_guard lock(reuse_mutex_);
        const bool reuse = reuse_in_captures();
        heap().set_capture_order(reuse ? &graph_order_ : nullptr);
        reuses_in_captures_ = reuse;
    }
    const Bytes wanted = max_split_size();
    if (wanted == max_split_size_.load(std::memory_order_relaxed)) return;
    HeapOptions options = heap().options();
    options.max_split_size = wanted;
    heap().set_options(options);
    max_split_size_ = wanted;
}

bool DeviceHeap::free(Address address) {
    if (!heap().free(address, gather_context(caching::RecordContext::ALL))) return false;
    if (retired()) heap().release_idle(~Bytes{0});
    return true;
}

void DeviceHeap::set_fraction(double fraction) {
    TORCH_CHECK_VALUE(0 <= fraction && fraction <= 1, "invalid fraction:", fraction, ". Please set within [0, 1].");
    const Bytes limit = static_cast<Bytes>(std::llround(fraction * static_cast<double>(memory().total)));
    HeapOptions options = heap().options();
    options.limit = limit;
    heap().set_options(options);
    fraction_ = fraction;
    allowed_ = limit;
}

std::optional<Bytes> DeviceHeap::allowed() const {
    const Bytes limit = allowed_.load();
    return limit == ~Bytes{0} ? std::nullopt : std::optional(limit);
}

MemoryInfo DeviceHeap::memory() const {
    const c10::cuda::CUDAGuard guard(index_);
    std::size_t free = 0;
    std::size_t total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return {free, total};
}

void DeviceHeap::retire() {
    retired_ = true;
    pool_.reset();
    heap().empty_cache();
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
