// VirtualMemoryPool: giving back the idle pages of extents that are partly used.
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

Bytes VirtualMemoryPool::compact() {
    Bytes freed = reclaim(~Bytes{0}, true);
    // Moving a page that a kernel reads would be a fault, so the device finishes first.
    synchronize();
    const std::lock_guard lock(mutex_);
    require_open();
    settle_passed();
    restore_access();
    std::vector<Bytes> partly_idle;
    table_.for_each_extent({0, capacity()}, [&](const Extent& extent) {
        const bool moves =
            extent.used > 0 && extent.used < extent.range.size() && extent.retiring == 0 && !extent.exported;
        if (moves) partly_idle.push_back(extent.range.begin);
    });
    for (const Bytes begin : partly_idle) freed += try_retile(begin);
    return freed;
}

// Live pages that an earlier compaction could neither move nor put back, as the driver refused everything.
void VirtualMemoryPool::restore_access() {
    table_.for_each_extent({0, capacity()}, [](Extent& extent) {
        if (extent.used == 0) return;
        const Status status = extent.mapping->try_make_accessible();
        if (!status.ok()) throw MappingFailed(status, extent.range);
    });
}

// Returns the bytes freed; 0 where the budget or the driver did not allow it, and then nothing has changed.
Bytes VirtualMemoryPool::try_retile(Bytes begin) {
    Extent& old = *table_.find(begin);
    const ByteRange range = old.range;
    const Bytes used = old.used;
    std::vector<Extent> fresh;
    if (!try_copy_out(old, fresh) || !try_swap_in(old, fresh)) {
        // The place beneath is taken, so these can't be kept in the books as parked ones.
        for (Extent& extent : fresh) (void)try_give_up(std::move(extent));
        if (!old.mapping->accessible()) {
            throw MappingFailed("compaction failed and the driver refused to put the pages at offset " +
                                std::to_string(begin) + " back; they keep their content, and compact() tries again");
        }
        return 0;
    }
    Extent gone = table_.take(begin);
    for (Extent& extent : fresh) table_.insert(std::move(extent));
    const bool released = try_give_up(std::move(gone));
    note_peaks();
    return released ? range.size() - used : 0;
}

// Makes an extent for each run of live pages and copies their content, through addresses of its own.
bool VirtualMemoryPool::try_copy_out(const Extent& from, std::vector<Extent>& fresh) {
    IntervalSet runs;
    table_.live().for_each(from.range, [&](ByteRange part) { runs.add(table_.pages_of(part)); });
    bool fine = true;
    runs.for_each(from.range, [&](ByteRange run) {
        if (!fine) return;
        fine = false;
        if (budget_ && !budget_->try_charge(run.size())) return;
        auto physical = PhysicalExtent::try_create(driver_, run.size());
        if (!physical.ok()) {
            if (budget_) budget_->refund(run.size());
            return;
        }
        Extent extent;
        extent.range = run;
        extent.mapping = std::make_unique<Mapping>(range_, physical.value(), run.begin);
        fresh.push_back(std::move(extent));
        auto scratch = AddressRange::try_reserve(driver_, run.size(), page_size());
        if (!scratch.ok()) return;
        Mapping window(scratch.value(), physical.value(), 0);
        if (!window.try_make_accessible().ok()) return;
        const Status copied = driver_->copy(window.address(), base_address() + run.begin, run.size());
        // The copy must be over before the window closes, whether or not a fence can tell.
        wait_for_service_stream();
        fine = copied.ok() && (window.try_unmap().ok() || window.try_unmap().ok());
    });
    return fine;
}

// Puts the fresh extents in the place of the old one, or everything back.
bool VirtualMemoryPool::try_swap_in(Extent& old, std::vector<Extent>& fresh) {
    if (!old.mapping->try_unmap().ok()) return false;
    bool fine = true;
    for (Extent& extent : fresh) {
        fine = fine && extent.mapping->try_make_accessible().ok();
    }
    if (fine) return true;
    for (Extent& extent : fresh) {
        if (!extent.mapping->try_unmap().ok()) (void)extent.mapping->try_unmap();
    }
    if (old.mapping->try_map().ok() || old.mapping->try_map().ok()) {
        if (!old.mapping->try_set_access().ok()) (void)old.mapping->try_set_access();
    }
    return false;
}

}  // namespace elastikv
