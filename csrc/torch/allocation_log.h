// Allocations of a run, written to a CSV file as they happen: those of torch's current CUDA allocator, whichever it is,
// or those of a heap. docs/allocation-logs.md describes the file.
//
// Events come under an allocator's lock, so adding one only appends to a buffer under a mutex of the log's own, which
// nothing else is taken under; a thread of the log numbers blocks and writes. Neither needs the GIL.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "heap/types.h"

namespace elastikv::torch {

// As torch names them; `oom` has no counterpart in HeapAction.
enum class LogAction : std::uint8_t {
    alloc,
    free_requested,
    free_completed,
    segment_alloc,
    segment_free,
    segment_map,
    segment_unmap,
    oom,
};

struct LogEvent {
    std::int64_t time = 0;  // nanoseconds of a steady clock
    Address address = 0;
    Bytes size = 0;
    std::uintptr_t stream = 0;
    ArenaId pool{};
    std::int16_t device = 0;  // -1: the host
    LogAction action = LogAction::alloc;
};

// Thread safe. Told by one heap or by several allocators; events keep the order in which they were added.
class AllocationLog final : public HeapObserver {
  public:
    // Replaces the file. `device` is that of the heap that it observes, if any. Throws InvalidArgument where the file
    // can't be opened.
    explicit AllocationLog(const std::string& path, int device = -1);
    // As stop(), without complaint.
    ~AllocationLog() override;
    AllocationLog(const AllocationLog&) = delete;
    AllocationLog& operator=(const AllocationLog&) = delete;

    void add(const LogEvent& event) noexcept;
    void on_event(const HeapEvent& event) noexcept override;

    // Writes what is left and closes the file; events that come later are dropped. Throws VmmError where the file is
    // not whole, with the reason. The second call does nothing.
    void stop();
    const std::string& path() const { return path_; }

  private:
    // Numbers in place of addresses and handles, in the order of their first appearance. The writer's alone.
    struct Numbers {
        std::map<std::pair<std::int16_t, Address>, std::uint64_t> blocks;  // those not yet freed
        std::uint64_t next_block = 0;
        std::map<std::uintptr_t, std::size_t> streams{{0, 0}};
        std::map<ArenaId, std::size_t> pools{{ArenaId{}, 0}};
    };

    void work();
    void write(const std::vector<LogEvent>& events);
    void write_line(const LogEvent& event);

    const std::string path_;
    const int device_;
    std::FILE* const file_;
    int failure_ = 0;  // errno of the first failed write; the writer's until it has ended
    Numbers numbers_;
    std::int64_t start_ = 0;

    std::mutex mutex_;  // guards what follows
    std::condition_variable wake_;
    std::vector<LogEvent> buffer_;
    std::uint64_t lost_ = 0;  // events that there was no memory for
    bool stopping_ = false;

    std::thread writer_;
};

// Logs what torch's current CUDA allocator does on all devices, and any other that was current at an earlier start, as
// torch can't be told to forget a tracker. torch must have set CUDA up. Throws InvalidArgument while another such log
// runs, for an allocator that does not tell (torch's pluggable one), and where this elastikv has no CUDA.
void start_allocation_log(const std::string& path);
// Throws InvalidArgument where none runs; VmmError as AllocationLog::stop.
void stop_allocation_log();

}  // namespace elastikv::torch
