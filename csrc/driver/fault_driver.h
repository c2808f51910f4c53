// A driver for tests: fails chosen calls, and holds fences back as a busy device would.
#pragma once

#include <mutex>
#include <optional>
#include <set>

#include "driver/forwarding_driver.h"

namespace elastikv {

// Thread safe.
class FaultDriver final : public ForwardingDriver {
  public:
    explicit FaultDriver(DriverPtr inner);

    // Fails the n-th call from now (1 is the next), of `call` or of any kind, with `code`; calls before and after it
    // pass. A failed call does not reach the driver beneath.
    void fail_nth(std::uint64_t n, std::optional<DriverCall> call = std::nullopt, StatusCode code = StatusCode::failed);
    // From the n-th call on, every one fails.
    void fail_from(std::uint64_t n, std::optional<DriverCall> call = std::nullopt,
                   StatusCode code = StatusCode::failed);
    void heal();
    // True once an armed failure has struck.
    bool struck() const;
    // Calls that arrived since construction, the failed ones included.
    std::uint64_t calls() const;

    // Fences recorded from now on stay pending until let_pass(): a device that is busy. Also makes it asynchronous.
    void hold_fences();
    void let_pass();
    // Streams in here answer `capturing` to record_fence.
    void set_capturing(Stream stream, bool capturing);

    const Capabilities& capabilities() const noexcept override;
    Status record_fence(Stream stream, Fence& out) noexcept override;
    Status query_fence(Fence fence) noexcept override;
    Status wait_fence(Fence fence) noexcept override;
    Status destroy_fence(Fence fence) noexcept override;
    // Fences that were recorded and not destroyed.
    std::size_t live_fences() const;

  private:
    Status forward(DriverCall call, Forwarded& go) noexcept override;
    bool strikes(DriverCall call, Status& status) noexcept;

    mutable std::mutex mutex_;
    Capabilities capabilities_;
    std::uint64_t calls_ = 0;
    std::uint64_t countdown_ = 0;  // 0: disarmed
    bool persistent_ = false;
    bool struck_ = false;
    std::optional<DriverCall> kind_;
    StatusCode code_ = StatusCode::failed;
    bool holding_ = false;
    std::set<std::uint64_t> held_;
    std::set<std::uint64_t> live_;
    std::set<std::uintptr_t> capturing_;
};

}  // namespace elastikv
