// Counts a driver's calls, their failures and their time, by kind. Each pool puts one in front of the driver it shares.
#pragma once

#include <array>
#include <atomic>

#include "driver/forwarding_driver.h"

namespace elastikv {

struct DriverCallStats {
    std::uint64_t count = 0;
    std::uint64_t failures = 0;
    std::uint64_t nanoseconds = 0;
};
using DriverCallTable = std::array<DriverCallStats, driver_call_kinds>;

// Thread safe: counters are atomics, and a reader may see a call's count before its time.
class MeteredDriver final : public ForwardingDriver {
  public:
    using ForwardingDriver::ForwardingDriver;

    DriverCallTable table() const noexcept;
    // Bytes of physical memory or addresses whose owner is gone and which the driver refused to take back.
    Bytes abandoned() const noexcept { return abandoned_.load(std::memory_order_relaxed); }
    // Bytes of physical memory that were ever created, and released; what another's owner handed over counts too, and
    // is told by received().
    Bytes created() const noexcept { return created_.load(std::memory_order_relaxed); }
    Bytes released() const noexcept { return released_.load(std::memory_order_relaxed); }
    Bytes received() const noexcept { return received_.load(std::memory_order_relaxed); }
    void note_created(Bytes bytes) noexcept { created_.fetch_add(bytes, std::memory_order_relaxed); }
    void note_released(Bytes bytes) noexcept { released_.fetch_add(bytes, std::memory_order_relaxed); }
    void note_received(Bytes bytes) noexcept { received_.fetch_add(bytes, std::memory_order_relaxed); }
    // Whether both count the calls of one driver, so that a handle of the one is a handle of the other.
    bool is_over_the_same(const MeteredDriver& other) const noexcept { return &inner() == &other.inner(); }
    void abandon(Bytes bytes) noexcept { abandoned_.fetch_add(bytes, std::memory_order_relaxed); }

  private:
    Status forward(DriverCall call, Forwarded& go) noexcept override;

    struct Counter {
        std::atomic<std::uint64_t> count{0};
        std::atomic<std::uint64_t> failures{0};
        std::atomic<std::uint64_t> nanoseconds{0};
    };
    std::array<Counter, driver_call_kinds> counters_;
    std::atomic<Bytes> created_{0};
    std::atomic<Bytes> released_{0};
    std::atomic<Bytes> received_{0};
    std::atomic<Bytes> abandoned_{0};
};

using MeteredDriverPtr = std::shared_ptr<MeteredDriver>;

}  // namespace elastikv
