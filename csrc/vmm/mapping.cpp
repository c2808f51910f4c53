#include "vmm/mapping.h"

#include <utility>

namespace elastikv {

Mapping::Mapping(std::shared_ptr<AddressRange> range, std::shared_ptr<PhysicalExtent> extent, Bytes offset)
    : range_(std::move(range)), extent_(std::move(extent)), offset_(offset) {}

// A refused unmap is counted as a failure by the meter; the extent is released all the same and its memory goes with
// the mapping when the process ends.
Mapping::~Mapping() { (void)try_unmap(); }

Status Mapping::try_map() noexcept {
    if (mapped_) return Status::success();
    Status status = range_->try_clear(address(), size());
    if (status.ok()) status = range_->driver().map(address(), size(), extent_->handle());
    if (status.ok()) mapped_ = true;
    return status;
}

Status Mapping::try_set_access(Access access) noexcept {
    if (accessible_) return Status::success();
    const Status status = range_->driver().set_access(address(), size(), access);
    if (status.ok()) accessible_ = true;
    return status;
}

Status Mapping::try_make_accessible() noexcept {
    const Status status = try_map();
    return status.ok() ? try_set_access() : status;
}

Status Mapping::try_unmap() noexcept {
    if (!mapped_) return Status::success();
    const Status status = range_->driver().unmap(address(), size());
    if (status.ok()) mapped_ = accessible_ = false;
    return status;
}

std::shared_ptr<FormerPlace> Mapping::make_former_place() const {
    if (!mapped_) return nullptr;
    auto place = std::make_shared<FormerPlace>(range_, address(), size());
    range_->remember(place);
    return place;
}

void Mapping::leave(std::shared_ptr<FormerPlace> place) noexcept {
    extent_->set_former_place(std::move(place));
    mapped_ = accessible_ = false;
}

Status Mapping::try_widen_access() noexcept { return range_->driver().set_access(address(), size()); }

}  // namespace elastikv
