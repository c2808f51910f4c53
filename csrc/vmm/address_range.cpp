#include "vmm/address_range.h"

#include <utility>

#include "vmm/former_place.h"

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

void AddressRange::remember(const std::shared_ptr<FormerPlace>& place) {
    const std::lock_guard lock(mutex_);
    if (former_places_.size() == former_places_.capacity()) {  // not each time, as there may be thousands
        std::erase_if(former_places_, [](const auto& each) { return each->has_ended(); });
    }
    former_places_.push_back(place);
}

Status AddressRange::try_clear(Address address, Bytes size) noexcept {
    Status status;
    const std::lock_guard lock(mutex_);
    std::erase_if(former_places_, [&](const std::shared_ptr<FormerPlace>& place) {
        if (place->has_ended()) return true;
        if (!status.ok() || !place->overlaps(address, size)) return false;
        status = place->try_end();
        return status.ok();
    });
    return status;
}

}  // namespace elastikv
