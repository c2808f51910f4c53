// Where an extent was mapped before it changed hands.
#pragma once

#include <memory>
#include <mutex>

#include "driver/fork_guard.h"
#include "vmm/address_range.h"

namespace elastikv {

// Unmapping costs as much as mapping, and whoever gets an extent from another pool need not wait for it: the extent is
// mapped at both places until the old one is ended. Nothing there may be touched meanwhile: it lies beneath no
// allocation of its pool. Whoever needs it gone ends it first: its pool, to map anything else there, and the extent,
// before it is released or changes hands again. Thread safe.
class FormerPlace {
  public:
    // Mapped at [address, address + size) of the range.
    FormerPlace(std::shared_ptr<AddressRange> range, Address address, Bytes size)
        : address_(address), size_(size), range_(std::move(range)) {}

    // What is still mapped then is the range's.
    ~FormerPlace();
    FormerPlace(const FormerPlace&) = delete;
    FormerPlace& operator=(const FormerPlace&) = delete;

    // Unmaps, unless that was done before. After a failure it is still mapped. In a forked child always a failure.
    Status try_end() noexcept;
    bool overlaps(Address address, Bytes size) const {
        return ByteRange{address_, address_ + size_}.overlaps({address, address + size});
    }

  private:
    const Address address_;
    const Bytes size_;
    const ProcessGuard process_;
    std::mutex mutex_;                     // guards what follows, also during the driver's call
    std::shared_ptr<AddressRange> range_;  // null once it has ended
};

}  // namespace elastikv
