#include "vmm/address_range.h"

#include <new>
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
    for (const ByteRange& mapped : inherited_) (void)driver_->unmap(mapped.begin, mapped.size());
    const auto freed = [this] { return driver_->free_addresses(base_, size_).ok(); };
    if (freed() || freed()) return;  // NOLINT(misc-redundant-expression): tried twice, as no one else can try again
    driver_->abandon(size_);
}

void AddressRange::remember(const std::shared_ptr<FormerPlace>& place) {
    const std::lock_guard lock(mutex_);
    if (former_places_.size() == former_places_.capacity()) {  // not each time, as there may be thousands
        std::erase_if(former_places_, [](const auto& each) { return each.expired(); });
    }
    former_places_.push_back(place);
}

void AddressRange::inherit(ByteRange mapped) noexcept {
    const std::lock_guard lock(mutex_);
    try {
        inherited_.push_back(mapped);
    } catch (const std::bad_alloc&) {  // NOLINT(bugprone-empty-catch): it stays mapped; the driver refuses the place
    }
}

Status AddressRange::try_clear(Address address, Bytes size) noexcept {
    Status status;
    const std::lock_guard lock(mutex_);
    std::erase_if(former_places_, [&](const std::weak_ptr<FormerPlace>& each) {
        const auto place = each.lock();
        if (!place) return true;
        if (!status.ok() || !place->overlaps(address, size)) return false;
        status = place->try_end();
        return status.ok();
    });
    std::erase_if(inherited_, [&](const ByteRange& mapped) {
        if (!status.ok() || !mapped.overlaps({address, address + size})) return false;
        status = driver_->unmap(mapped.begin, mapped.size());
        return status.ok();
    });
    return status;
}

}  // namespace elastikv
