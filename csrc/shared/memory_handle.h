// Where memory that a process shares can be had, as a text that travels to another.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "shared/handoff.h"
#include "shared/imported_memory.h"

namespace elastikv {

struct MemoryHandle {
    std::string device;  // "cpu" or "cuda:N"
    HandoffAddress address;
    std::vector<Bytes> sizes;  // of the extents, in order
};

std::string write_memory_handle(const MemoryHandle& parts);
// Throws InvalidArgument: of another version, or damaged.
MemoryHandle read_memory_handle(const std::string& handle);
// Whether write_memory_handle made it, in any version.
bool is_memory_handle(const std::string& handle) noexcept;

// Fetches the descriptors and maps the extents. Throws HandoffFailed, and what ImportedMemory does.
std::shared_ptr<ImportedMemory> import_memory(const MemoryHandle& parts, Access access);

}  // namespace elastikv
