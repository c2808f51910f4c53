// Out of memory in torch's words: what was asked, what the device has, who holds what, and what would help.
#pragma once

#include <optional>
#include <string>

#include "base/units.h"
#include "driver/vmm_driver.h"
#include "heap/heap.h"

namespace elastikv::torch {

struct OutOfMemoryReport {
    Bytes requested = 0;
    std::string device;                // "GPU 0" or "CPU"
    std::optional<MemoryInfo> memory;  // the device's; none: unknown
    std::optional<Bytes> allowed;      // the memory fraction
    Bytes allocated = 0;               // of the heap: handed out
    Bytes reserved = 0;                // and held in all
    Bytes in_private_pools = 0;        // of what is held
    std::string holders;               // Budget::describe_holders()
};

// What the heap knows by itself; `memory` and `allowed` are the caller's.
OutOfMemoryReport report_for(const Heap& heap, Bytes requested);

// "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ..."
std::string out_of_memory_message(const OutOfMemoryReport& report);

// Throws c10::OutOfMemoryError, which is torch.OutOfMemoryError in Python.
[[noreturn]] void throw_out_of_memory(const OutOfMemoryReport& report);

}  // namespace elastikv::torch
