#include "vmm/physical_extent.h"

#include <utility>

namespace elastikv {

Result<std::shared_ptr<PhysicalExtent>> PhysicalExtent::try_create(MeteredDriverPtr driver, Bytes size) {
    ExtentHandle handle;
    const Status status = driver->create(size, handle);
    if (!status.ok()) return status;
    return std::shared_ptr<PhysicalExtent>(new PhysicalExtent(std::move(driver), handle, size));
}

PhysicalExtent::PhysicalExtent(MeteredDriverPtr driver, ExtentHandle handle, Bytes size)
    : driver_(std::move(driver)), handle_(handle), size_(size) {}

PhysicalExtent::~PhysicalExtent() {
    if (!try_release().ok()) abandon();
}

Status PhysicalExtent::try_release() noexcept {
    if (!owned_) return Status::success();
    const Status status = driver_->release(handle_);
    if (status.ok()) owned_ = false;
    return status;
}

void PhysicalExtent::abandon() noexcept {
    if (owned_) driver_->abandon(size_);
    owned_ = false;
}

}  // namespace elastikv
