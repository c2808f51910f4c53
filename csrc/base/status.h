// What a driver call answers. No allocation and no exception: it is made in noexcept code and on failure paths.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

namespace elastikv {

enum class StatusCode : std::uint8_t {
    ok,
    not_ready,         // a fence that has not passed yet
    capturing,         // the stream records a graph: work put on it would not run now
    out_of_memory,     // physical memory, or address space for a reservation
    invalid_argument,  // the driver refused the values
    unsupported,       // this device or driver lacks the feature
    unavailable,       // no driver, no such device, or the driver has shut down
    failed,            // anything else
};

// Which call answered; also the index into the counters of driver/metered_driver.h.
enum class DriverCall : std::uint8_t {
    memory_info,
    reserve,
    free_addresses,
    create,
    release,
    map,
    set_access,
    unmap,
    zero,
    copy,
    record_fence,
    query_fence,
    wait_fence,
    destroy_fence,
    stream_wait,
    synchronize,
    export_fd,
    import_fd,
    allow_peer,
    create_on_host,
    pin,
    unpin,
    transfer,
};
inline constexpr int driver_call_kinds = 23;

const char* name_of(DriverCall call) noexcept;
const char* name_of(StatusCode code) noexcept;

struct [[nodiscard]] Status {
    StatusCode code = StatusCode::ok;
    DriverCall call = DriverCall::memory_info;
    int native = 0;  // CUresult or errno, 0 where there is none

    constexpr bool ok() const { return code == StatusCode::ok; }
    static constexpr Status success() { return {}; }
};

// A value, or the status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
  public:
    Result(T value) : value_(std::move(value)) {}  // NOLINT(google-explicit-constructor)
    Result(Status status) : status_(status) {}     // NOLINT(google-explicit-constructor)
    bool ok() const { return value_.has_value(); }
    Status status() const { return status_; }
    T& value() { return *value_; }

  private:
    std::optional<T> value_;
    Status status_;
};

}  // namespace elastikv
