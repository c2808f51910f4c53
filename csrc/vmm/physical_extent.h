// One physical allocation.
#pragma once

#include <memory>

#include "base/unique_fd.h"
#include "driver/metered_driver.h"
#include "vmm/former_place.h"

namespace elastikv {

// Owns a driver handle. Shared, as one extent may be mapped at several addresses. Not thread safe where released by
// hand.
class PhysicalExtent {
  public:
    static Result<std::shared_ptr<PhysicalExtent>> try_create(MeteredDriverPtr driver, Bytes size);
    // In host memory that the device reaches; see VmmDriver::create_on_host.
    static Result<std::shared_ptr<PhysicalExtent>> try_create_on_host(MeteredDriverPtr driver, Bytes size);
    // What another process, or another driver, has exported; `fd` stays the caller's.
    static Result<std::shared_ptr<PhysicalExtent>> try_import(MeteredDriverPtr driver, int fd, Bytes size);
    // Releases what try_release has not; a refusal is counted as abandoned bytes.
    ~PhysicalExtent();
    PhysicalExtent(const PhysicalExtent&) = delete;
    PhysicalExtent& operator=(const PhysicalExtent&) = delete;

    // After ok the object is empty; after a failure it still owns the memory. Its former place ends first.
    Status try_release() noexcept;
    // Gives the handle up without releasing it, and counts it as abandoned. For an owner whose ledger keeps it charged.
    void abandon() noexcept;
    // From now on `driver`, which is over the same one as its own, accounts for it: as received here, released there.
    void pass_to(MeteredDriverPtr driver) noexcept;

    // Where it was mapped before it changed hands, and may be yet; null where it did not.
    const std::shared_ptr<FormerPlace>& former_place() const noexcept { return former_place_; }
    // For one that has none, or whose last one has ended.
    void set_former_place(std::shared_ptr<FormerPlace> place) noexcept { former_place_ = std::move(place); }
    Status try_end_former_place() noexcept;

    Result<UniqueFd> try_export() const noexcept;

    ExtentHandle handle() const { return handle_; }
    Bytes size() const { return size_; }

  private:
    PhysicalExtent(MeteredDriverPtr driver, ExtentHandle handle, Bytes size);

    MeteredDriverPtr driver_;
    ExtentHandle handle_;
    Bytes size_;
    bool owned_ = true;
    std::shared_ptr<FormerPlace> former_place_;
    bool counted_ = true;  // as the device's memory that was created, and is released
};

}  // namespace elastikv
