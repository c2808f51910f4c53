// A driver that watches: how many bytes of physical memory exist and existed at most, and calls the test before each
// call.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>

#include "driver/forwarding_driver.h"

namespace elastikv::testing {

// Thread safe, if the hook is; it is set before use.
class WatchingDriver final : public ForwardingDriver {
  public:
    using ForwardingDriver::ForwardingDriver;

    std::function<void(DriverCall)> before;

    Bytes physical() const {
        const std::lock_guard lock(mutex_);
        return physical_;
    }
    Bytes peak() const {
        const std::lock_guard lock(mutex_);
        return peak_;
    }

    Status create(Bytes size, ExtentHandle& out) noexcept override {
        const Status status = ForwardingDriver::create(size, out);
        const std::lock_guard lock(mutex_);
        if (status.ok()) sizes_[out.value] = size;
        if (status.ok()) physical_ += size;
        peak_ = std::max(peak_, physical_);
        return status;
    }
    Status release(ExtentHandle handle) noexcept override {
        // Counted out before, as the driver beneath may hand the bytes to another thread at once.
        const std::lock_guard lock(mutex_);
        const Status status = ForwardingDriver::release(handle);
        if (status.ok()) physical_ -= sizes_[handle.value];
        if (status.ok()) sizes_.erase(handle.value);
        return status;
    }

  private:
    Status forward(DriverCall call, Forwarded& go) noexcept override {
        if (before) before(call);
        return go();
    }

    mutable std::mutex mutex_;
    std::map<std::uint64_t, Bytes> sizes_;
    Bytes physical_ = 0;
    Bytes peak_ = 0;
};

}  // namespace elastikv::testing
