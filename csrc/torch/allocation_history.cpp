#include "torch/allocation_history.h"

#if ELASTIKV_TORCH_CUDA

#include <c10/util/ApproximateClock.h>

#include <algorithm>
#include <utility>

namespace elastikv::torch {
namespace {

std::atomic<caching::CreateContextFn> context_recorder{nullptr};
std::atomic<caching::RecordContext> context_detail{caching::RecordContext::NEVER};

thread_local std::vector<std::string> compile_contexts;
thread_local std::string metadata_of_thread;

TraceEntry::Action torch_action(HeapAction action) {
    switch (action) {
        case HeapAction::alloc: return TraceEntry::ALLOC;
        case HeapAction::free_requested: return TraceEntry::FREE_REQUESTED;
        case HeapAction::free_completed: return TraceEntry::FREE_COMPLETED;
        case HeapAction::segment_alloc: return TraceEntry::SEGMENT_ALLOC;
        case HeapAction::segment_free: return TraceEntry::SEGMENT_FREE;
        case HeapAction::segment_map: return TraceEntry::SEGMENT_MAP;
        case HeapAction::segment_unmap: return TraceEntry::SEGMENT_UNMAP;
    }
    return TraceEntry::ALLOC;
}

TraceEntry::Action action_named(const std::string& name) {
    const std::pair<const char*, TraceEntry::Action> names[] = {
        {"alloc", TraceEntry::ALLOC},
        {"free_requested", TraceEntry::FREE_REQUESTED},
        {"free_completed", TraceEntry::FREE_COMPLETED},
        {"segment_alloc", TraceEntry::SEGMENT_ALLOC},
        {"segment_free", TraceEntry::SEGMENT_FREE},
        {"segment_map", TraceEntry::SEGMENT_MAP},
        {"segment_unmap", TraceEntry::SEGMENT_UNMAP},
        {"snapshot", TraceEntry::SNAPSHOT},
        {"oom", TraceEntry::OOM},
        {"annotate", annotate_action<TraceEntry>()},
    };
    for (const auto& [known, action] : names) {
        if (name == known) return action;
    }
    TORCH_CHECK(false, "Unknown TraceEntry action: ", name);
}

}  // namespace

void AllocationHistory::on_event(const HeapEvent& event) noexcept {
    try {
        add(torch_action(event.action), event.address, event.size, event.stream, event.arena,
            std::static_pointer_cast<c10::GatheredContext>(event.note));
    } catch (...) {
        // No memory for an entry, or a tracker that throws: the allocation itself stands.
    }
}

void AllocationHistory::add(TraceEntry::Action action, Address address, Bytes size, Stream stream, ArenaId arena,
                            std::shared_ptr<c10::GatheredContext> context, const std::string* metadata) {
    const std::lock_guard lock(mutex_);
    if (!recording() && trackers_.empty()) return;
    TraceEntry entry(action, device_, address, size, reinterpret_cast<cudaStream_t>(stream.value),
                     {arena.first, arena.second}, c10::getApproximateTime(),
                     with_contexts_ ? std::move(context) : nullptr,
                     compile_contexts.empty() ? "N/A" : compile_contexts.back());
    set_user_metadata(entry, metadata != nullptr ? *metadata : metadata_of_thread);
    for (const auto& tracker : trackers_) tracker(entry);
    if (!recording() || std::find(skipped_.begin(), skipped_.end(), action) != skipped_.end()) return;
    if (ring_.size() < max_entries_) {
        ring_.push_back(std::move(entry));
    } else if (!ring_.empty()) {
        ring_[oldest_] = std::move(entry);
        oldest_ = (oldest_ + 1) % ring_.size();
    }
}

void AllocationHistory::record(const HistoryRequest& request) {
    std::vector<TraceEntry::Action> skipped;
    for (const std::string& name : request.skipped) skipped.push_back(action_named(name));
    std::vector<TraceEntry> dropped;  // their contexts go without the lock
    const std::lock_guard lock(mutex_);
    recording_ = request.enabled;
    skipped_ = std::move(skipped);
    with_contexts_ = request.enabled && request.when >= caching::RecordContext::ALLOC;
    max_entries_ = std::max<std::size_t>(request.max_entries, 1);
    if (!request.enabled || request.clear || ring_.size() > max_entries_) {
        dropped.swap(ring_);
        oldest_ = 0;
    } else {
        std::rotate(ring_.begin(), ring_.begin() + static_cast<std::ptrdiff_t>(oldest_), ring_.end());
        oldest_ = 0;
    }
}

void AllocationHistory::add_tracker(caching::AllocatorTraceTracker tracker) {
    const std::lock_guard lock(mutex_);
    trackers_.push_back(std::move(tracker));
}

bool AllocationHistory::active() const {
    const std::lock_guard lock(mutex_);
    return recording() || !trackers_.empty();
}

std::vector<TraceEntry> AllocationHistory::entries() const {
    // Measuring the clock takes a while: once a process.
    static auto* const clock = new c10::ApproximateClockToUnixTimeConverter();
    const auto to_nanoseconds = clock->makeConverter();
    std::vector<TraceEntry> out;
    {
        const std::lock_guard lock(mutex_);
        out.reserve(ring_.size());
        out.insert(out.end(), ring_.begin() + static_cast<std::ptrdiff_t>(oldest_), ring_.end());
        out.insert(out.end(), ring_.begin(), ring_.begin() + static_cast<std::ptrdiff_t>(oldest_));
    }
    for (TraceEntry& entry : out) entry.time_.t_ = to_nanoseconds(entry.time_.approx_t_) / 1000;
    return out;
}

void set_context_recorder(const HistoryRequest& request) {
    context_recorder = request.enabled ? request.recorder : nullptr;
    context_detail = request.enabled ? request.when : caching::RecordContext::NEVER;
}

std::shared_ptr<c10::GatheredContext> gather_context(caching::RecordContext detail) {
    if (context_detail.load(std::memory_order_relaxed) < detail) return nullptr;
    const caching::CreateContextFn recorder = context_recorder.load();
    return recorder == nullptr ? nullptr : recorder();
}

void push_compile_context(std::string context) { compile_contexts.push_back(std::move(context)); }
void pop_compile_context() {
    if (!compile_contexts.empty()) compile_contexts.pop_back();
}
void set_thread_metadata(const std::string& metadata) { metadata_of_thread = metadata; }
const std::string& thread_metadata() { return metadata_of_thread; }

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
