// An extent at an offset of a range.
#pragma once

#include <memory>

#include "vmm/address_range.h"
#include "vmm/physical_extent.h"

namespace elastikv {

// Holds both the range and the extent, so whatever is destroyed first, the order at the driver is unmap, release, free.
// The caller sees to it that no device work uses the addresses when a Mapping dies. Not thread safe.
class Mapping {
  public:
    // Maps nothing yet. `offset` is within the range and a multiple of the granularity.
    Mapping(std::shared_ptr<AddressRange> range, std::shared_ptr<PhysicalExtent> extent, Bytes offset);
    // Unmaps what try_unmap has not. A refusal leaves the memory mapped, and the extent's own release follows it.
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    // After a failure the addresses are as they were. The same holds for the others; try_make_accessible may leave them
    // mapped.
    Status try_map() noexcept;
    // For the device; nothing may be touched before.
    Status try_set_access(Access access = Access::read_write) noexcept;
    // Both, as far as they are lacking.
    Status try_make_accessible() noexcept;
    Status try_unmap() noexcept;
    // For an extent that goes to another owner: what it then leaves behind, to be given to leave(). Null where it is
    // not mapped. Throws std::bad_alloc.
    std::shared_ptr<FormerPlace> make_former_place() const;
    // From now on the place keeps the addresses, and the extent the place.
    void leave(std::shared_ptr<FormerPlace> place) noexcept;
    // Gives access to devices that were allowed since. Must be accessible.
    Status try_widen_access() noexcept;

    bool mapped() const { return mapped_; }
    bool accessible() const { return accessible_; }
    Address address() const { return range_->base() + offset_; }
    Bytes size() const { return extent_->size(); }
    PhysicalExtent& extent() { return *extent_; }
    const std::shared_ptr<PhysicalExtent>& shared_extent() const { return extent_; }

  private:
    std::shared_ptr<AddressRange> range_;
    std::shared_ptr<PhysicalExtent> extent_;
    Bytes offset_;
    bool mapped_ = false;
    bool accessible_ = false;
};

}  // namespace elastikv
