// A reservation of addresses.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

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

    // The place, which is in this range, is ended before anything else is mapped there; until it has ended, neither the
    // place nor the range goes, whatever becomes of the extent. Throws std::bad_alloc.
    void remember(const std::shared_ptr<FormerPlace>& place);
    // Ends what former places there are in [address, address + size). After a failure some may be left.
    Status try_clear(Address address, Bytes size) noexcept;

  private:
    AddressRange(MeteredDriverPtr driver, Address base, Bytes size);

    MeteredDriverPtr driver_;
    Address base_;
    Bytes size_;
    std::mutex mutex_;  // held while places are ended
    std::vector<std::shared_ptr<FormerPlace>> former_places_;
};

}  // namespace elastikv
