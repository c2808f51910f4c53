// A reservation of addresses.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/units.h"
#include "driver/metered_driver.h"

namespace elastikv {

class FormerPlace;

// Owns the reservation and gives it back when the last holder (a pool, a Mapping, a FormerPlace) is gone. Thread safe.
class AddressRange {
  public:
    static Result<std::shared_ptr<AddressRange>> try_reserve(MeteredDriverPtr driver, Bytes size, Bytes alignment);
    ~AddressRange();
    AddressRange(const AddressRange&) = delete;
    AddressRange& operator=(const AddressRange&) = delete;

    Address base() const { return base_; }
    Bytes size() const { return size_; }
    VmmDriver& driver() const { return *driver_; }

    // The place, which is in this range, is ended before anything else is mapped there. Throws std::bad_alloc.
    void remember(const std::shared_ptr<FormerPlace>& place);
    // What a former place that is gone could not unmap: tried again before anything else is mapped there.
    void inherit(ByteRange mapped) noexcept;
    // Ends what former places there are in [address, address + size). After a failure some may be left.
    Status try_clear(Address address, Bytes size) noexcept;

  private:
    AddressRange(MeteredDriverPtr driver, Address base, Bytes size);

    MeteredDriverPtr driver_;
    Address base_;
    Bytes size_;
    std::recursive_mutex mutex_;  // held while places are ended, the last of which may leave something to inherit
    std::vector<std::weak_ptr<FormerPlace>> former_places_;
    std::vector<ByteRange> inherited_;
};

}  // namespace elastikv
