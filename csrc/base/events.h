// What pools do that a person may want to see: as events for a log, and as ranges for a profiler. Both are off until
// somebody asks, and cost a load and a branch each then.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "base/units.h"

namespace elastikv {

enum class EventKind : std::uint8_t {
    growth,         // an extent was made; bytes: its size
    reclaim,        // an extent went back to the device; bytes: its size
    out_of_memory,  // bytes: what was lacking
    pause,          // bytes: what was given back
    resume,         // bytes: what was made again
};
inline constexpr int event_kinds = 5;

const char* name_of(EventKind kind) noexcept;

struct Event {
    EventKind kind = EventKind::growth;
    std::string pool;  // its name; empty where it has none
    Bytes bytes = 0;
    Bytes physical = 0;  // what the pool holds afterwards
    std::chrono::nanoseconds duration{0};
    std::chrono::system_clock::time_point at{};
};

// Between those who make events, who may hold any lock, and one who takes them. Bounded: what nobody takes is dropped
// and counted. Thread safe; its mutex is the last in the lock order.
class EventQueue {
  public:
    // The process's. Never destroyed.
    static EventQueue& instance();

    // Kinds as bits, 1 << kind. A forked child wants none.
    void want(std::uint32_t kinds);
    bool wants(EventKind kind) const noexcept {
        const std::uint32_t kinds = wanted_.load(std::memory_order_relaxed);
        return kinds != 0 && (kinds >> static_cast<unsigned>(kind) & 1U) != 0 && same_process();
    }
    void push(Event event) noexcept;
    // What is there, after waiting up to `timeout` for anything; `dropped` gets how many were since the last call.
    std::vector<Event> take(std::chrono::milliseconds timeout, std::uint64_t& dropped);
    // Ends a take() that waits.
    void wake();

  private:
    bool same_process() const noexcept;

    std::atomic<std::uint32_t> wanted_{0};
    std::atomic<int> process_{0};
    std::mutex mutex_;  // guards everything below
    std::condition_variable changed_;
    std::deque<Event> events_;
    std::uint64_t dropped_ = 0;
    bool woken_ = false;
};

// How a profiler is told where something begins and ends on the calling thread; nested. Set once, or null.
struct RangeHooks {
    void (*push)(const char* name) noexcept;
    void (*pop)() noexcept;
};
void set_range_hooks(const RangeHooks* hooks) noexcept;

// Something that pools do, from construction to destruction: a range for the profiler, and, where done() was called, an
// event. Not thread safe.
class Observed {
  public:
    Observed(EventKind kind, const std::string& pool) noexcept;
    ~Observed();
    Observed(const Observed&) = delete;
    Observed& operator=(const Observed&) = delete;
    void done(Bytes bytes, Bytes physical) noexcept;

  private:
    const EventKind kind_;
    const bool wanted_;
    const RangeHooks* const hooks_;
    const std::string& pool_;
    Bytes bytes_ = 0;
    Bytes physical_ = 0;
    bool done_ = false;
    std::chrono::steady_clock::time_point began_{};
};

}  // namespace elastikv
