// CudaAllocator: statistics, snapshots, and the history of allocations.
#include "torch/cuda_allocator.h"

#if ELASTIKV_TORCH_CUDA

#include <algorithm>
#include <utility>

namespace elastikv::torch {
namespace {

using c10::CachingDeviceAllocator::DeviceStats;

void add(c10::CachingAllocator::StatArray& to, const StatTriple& from) {
    for (std::size_t i = 0; i < to.size(); ++i) {
        to[i].current += from.of[i].current;
        to[i].peak += from.of[i].peak;
        to[i].allocated += from.of[i].allocated;
        to[i].freed += from.of[i].freed;
    }
}

caching::SegmentInfo describe(const SegmentView& view, DeviceIndex device) {
    caching::SegmentInfo info;
    info.device = device;
    info.address = view.address;
    info.total_size = view.size;
    set_stream(info, view.stream.value);
    info.is_large = view.large;
    info.is_expandable = view.elastic;
    info.owner_private_pool_id = to_pool_id(view.arena);
    info.context_when_allocated = std::static_pointer_cast<c10::GatheredContext>(view.note);
    info.blocks.reserve(view.blocks.size());
    for (const BlockView& block : view.blocks) {
        caching::BlockInfo& each = info.blocks.emplace_back();
        each.size = block.size;
        each.requested_size = block.requested;
        each.allocated = block.allocated;
        each.active = block.active;
        each.context_when_allocated = std::static_pointer_cast<c10::GatheredContext>(block.note);
        if (block.allocated) info.allocated_size += block.size;
        if (block.active) {
            info.active_size += block.size;
            info.requested_size += block.requested;
        }
    }
    return info;
}

}  // namespace

bool CudaAllocator::before_is_ready() const { return before_->initialized(); }

bool CudaAllocator::before_keeps_books() const { return before_->name() == "native"; }

// What was allocated before the install, and is not freed yet, counts too.
DeviceStats CudaAllocator::getDeviceStats(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) return before_->getDeviceStats(index);
    DeviceStats stats;
    if (before_is_ready() && before_keeps_books()) stats = before_->getDeviceStats(index);
    const HeapStats ours = device->heap().stats();
    add(stats.allocation, ours.allocation);
    add(stats.segment, ours.segment);
    add(stats.active, ours.active);
    add(stats.inactive_split, ours.inactive_split);
    add(stats.allocated_bytes, ours.allocated_bytes);
    add(stats.reserved_bytes, ours.reserved_bytes);
    add(stats.active_bytes, ours.active_bytes);
    add(stats.inactive_split_bytes, ours.inactive_split_bytes);
    add(stats.requested_bytes, ours.requested_bytes);
    stats.num_alloc_retries += ours.retries;
    stats.num_ooms += ours.out_of_memory;
    stats.num_sync_all_streams += ours.waits;
    stats.num_device_alloc += ours.device_allocs;
    stats.num_device_free += ours.device_frees;
    stats.max_split_size = static_cast<std::int64_t>(max_split_size());
    return stats;
}

void CudaAllocator::resetAccumulatedStats(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device != nullptr) device->heap().reset_accumulated_stats();
    if (device == nullptr || (before_is_ready() && before_keeps_books())) before_->resetAccumulatedStats(index);
}

void CudaAllocator::resetPeakStats(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device != nullptr) device->heap().reset_peak_stats();
    if (device == nullptr || (before_is_ready() && before_keeps_books())) before_->resetPeakStats(index);
}

// A pool of which only part is ours: the heaps and the allocator before each give back theirs.
void CudaAllocator::emptyCache(PoolId pool) {
    const Note context = gather_context(caching::RecordContext::ALL);
    const ArenaId arena = to_arena(pool);
    for_each_heap([&](DeviceHeap& device) {
        // A pool in use keeps what graphs may replay into.
        if (arena.common() || device.heap().arena_use_count(arena) == 0) device.heap().empty_cache(arena, context);
    });
    if (before_is_ready()) before_->emptyCache(pool);
}

double CudaAllocator::getMemoryFraction(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    return device != nullptr ? device->fraction() : before_->getMemoryFraction(index);
}

void CudaAllocator::setMemoryFraction(double fraction, DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device != nullptr) {
        device->set_fraction(fraction);
    } else {
        before_->setMemoryFraction(fraction, index);
    }
}

std::pair<std::size_t, std::size_t> CudaAllocator::memory_info(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) return forward::memory_info(*before_, index);
    const MemoryInfo memory = device->memory();
    return {memory.free, memory.total};
}

std::vector<StreamSegment> CudaAllocator::elastic_segments(DeviceIndex index) {
    DeviceHeap* const device = serving(index);
    if (device == nullptr) return forward::elastic_segments(*before_, index);
    std::vector<StreamSegment> out;
    for (const SegmentView& view : device->heap().snapshot()) {
        if (!view.elastic) continue;
        const auto stream = reinterpret_cast<cudaStream_t>(view.stream.value);
        const auto same = std::find_if(out.begin(), out.end(), [&](const StreamSegment& each) {
            return each.stream == stream && each.small == !view.large;
        });
        if (same != out.end()) {
            same->size += view.size;
        } else {
            out.push_back({stream, !view.large, view.size});
        }
    }
    return out;
}

// The allocator before tells of its own memory, of the settings, and of annotations, which it is told of too.
caching::SnapshotInfo CudaAllocator::take_snapshot(PoolId pool, bool with_traces) {
    const ArenaId arena = to_arena(pool);
    caching::SnapshotInfo result{};
    if (before_is_ready() && before_keeps_books()) result = forward::snapshot(*before_, pool, with_traces);
    for_each_heap([&](DeviceHeap& device) {
        const auto index = static_cast<std::size_t>(device.index());
        if (with_traces) {
            if (result.device_traces.size() <= index) result.device_traces.resize(index + 1);
            auto& traces = result.device_traces[index];
            if (serving(device.index()) == &device) {  // one entry a snapshot, and that is ours
                std::erase_if(traces, [](const TraceEntry& entry) { return entry.action_ == TraceEntry::SNAPSHOT; });
            }
            for (TraceEntry& entry : device.history().entries()) traces.push_back(std::move(entry));
            std::stable_sort(traces.begin(), traces.end(),
                             [](const TraceEntry& a, const TraceEntry& b) { return a.time_.t_ < b.time_.t_; });
        }
        std::size_t active = 0;
        for (const SegmentView& view : device.heap().snapshot(arena.common() ? std::nullopt : std::optional(arena))) {
            result.segments.push_back(describe(view, device.index()));
            active += result.segments.back().active_size;
        }
        device.history().add(TraceEntry::SNAPSHOT, 0, active, {}, arena, nullptr);
    });
    std::stable_sort(result.segments.begin(), result.segments.end(), [](const auto& a, const auto& b) {
        return a.device != b.device ? a.device < b.device : a.address < b.address;
    });
    return result;
}

void CudaAllocator::record_history(const HistoryRequest& request) {
    TORCH_CHECK(request.when == caching::RecordContext::NEVER || request.recorder != nullptr,
                "contexts can't be recorded without a recorder");
    if (before_keeps_books()) forward::record_history(*before_, request);
    const std::lock_guard lock(mutex_);
    history_ = request;
    set_context_recorder(request);
    for_each_heap([&](DeviceHeap& device) {
        device.history().record(request);
        device.update_observer();
    });
}

bool CudaAllocator::isHistoryEnabled() {
    const std::lock_guard lock(mutex_);
    return history_.enabled;
}

void CudaAllocator::attachAllocatorTraceTracker(caching::AllocatorTraceTracker tracker) {
    if (before_keeps_books()) before_->attachAllocatorTraceTracker(tracker);
    const std::lock_guard lock(mutex_);
    for_each_heap([&](DeviceHeap& device) {
        device.history().add_tracker(tracker);
        device.update_observer();
    });
    trackers_.push_back(std::move(tracker));
}

void CudaAllocator::attachOutOfMemoryObserver(caching::OutOfMemoryObserver observer) {
    if (before_keeps_books()) before_->attachOutOfMemoryObserver(observer);
    const std::lock_guard lock(mutex_);
    observers_.push_back(std::move(observer));
}

// Rejections are a policy of the allocator before: this one tries, and then is out of memory.
void CudaAllocator::add_rejection_observer(OomRejectionObserver observer) {
    if (before_keeps_books()) forward::add_rejection_observer(*before_, std::move(observer));
}

void CudaAllocator::recordAnnotation(const std::vector<std::pair<std::string, std::string>>& pairs) {
    before_->recordAnnotation(pairs);
}

void CudaAllocator::pushCompileContext(std::string& context) {
    before_->pushCompileContext(context);
    push_compile_context(context);
}

void CudaAllocator::popCompileContext() {
    before_->popCompileContext();
    pop_compile_context();
}

void CudaAllocator::set_metadata(const std::string& metadata) {
    if (before_keeps_books()) forward::set_metadata(*before_, metadata);
    set_thread_metadata(metadata);
}

std::string CudaAllocator::metadata() { return thread_metadata(); }

void CudaAllocator::annotate(const void* pointer, const std::string& metadata) {
    const Address address = to_address(pointer);
    DeviceHeap* const device = holder_of(address);
    if (device == nullptr) {
        forward::annotate(*before_, pointer, metadata);
        return;
    }
    if (!device->history().recording()) return;
    if (const auto block = device->heap().find(address)) {
        device->history().add(annotate_action<TraceEntry>(), address, block->size, {}, {},
                              gather_context(caching::RecordContext::ALLOC), &metadata);
    }
}

std::shared_ptr<c10::GatheredContext> CudaAllocator::context_of(const void* pointer) {
    const Address address = to_address(pointer);
    DeviceHeap* const device = holder_of(address);
    if (device == nullptr) return forward::context_of(*before_, pointer);
    const auto block = device->heap().find(address);
    return block ? std::static_pointer_cast<c10::GatheredContext>(block->note) : nullptr;
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
