#include "vmm/physical_extent.h"

#include <utility>

namespace elastikv {

Result<std::shared_ptr<PhysicalExtent>> PhysicalExtent::try_create(MeteredDriverPtr driver, Bytes size) {
    ExtentHandle handle;
    const Status status = driver->create(size, handle);
    if (!status.ok()) return status;
    driver->note_created(size);
    return std::shared_ptr<PhysicalExtent>(new PhysicalExtent(std::move(driver), handle, size));
}

Result<std::shared_ptr<PhysicalExtent>> PhysicalExtent::try_create_on_host(MeteredDriverPtr driver, Bytes size) {
    ExtentHandle handle;
    const Status status = driver->create_on_host(size, handle);
    if (!status.ok()) return status;
    auto extent = std::shared_ptr<PhysicalExtent>(new PhysicalExtent(std::move(driver), handle, size));
    extent->counted_ = false;
    return extent;
}

Result<std::shared_ptr<PhysicalExtent>> PhysicalExtent::try_import(MeteredDriverPtr driver, int fd, Bytes size) {
    ExtentHandle handle;
    const Status status = driver->import_fd(fd, size, handle);
    if (!status.ok()) return status;
    auto extent = std::shared_ptr<PhysicalExtent>(new PhysicalExtent(std::move(driver), handle, size));
    extent->counted_ = false;
    return extent;
}

PhysicalExtent::PhysicalExtent(MeteredDriverPtr driver, ExtentHandle handle, Bytes size)
    : driver_(std::move(driver)), handle_(handle), size_(size) {}

PhysicalExtent::~PhysicalExtent() {
    if (!try_release().ok()) abandon();
}

Status PhysicalExtent::try_release() noexcept {
    if (!owned_) return Status::success();
    Status status = try_end_former_place();
    if (status.ok()) status = driver_->release(handle_);
    if (!status.ok()) return status;
    owned_ = false;
    if (counted_) driver_->note_released(size_);
    return status;
}

Status PhysicalExtent::try_end_former_place() noexcept {
    if (!former_place_) return Status::success();
    const Status status = former_place_->try_end();
    if (status.ok()) former_place_.reset();
    return status;
}

Result<UniqueFd> PhysicalExtent::try_export() const noexcept {
    int fd = -1;
    const Status status = driver_->export_fd(handle_, fd);
    if (!status.ok()) return status;
    return UniqueFd(fd);
}

void PhysicalExtent::pass_to(MeteredDriverPtr driver) noexcept {
    driver_->note_released(size_);
    driver->note_created(size_);
    driver->note_received(size_);
    driver_ = std::move(driver);
}

void PhysicalExtent::abandon() noexcept {
    if (owned_) driver_->abandon(size_);
    owned_ = false;
}

}  // namespace elastikv
