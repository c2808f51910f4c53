#include "torch/allocation_log.h"

#include <array>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstring>
#include <memory>
#include <set>

#include "base/error.h"

#if ELASTIKV_TORCH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

namespace elastikv::torch {
namespace {

constexpr std::size_t buffered = 1 << 16;  // events, some 4 MiB
constexpr auto pause = std::chrono::milliseconds(100);

constexpr std::array names{"alloc",        "free_requested", "free_completed", "segment_alloc",
                           "segment_free", "segment_map",    "segment_unmap",  "oom"};

std::int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

std::FILE* open(const std::string& path) {
    std::FILE* const file = std::fopen(path.c_str(), "w");
    if (file == nullptr) throw InvalidArgument("can't write an allocation log to " + path + ": " + strerror(errno));
    return file;
}

}  // namespace

AllocationLog::AllocationLog(const std::string& path, int device) : path_(path), device_(device), file_(open(path)) {
    buffer_.reserve(buffered);
    start_ = now();
    writer_ = std::thread([this] { work(); });
}

AllocationLog::~AllocationLog() {
    try {
        stop();
    } catch (const std::exception&) {  // nobody is left to tell
    }
}

void AllocationLog::add(const LogEvent& event) noexcept {
    bool full = false;
    {
        const std::lock_guard lock(mutex_);
        if (stopping_) return;
        try {
            buffer_.push_back(event);
        } catch (const std::bad_alloc&) {
            ++lost_;
        }
        full = buffer_.size() == buffered / 2;
    }
    if (full) wake_.notify_one();
}

void AllocationLog::on_event(const HeapEvent& event) noexcept {
    static_assert(static_cast<int>(HeapAction::segment_unmap) == static_cast<int>(LogAction::segment_unmap));
    add({.time = now(),
         .address = event.address,
         .size = event.size,
         .stream = event.stream.value,
         .pool = event.arena,
         .device = static_cast<std::int16_t>(device_),
         .action = static_cast<LogAction>(event.action)});
}

void AllocationLog::stop() {
    {
        const std::lock_guard lock(mutex_);
        if (stopping_) return;
        stopping_ = true;
    }
    wake_.notify_one();
    writer_.join();
    if (std::fclose(file_) != 0 && failure_ == 0) failure_ = errno;
    if (failure_ != 0) throw VmmError("the allocation log " + path_ + " is not whole: " + strerror(failure_));
    if (lost_ != 0) {
        throw VmmError("the allocation log " + path_ + " is not whole: no memory for " + std::to_string(lost_) +
                       " events");
    }
}

void AllocationLog::work() {
    if (std::fputs("time_ns,action,id,size,stream,pool,device\n", file_) < 0) failure_ = errno;
    std::vector<LogEvent> events;
    events.reserve(buffered);
    for (bool last = false; !last;) {
        {
            std::unique_lock lock(mutex_);
            wake_.wait_for(lock, pause, [this] { return stopping_ || buffer_.size() >= buffered / 2; });
            last = stopping_;
            events.swap(buffer_);
        }
        write(events);
        events.clear();
    }
}

void AllocationLog::write(const std::vector<LogEvent>& events) {
    for (const LogEvent& event : events) write_line(event);
}

void AllocationLog::write_line(const LogEvent& event) {
    std::array<char, 24> id{};
    if (event.action <= LogAction::free_completed) {
        const std::pair key(event.device, event.address);
        if (event.action == LogAction::alloc) numbers_.blocks[key] = numbers_.next_block++;
        const auto found = numbers_.blocks.find(key);
        if (found == numbers_.blocks.end()) return;  // allocated before the log began
        std::snprintf(id.data(), id.size(), "%" PRIu64, found->second);
        if (event.action == LogAction::free_completed) numbers_.blocks.erase(found);
    }
    const std::size_t stream = numbers_.streams.emplace(event.stream, numbers_.streams.size()).first->second;
    const std::size_t pool = numbers_.pools.emplace(event.pool, numbers_.pools.size()).first->second;
    const int written = std::fprintf(file_, "%" PRId64 ",%s,%s,%" PRIu64 ",%zu,%zu,%d\n", event.time - start_,
                                     names.at(static_cast<std::size_t>(event.action)), id.data(), event.size, stream,
                                     pool, static_cast<int>(event.device));
    if (written < 0 && failure_ == 0) failure_ = errno;
}

#if ELASTIKV_TORCH_CUDA

namespace {

using c10::cuda::CUDACachingAllocator::CUDAAllocator;
using c10::cuda::CUDACachingAllocator::TraceEntry;

// Where the trackers send what they hear. Never destroyed, as torch keeps them to the end.
struct Hub {
    std::mutex control;                 // start and stop, one at a time; never taken by a tracker
    std::set<CUDAAllocator*> trackers;  // allocators that have ours; guarded by control
    std::atomic<bool> on{false};
    std::mutex mutex;  // guards log; taken under allocators' locks, and before the log's own
    std::shared_ptr<AllocationLog> log;
};

Hub& hub() {
    static Hub* const forever = new Hub;
    return *forever;
}

std::optional<LogAction> action_of(TraceEntry::Action action) {
    switch (action) {
        case TraceEntry::ALLOC: return LogAction::alloc;
        case TraceEntry::FREE_REQUESTED: return LogAction::free_requested;
        case TraceEntry::FREE_COMPLETED: return LogAction::free_completed;
        case TraceEntry::SEGMENT_ALLOC: return LogAction::segment_alloc;
        case TraceEntry::SEGMENT_FREE: return LogAction::segment_free;
        case TraceEntry::SEGMENT_MAP: return LogAction::segment_map;
        case TraceEntry::SEGMENT_UNMAP: return LogAction::segment_unmap;
        case TraceEntry::OOM: return LogAction::oom;
        default: return std::nullopt;
    }
}

void track(const TraceEntry& entry) {
    Hub& to = hub();
    if (!to.on.load(std::memory_order_acquire)) return;
    const auto action = action_of(entry.action_);
    if (!action) return;
    const std::lock_guard lock(to.mutex);
    if (to.log == nullptr) return;
    to.log->add({.time = now(),
                 .address = entry.addr_,
                 .size = entry.size_,
                 .stream = reinterpret_cast<std::uintptr_t>(entry.stream_),
                 .pool = {entry.mempool_.first, entry.mempool_.second},
                 .device = entry.device_,
                 .action = *action});
}

void attach_tracker(Hub& to) {
    CUDAAllocator* const allocator = c10::cuda::CUDACachingAllocator::get();
    if (to.trackers.contains(allocator)) return;
    try {
        allocator->attachAllocatorTraceTracker(&track);
    } catch (const c10::Error&) {
        throw InvalidArgument("torch's current allocator, " + allocator->name() +
                              ", does not tell of its allocations; its native one and elastikv.torch.install() do");
    }
    to.trackers.insert(allocator);
}

}  // namespace

void start_allocation_log(const std::string& path) {
    Hub& to = hub();
    const std::lock_guard control(to.control);
    if (to.on) throw InvalidArgument("allocations are being logged to " + to.log->path() + " already; stop that first");
    attach_tracker(to);
    auto log = std::make_shared<AllocationLog>(path);
    const std::lock_guard lock(to.mutex);
    to.log = std::move(log);
    to.on.store(true, std::memory_order_release);
}

void stop_allocation_log() {
    Hub& to = hub();
    const std::lock_guard control(to.control);
    if (!to.on) throw InvalidArgument("no allocations are being logged");
    to.on.store(false, std::memory_order_release);
    std::shared_ptr<AllocationLog> log;
    {
        const std::lock_guard lock(to.mutex);
        log = std::move(to.log);
    }
    log->stop();
}

#else

void start_allocation_log(const std::string&) {
    throw InvalidArgument("this elastikv was built for a torch without CUDA: there is no CUDA allocator to log");
}
void stop_allocation_log() { throw InvalidArgument("no allocations are being logged"); }

#endif

}  // namespace elastikv::torch
