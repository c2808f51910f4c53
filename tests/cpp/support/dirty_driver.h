// A driver whose fresh memory is not zero, as a GPU's is: it holds what looks like another tenant's bytes.
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "driver/forwarding_driver.h"
#include "support/memory.h"

namespace elastikv::testing {

// Around a host driver. Thread safe.
class DirtyDriver final : public ForwardingDriver {
  public:
    static constexpr std::uint8_t dirt = 0xd1;

    explicit DirtyDriver(DriverPtr inner) : ForwardingDriver(std::move(inner)) {
        capabilities_ = ForwardingDriver::capabilities();
        capabilities_.fresh_is_zero = false;
    }

    const Capabilities& capabilities() const noexcept override { return capabilities_; }

    Status create(Bytes size, ExtentHandle& out) noexcept override {
        const Status status = ForwardingDriver::create(size, out);
        if (status.ok()) soil(size, out);
        return status;
    }

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }

    // Through addresses of its own, so that whoever created the memory finds it dirty wherever it maps it.
    void soil(Bytes size, ExtentHandle handle) noexcept {
        Address window = 0;
        if (!inner().reserve(size, 0, window).ok()) return;
        if (inner().map(window, size, handle).ok() && inner().set_access(window, size).ok()) {
            std::memset(host_pointer(window), dirt, size);
        }
        (void)inner().unmap(window, size);
        (void)inner().free_addresses(window, size);
    }

    Capabilities capabilities_;
};

}  // namespace elastikv::testing
