#include "base/error.h"

#include <array>
#include <cstdio>

namespace elastikv {
namespace {

std::string format_range(const ByteRange& range) {
    return "[" + std::to_string(range.begin) + ", " + std::to_string(range.end) + ")";
}

}  // namespace

std::string format_bytes(Bytes bytes) {
    std::string exact = std::to_string(bytes) + " bytes";
    if (bytes < KiB) return exact;
    static constexpr std::array units = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = static_cast<double>(bytes) / 1024.0;
    std::size_t unit = 0;
    while (value >= 1024.0 && unit + 1 < units.size()) {
        value /= 1024.0;
        ++unit;
    }
    std::array<char, 48> text{};
    std::snprintf(text.data(), text.size(), "%.4g %s", value, units[unit]);
    return std::string(text.data()) + " (" + exact + ")";
}

std::string describe(Status status) {
    std::string text = std::string(name_of(status.call)) + ": " + name_of(status.code);
    if (status.native != 0) text += " (driver code " + std::to_string(status.native) + ")";
    return text;
}

CudaError::CudaError(Status status_, const std::string& doing)
    : VmmError(doing + ": " + describe(status_)), status(status_) {}

MappingFailed::MappingFailed(Status status, ByteRange range)
    : VmmError("could not map " + format_range(range) + ": " + describe(status)) {}

UnmappingFailed::UnmappingFailed(Status status, ByteRange range)
    : VmmError("could not unmap " + format_range(range) + ": " + describe(status)) {}

OutOfVirtualMemory::OutOfVirtualMemory(Bytes requested_, const std::string& why)
    : VmmError("out of address space: asked for " + format_bytes(requested_) + ", " + why), requested(requested_) {}

OutOfPhysicalMemory::OutOfPhysicalMemory(Bytes requested_, Bytes available_, const std::string& who)
    : VmmError("out of physical memory: asked for " + format_bytes(requested_) + ", " + format_bytes(available_) +
               " available" + (who.empty() ? "" : ". " + who)),
      requested(requested_),
      available(available_) {}

InvalidOffset::InvalidOffset(Bytes offset_, Bytes size_, Bytes capacity_)
    : VmmError("offset " + std::to_string(offset_) + " with size " + std::to_string(size_) +
               " is outside the capacity of " + format_bytes(capacity_)),
      offset(offset_),
      size(size_),
      capacity(capacity_) {}

InvalidPageSize::InvalidPageSize(Bytes page_size, Bytes granularity)
    : VmmError("page size " + std::to_string(page_size) +
               " must be a power of two and a multiple of the device's granularity, " + format_bytes(granularity)) {}

AlreadyMapped::AlreadyMapped(ByteRange wanted, ByteRange held)
    : VmmError(format_range(wanted) + " overlaps " + format_range(held) + ", which is allocated already") {}

NotMapped::NotMapped(ByteRange wanted, Bytes first_hole)
    : VmmError(format_range(wanted) + " is not wholly allocated: byte " + std::to_string(first_hole) +
               " is free. Free what allocate() returned, once") {}

ModelNotFound::ModelNotFound(const std::string& id, const std::string& hint)
    : VmmError("no model is registered as '" + id + "'" + (hint.empty() ? "" : ". " + hint)) {}

ModelAlreadyExists::ModelAlreadyExists(const std::string& id)
    : VmmError("a model is registered as '" + id + "' already; unregister it first or choose another name") {}

}  // namespace elastikv
