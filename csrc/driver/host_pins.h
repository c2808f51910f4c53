// Memory of the process that stands for pinned memory where the host is the device.
#pragma once

#include <map>
#include <mutex>

#include "base/status.h"
#include "base/units.h"

namespace elastikv {

// Thread safe.
class HostPins {
  public:
    Status pin(Bytes size, Address& out) noexcept;
    Status unpin(Address address, Bytes size) noexcept;
    std::size_t count() const {
        const std::lock_guard lock(mutex_);
        return pinned_.size();
    }

  private:
    mutable std::mutex mutex_;
    std::map<Address, Bytes> pinned_;
};

}  // namespace elastikv
