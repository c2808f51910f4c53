#include "driver/warm_up.h"

namespace elastikv {
namespace {

void zero_once(VmmDriver& driver, Address address, Bytes size) noexcept {
    Fence fence;
    if (!driver.set_access(address, size).ok() || !driver.zero(address, size).ok()) return;
    if (!driver.record_fence(driver.service_stream(), fence).ok()) {
        (void)driver.synchronize();  // it is about to be unmapped
        return;
    }
    if (!driver.wait_fence(fence).ok()) (void)driver.synchronize();
    (void)driver.destroy_fence(fence);
}

}  // namespace

void warm_up(VmmDriver& driver) noexcept {
    const Bytes unit = driver.capabilities().granularity;
    ExtentHandle handle;
    Address address = 0;
    if (!driver.create(unit, handle).ok()) return;
    if (driver.reserve(unit, 0, address).ok()) {
        if (driver.map(address, unit, handle).ok()) {
            zero_once(driver, address, unit);
            if (!driver.unmap(address, unit).ok()) (void)driver.unmap(address, unit);
        }
        (void)driver.free_addresses(address, unit);
    }
    (void)driver.release(handle);
}

}  // namespace elastikv
