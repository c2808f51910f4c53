// A reservation of addresses.
#pragma once

#include <memory>

#include "driver/metered_driver.h"

namespace elastikv {

// Owns the reservation and gives it back when the last holder (a pool, a Mapping) is gone. Immutable, so thread safe.
class AddressRange {
  public:
    static Result<std::shared_ptr<AddressRange>> try_reserve(MeteredDriverPtr driver, Bytes size, Bytes alignment);
    ~AddressRange();
    AddressRange(const AddressRange&) = delete;
    AddressRange& operator=(const AddressRange&) = delete;

    Address base() const { return base_; }
    Bytes size() const { return size_; }
    VmmDriver& driver() const { return *driver_; }

  private:
    AddressRange(MeteredDriverPtr driver, Address base, Bytes size);

    MeteredDriverPtr driver_;
    Address base_;
    Bytes size_;
};

}  // namespace elastikv
