// VirtualMemoryPool: giving back the idle pages of extents that are partly used.
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

Bytes VirtualMemoryPool::compact() {
    Bytes freed = reclaim(~Bytes{0}, true);
    // Moving a page that a kernel reads would be a fault, so the device finishes first.
    synchronize();
    std::unique_lock lock(mutex_);
    wait_until_still(lock);
    require_open();
    settle_passed();
    restore_access();
    std::vector<Bytes> partly_idle;
    table_.for_each_extent({0, capacity()}, [&](const Extent& extent) {
        const bool moves = extent.used > 0 && extent.used < extent.range.size() && extent.retiring == 0 &&
                           !extent.exported && !extent.shared();
        if (moves) partly_idle.push_back(extent.range.begin);
    });
    for (const Bytes begin : partly_idle) (void)try_retile(begin, freed, table_.find(begin)->spilled);
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

// Adds the bytes freed to `freed`. Where the budget or the driver did not allow it nothing has changed, and the answer
// says why; a budget that is short reads as a create() without memory.
Status VirtualMemoryPool::try_retile(Bytes begin, Bytes& freed, bool on_host) {
    Extent& old = *table_.find(begin);
    const Bytes idle = old.range.size() - old.used;
    std::vector<Extent> fresh;
    Status status = try_copy_out(old, fresh, on_host);
    if (status.ok()) status = try_swap_in(old, fresh);
    if (!status.ok()) {
        // The place beneath is taken, so these can't be kept in the books as parked ones.
        for (Extent& extent : fresh) (void)try_give_up(std::move(extent));
        if (!old.mapping->accessible()) {
            throw MappingFailed("moving pages failed and the driver refused to put those at offset " +
                                std::to_string(begin) + " back; they keep their content, and compact() tries again");
        }
        return status;
    }
    const bool costs = old.cost() > 0;
    Extent gone = table_.take(begin);
    for (Extent& extent : fresh) table_.insert(std::move(extent));
    if (try_give_up(std::move(gone)) && costs) freed += idle;
    note_peaks();
    return status;
}

// Makes an extent for each run of live pages, in device or in host memory, and copies their content, through addresses
// of its own.
Status VirtualMemoryPool::try_copy_out(const Extent& from, std::vector<Extent>& fresh, bool on_host) {
    IntervalSet runs;
    table_.live().for_each(from.range, [&](ByteRange part) { runs.add(table_.pages_of(part)); });
    Status status;
    runs.for_each(from.range, [&](ByteRange run) {
        if (!status.ok()) return;
        if (!on_host && budget_ && !budget_->try_charge(run.size())) {
            status = {StatusCode::out_of_memory, DriverCall::create, 0};
            return;
        }
        auto physical = on_host ? PhysicalExtent::try_create_on_host(driver_, run.size())
                                : PhysicalExtent::try_create(driver_, run.size());
        if (!physical.ok()) {
            if (!on_host && budget_) budget_->refund(run.size());
            status = physical.status();
            return;
        }
        Extent extent;
        extent.range = run;
        extent.spilled = on_host;
        extent.fixed = from.fixed;
        extent.mapping = std::make_unique<Mapping>(range_, physical.value(), run.begin);
        fresh.push_back(std::move(extent));
        auto scratch = AddressRange::try_reserve(driver_, run.size(), page_size());
        status = scratch.status();
        if (!scratch.ok()) return;
        Mapping window(scratch.value(), physical.value(), 0);
        status = window.try_make_accessible();
        if (!status.ok()) return;
        status = driver_->copy(window.address(), base_address() + run.begin, run.size());
        // The copy must be over before the window closes, whether or not a fence can tell.
        wait_for_service_stream();
        const bool closed = window.try_unmap().ok() || window.try_unmap().ok();
        if (status.ok() && !closed) status = {StatusCode::failed, DriverCall::unmap, 0};
    });
    return status;
}

// Puts the fresh extents in the place of the old one, or everything back.
Status VirtualMemoryPool::try_swap_in(Extent& old, std::vector<Extent>& fresh) {
    Status status = old.mapping->try_unmap();
    if (!status.ok()) return status;
    for (Extent& extent : fresh) {
        if (status.ok()) status = extent.mapping->try_make_accessible();
    }
    if (status.ok()) return status;
    for (Extent& extent : fresh) {
        if (!extent.mapping->try_unmap().ok()) (void)extent.mapping->try_unmap();
    }
    if (old.mapping->try_map().ok() || old.mapping->try_map().ok()) {
        if (!old.mapping->try_set_access().ok()) (void)old.mapping->try_set_access();
    }
    return status;
}

}  // namespace elastikv
