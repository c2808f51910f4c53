// What torch.cuda.memory records of one device: trace entries in a ring, and trackers that are told of each.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "heap/types.h"
#include "torch/torch_versions.h"

namespace elastikv::torch {

using caching::TraceEntry;

// The heap calls on_event() under its lock, so this one's mutex comes after it: nothing here calls a heap. Trackers run
// under the heap's lock, as torch documents. Thread safe.
class AllocationHistory final : public HeapObserver {
  public:
    explicit AllocationHistory(DeviceIndex device) : device_(device) {}

    void on_event(const HeapEvent& event) noexcept override;
    // An event that is not the heap's own: a snapshot, out of memory, an annotation.
    void add(TraceEntry::Action action, Address address, Bytes size, Stream stream, ArenaId arena,
             std::shared_ptr<c10::GatheredContext> context, const std::string* metadata = nullptr);

    void record(const HistoryRequest& request);
    void add_tracker(caching::AllocatorTraceTracker tracker);
    bool recording() const { return recording_.load(std::memory_order_relaxed); }
    // Whether anybody listens; if not, the heap needs no observer.
    bool active() const;
    // The oldest first, with their times in microseconds since the epoch.
    std::vector<TraceEntry> entries() const;

  private:
    const DeviceIndex device_;
    std::atomic<bool> recording_{false};
    mutable std::mutex mutex_;  // guards everything below
    std::size_t max_entries_ = 1;
    std::size_t oldest_ = 0;
    std::vector<TraceEntry> ring_;
    std::vector<TraceEntry::Action> skipped_;
    std::vector<caching::AllocatorTraceTracker> trackers_;
    bool with_contexts_ = false;
};

// Contexts are gathered by the calling thread, with no lock held, as that may need the GIL. These settings are the
// process's, as torch's are.
void set_context_recorder(const HistoryRequest& request);
// Null where nobody asked for contexts of that much detail.
std::shared_ptr<c10::GatheredContext> gather_context(caching::RecordContext detail);

// What the calling thread adds to its trace entries.
void push_compile_context(std::string context);
void pop_compile_context();
void set_thread_metadata(const std::string& metadata);
const std::string& thread_metadata();

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
