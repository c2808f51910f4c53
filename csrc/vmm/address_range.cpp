#include "vmm/address_range.h"

#include <utility>

namespace elastikv {

Result<std::shared_ptr<AddressRange>> AddressRange::try_reserve(MeteredDriverPtr driver, Bytes size, Bytes alignment) {
    Address base = 0;
    const Status status = driver->reserve(size, alignment, base);
    if (!status.ok()) return status;
    return std::shared_ptr<AddressRange>(new AddressRange(std::move(driver), base, size));
}

AddressRange::AddressRange(MeteredDriverPtr driver, Address base, Bytes size)
    : driver_(std::move(driver)), base_(base), size_(size) {}

AddressRange::~AddressRange() {
    const auto freed = [this] { return driver_->free_addresses(base_, size_).ok(); };
    if (freed() || freed()) return;  // NOLINT(misc-redundant-expression): tried twice, as no one else can try again
    driver_->abandon(size_);
}

}  // namespace elastikv
