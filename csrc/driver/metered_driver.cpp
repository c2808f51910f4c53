#include "driver/metered_driver.h"

#include <chrono>

namespace elastikv {

Status MeteredDriver::forward(DriverCall call, Forwarded& go) noexcept {
    const auto start = std::chrono::steady_clock::now();
    const Status status = go();
    const auto elapsed = std::chrono::steady_clock::now() - start;
    Counter& counter = counters_[static_cast<std::size_t>(call)];
    counter.count.fetch_add(1, std::memory_order_relaxed);
    counter.nanoseconds.fetch_add(
        static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count()),
        std::memory_order_relaxed);
    // A fence that has not passed and a stream that captures are answers, not failures.
    if (!status.ok() && status.code != StatusCode::not_ready && status.code != StatusCode::capturing) {
        counter.failures.fetch_add(1, std::memory_order_relaxed);
    }
    return status;
}

DriverCallTable MeteredDriver::table() const noexcept {
    DriverCallTable table;
    for (std::size_t i = 0; i < table.size(); ++i) {
        table[i] = {counters_[i].count.load(std::memory_order_relaxed),
                    counters_[i].failures.load(std::memory_order_relaxed),
                    counters_[i].nanoseconds.load(std::memory_order_relaxed)};
    }
    return table;
}

}  // namespace elastikv
