#include "torch/out_of_memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

namespace elastikv::torch {
namespace {

using c10::CachingAllocator::format_size;

}  // namespace

OutOfMemoryReport report_for(const Heap& heap, Bytes requested) {
    OutOfMemoryReport report;
    const VirtualMemoryPool& pool = *heap.shared_pool();
    const Capabilities& device = pool.device();
    const HeapStats stats = heap.stats();
    report.requested = requested;
    report.device = device.kind == DeviceKind::host ? "CPU" : "GPU " + std::to_string(device.index);
    report.allocated = static_cast<Bytes>(stats.allocated_bytes.of[0].current);
    report.reserved = static_cast<Bytes>(stats.reserved_bytes.of[0].current);
    for (const SegmentView& segment : heap.snapshot()) {
        if (!segment.arena.common()) report.in_private_pools += segment.size;
    }
    if (const auto& budget = pool.budget()) report.holders = budget->describe_holders();
    return report;
}

std::string out_of_memory_message(const OutOfMemoryReport& report) {
    std::string text = report.device == "CPU" ? "CPU" : "CUDA";
    text += " out of memory. Tried to allocate " + format_size(report.requested) + ". ";
    if (report.memory) {
        text += report.device + " has a total capacity of " + format_size(report.memory->total) + " of which " +
                format_size(report.memory->free) + " is free. ";
    }
    if (report.allowed) text += format_size(*report.allowed) + " allowed; ";
    text += "Of the memory held by PyTorch, " + format_size(report.allocated) + " is allocated, ";
    if (report.in_private_pools > 0) {
        text += format_size(report.in_private_pools) + " is held by private pools (e.g., CUDA Graphs), ";
    }
    text += "and " + format_size(report.reserved - report.allocated) + " is reserved by PyTorch but unallocated.";
    if (!report.holders.empty()) text += " " + report.holders + ".";
    return text;
}

void throw_out_of_memory(const OutOfMemoryReport& report) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, out_of_memory_message(report));
    std::abort();  // never reached
}

}  // namespace elastikv::torch
