// Memory of another process, mapped here.
#pragma once

#include <memory>
#include <vector>

#include "base/error.h"
#include "vmm/mapping.h"

namespace elastikv {

// Extents that were exported elsewhere, mapped behind each other at addresses of its own. Thread safe: it never
// changes.
class ImportedMemory {
  public:
    struct Part {
        UniqueFd fd;
        Bytes size = 0;
    };
    // Needs the descriptors only while it runs. Throws InvalidArgument (no parts), OutOfVirtualMemory, CudaError,
    // MappingFailed, DeviceUnavailable; all or nothing.
    ImportedMemory(DriverPtr driver, const std::vector<Part>& parts, Access access = Access::read_write);
    // Waits for the device's work, which may use the memory, and unmaps. Where it can't wait, as a stream is capturing
    // a graph, the memory stays mapped until a later one can.
    ~ImportedMemory();
    ImportedMemory(const ImportedMemory&) = delete;
    ImportedMemory& operator=(const ImportedMemory&) = delete;

    Address base() const { return range_->base(); }
    Bytes size() const { return range_->size(); }
    const Capabilities& device() const { return driver_->capabilities(); }

  private:
    MeteredDriverPtr driver_;
    std::shared_ptr<AddressRange> range_;
    std::vector<std::unique_ptr<Mapping>> mappings_;
};

}  // namespace elastikv
