// A part of a model's memory, for other processes to map.
#pragma once

#include <memory>
#include <string>

#include "shared/memory_handle.h"
#include "shared/model.h"

namespace elastikv {

// While it lives the range can be fetched by its handle. What was fetched stays with who has it, also after the model
// has freed the memory; it is charged to the model for as long as that holds it. Thread safe: it never changes.
class RangeExport {
  public:
    // Offsets count from the model's base_address(); every page of the range must be allocated. Throws InvalidSize,
    // InvalidOffset, NotMapped, CudaError where the device can't export, HandoffFailed.
    RangeExport(ModelPtr model, Bytes offset, Bytes size, bool read_only);

    const std::string& handle() const { return handle_; }
    Bytes size() const { return size_; }
    bool read_only() const { return read_only_; }

  private:
    const ModelPtr model_;
    const Bytes size_;
    const bool read_only_;
    FdBroker::Registration registration_;
    std::string handle_;
};

// Such a range in this process, at an address of its own; it sees what the others write. Copies share the memory, which
// is unmapped with the last, after the device's work.
struct ImportedRange {
    std::shared_ptr<ImportedMemory> memory;
    Bytes offset = 0;  // in the memory, which is of whole extents
    Bytes size = 0;
    bool read_only = false;  // what is written to it faults

    Address address() const { return memory->base() + offset; }
};

// Throws InvalidArgument (not a RangeExport's handle), HandoffFailed (its process is gone or has taken it back),
// OutOfVirtualMemory, CudaError, MappingFailed, DeviceUnavailable.
ImportedRange import_range(const std::string& handle);

}  // namespace elastikv
