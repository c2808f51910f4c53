// VirtualMemoryPool: extents in the hands of other processes and other devices.
#include "pool/virtual_memory_pool.h"

namespace elastikv {

std::vector<ExportedExtent> VirtualMemoryPool::export_extents(Bytes offset, Bytes size) {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    std::unique_lock lock(mutex_);
    require_open();
    clear_unparkable(lock, idle_places_of(bytes));
    require_awake(bytes);
    if (!table_.is_used(bytes)) throw NotMapped(bytes, table_.live().first_gap(bytes));
    table_.for_each_extent(table_.pages_of(bytes), [](const Extent& extent) {
        if (extent.spilled) {
            throw InvalidArgument("the extent at offset " + std::to_string(extent.range.begin) +
                                  " is spilled, so it can't be exported; unspill() comes first");
        }
        if (!extent.shared()) return;
        throw InvalidArgument("the extent at offset " + std::to_string(extent.range.begin) +
                              " is shared with another range, so it can't be exported; make_writable() comes first");
    });
    std::vector<ExportedExtent> exported;
    table_.for_each_extent(table_.pages_of(bytes), [&](Extent& extent) {
        auto fd = extent.mapping->extent().try_export();
        if (!fd.ok())
            throw CudaError(fd.status(), "exporting the extent at offset " + std::to_string(extent.range.begin));
        exported.push_back({extent.range, std::move(fd.value())});
    });
    table_.for_each_extent(table_.pages_of(bytes), [](Extent& extent) { extent.exported = true; });
    return exported;
}

void VirtualMemoryPool::allow_peer(int device) {
    process_.require_same_process();
    std::unique_lock lock(mutex_);
    wait_until_still(lock);  // or it would miss what a resume is making
    require_open();
    const Status allowed = driver_->allow_peer(device);
    if (!allowed.ok()) {
        throw CudaError(allowed, "allowing device " + std::to_string(device) + " to use the memory of " +
                                     device_name(driver_->capabilities()));
    }
    std::string refused;
    Status last;
    table_.for_each_extent({0, capacity()}, [&](Extent& extent) {
        if (!extent.mapping->accessible()) return;  // gets it together with its own device's
        const Status status = extent.mapping->try_widen_access();
        if (status.ok()) return;
        last = status;
        refused += (refused.empty() ? "" : ", ") +
                   ("[" + std::to_string(extent.range.begin) + ", " + std::to_string(extent.range.end) + ")");
    });
    if (refused.empty()) return;
    throw CudaError(last, "device " + std::to_string(device) + " may use the memory of this pool, but for " + refused +
                              ", which calling again tries anew");
}

}  // namespace elastikv
