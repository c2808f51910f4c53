#include "torch/heap_errors.h"

#include "torch/out_of_memory.h"

namespace elastikv::torch {
namespace {

[[noreturn]] void report(const Heap& heap, Bytes requested) {
    OutOfMemoryReport report = report_for(heap, requested);
    const HeapOptions options = heap.options();
    if (options.limit != HeapOptions{}.limit) report.allowed = options.limit;
    const DriverPtr driver = driver_for(device_name(heap.shared_pool()->device()));
    if (MemoryInfo memory; driver->memory_info(memory).ok()) report.memory = memory;
    throw_out_of_memory(report);
}

}  // namespace

void rethrow_for_torch(const Heap& heap, Bytes requested) {
    try {
        throw;
    } catch (const OutOfPhysicalMemory&) {
        report(heap, requested);
    } catch (const OutOfVirtualMemory&) {
        report(heap, requested);
    }
}

}  // namespace elastikv::torch
