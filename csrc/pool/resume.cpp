// VirtualMemoryPool: memory that wakes.
#include <algorithm>
#include <map>
#include <utility>

#include "base/events.h"
#include "pool/moving.h"

namespace elastikv {
namespace {

CudaError not_copied_back(const Status& status) {
    return CudaError(status, "copying what was paused back; its backup is kept");
}

}  // namespace

// Runs on their way back, before they are in the books.
struct VirtualMemoryPool::Waking {
    struct Item {
        DormantRun run;
        bool shares = false;  // lies on the memory of the item at `source`
        std::size_t source = 0;
        std::size_t extent = 0;  // of one that others may share: where in `fresh`
    };
    std::vector<Item> items;
    std::vector<Extent> fresh;
    std::vector<Extent> aliases;
    bool copying = false;
};

Bytes VirtualMemoryPool::resume(const std::vector<ByteRange>& parts, const WaitOptions* wait) {
    process_.require_same_process();
    Observed observed(EventKind::resume, options_.name);
    Bytes made = 0;
    Bytes lacking = try_with_room([&](HandOver&) { return try_resume(parts, nullptr, made); });
    while (lacking > 0) {
        if (wait == nullptr || !budget_) throw out_of_memory(lacking);
        const Bytes wanted = lacking;
        std::optional<Grant> grant = budget_->wait_for_room(wanted, *wait);
        if (!grant) throw out_of_memory(lacking);
        lacking = try_resume(parts, &*grant, made);
        // Idle pages that were counted on have gone back meanwhile.
        if (lacking > wanted) continue;
        // It is charged, so it is the device that lacks it.
        if (lacking > 0 && make_room(lacking, true) == 0) throw out_of_memory(lacking);
    }
    observed.done(made, physical_memory_usage());
    return made;
}

// Returns the bytes that were lacking, 0 where it succeeded.
Bytes VirtualMemoryPool::try_resume(const std::vector<ByteRange>& parts, Grant* grant, Bytes& made) {
    std::unique_lock lock(mutex_);
    const Moving moving(*this, lock);
    require_open();
    Waking waking;
    Bytes reached = 0;
    for (const ByteRange& part : parts) {
        checked_range(part.begin, part.size());
        for (DormantRun& run : dormant_.runs_in(part)) {
            if (run.pages.begin < reached) continue;
            reached = run.pages.end;
            waking.items.push_back({std::move(run)});
        }
    }
    const Bytes before = table_.totals().physical();
    try {
        if (const Bytes lacking = try_make(waking, grant); lacking > 0) {
            undo(waking);
            return lacking;
        }
        if (const Status status = try_wait_until_filled(lock, waking); !status.ok()) throw not_copied_back(status);
    } catch (...) {
        undo(waking);
        throw;
    }
    for (const Waking::Item& item : waking.items) {
        if (!item.run.backup->kept()) continue;
        for (Extent& extent : waking.fresh) {
            if (item.run.pages.contains(extent.range)) extent.clean = {};
        }
        table_.for_each_extent(item.run.pages, [](Extent& extent) { extent.clean = {}; });
    }
    for (std::vector<Extent>* const extents : {&waking.fresh, &waking.aliases}) {
        for (Extent& extent : *extents) {
            extent.foreign = false;
            table_.insert(std::move(extent));
        }
    }
    for (const Waking::Item& item : waking.items) {
        dormant_.live().for_each(item.run.pages, [&](ByteRange live) { table_.claim(live); });
        dormant_.drop(item.run.pages);
    }
    for (const ByteRange& part : parts) dormant_.wake(part);
    note_sleep();
    note_peaks();
    made = table_.totals().physical() - before;
    return 0;
}

// Memory for all runs, mapped and about to be filled; or the bytes that were lacking, and then the caller undoes it.
// Each run's copies begin before the next one's memory is made, so that the driver's calls cost no time of their own.
Bytes VirtualMemoryPool::try_make(Waking& waking, Grant* grant) {
    Bytes missing = 0;
    std::map<const Backup*, std::size_t> first;
    for (std::size_t i = 0; i < waking.items.size(); ++i) {
        Waking::Item& item = waking.items[i];
        const std::vector<ByteRange> gaps = table_.gaps(item.run.pages);
        if (gaps.size() == 1 && gaps.front() == item.run.pages) {
            const auto [found, is_first] = first.emplace(item.run.backup.get(), i);
            item.shares = !is_first;
            item.source = found->second;
        }
        if (item.shares) continue;
        for (const ByteRange& gap : gaps) missing += gap.size();
    }
    std::optional<Grant> charged;
    if (budget_ && grant == nullptr && missing > 0) {
        if (!budget_->try_charge(missing)) return missing;
        grant = &charged.emplace(*budget_, missing);
    }
    for (Waking::Item& item : waking.items) {
        if (item.shares) continue;
        item.extent = waking.fresh.size();
        Status status;
        for (const ByteRange& gap : table_.gaps(item.run.pages)) {
            if (!try_charge(gap.size(), grant)) status = {StatusCode::out_of_memory, DriverCall::create, 0};
            const bool clean = !item.run.backup->kept() && options_.scrub_fresh;
            if (status.ok()) status = try_make_extent(gap, clean, waking.fresh);
            if (!status.ok()) break;
            waking.fresh.back().fixed = item.run.fixed;
        }
        table_.for_each_extent(item.run.pages, [&](Extent& kept) {  // that could not be given back
            if (status.ok()) status = kept.mapping->try_make_accessible();
        });
        if (status.ok()) status = try_copy_back(waking, item.run);
        if (status.ok()) continue;
        if (status.code == StatusCode::out_of_memory && status.call == DriverCall::create) return missing;
        if (status.call == DriverCall::create) throw CudaError(status, "making memory for what was paused");
        if (status.call == DriverCall::transfer) throw not_copied_back(status);
        throw MappingFailed(status, item.run.pages);
    }
    bool zeroed = false;
    if (const Status status = try_scrub(waking.fresh, zeroed); !status.ok()) {
        throw CudaError(status, "scrubbing memory for what was paused");
    }
    map_shared(waking);
    return 0;
}

void VirtualMemoryPool::map_shared(Waking& waking) {
    for (const Waking::Item& item : waking.items) {
        if (!item.shares) continue;
        Extent& source = waking.fresh[waking.items[item.source].extent];
        // Both are counted when they come into the books.
        if (!source.places) source.places = std::make_shared<Places>();
        Extent alias;
        alias.range = item.run.pages;
        alias.fixed = item.run.fixed;
        alias.places = source.places;
        alias.mapping = std::make_unique<Mapping>(range_, source.mapping->shared_extent(), alias.range.begin);
        const Status status = alias.mapping->try_make_accessible();
        waking.aliases.push_back(std::move(alias));
        if (!status.ok()) throw MappingFailed(status, item.run.pages);
    }
}

Status VirtualMemoryPool::try_copy_back(Waking& waking, const DormantRun& run) noexcept {
    Address to = base_address() + run.pages.begin;
    for (const Backup::Piece& piece : run.backup->pieces) {
        waking.copying = true;
        const Status status = driver_->transfer(to, piece.buffer->address() + piece.offset, piece.size);
        if (!status.ok()) return status;
        to += piece.size;
    }
    return Status::success();
}

Status VirtualMemoryPool::try_wait_until_filled(std::unique_lock<std::mutex>& lock, Waking& waking) noexcept {
    const bool scrubbing =
        options_.scrub_fresh && std::any_of(waking.fresh.begin(), waking.fresh.end(),
                                            [](const Extent& extent) { return !extent.clean.empty(); });
    if (!waking.copying && !scrubbing) return Status::success();
    // Extents that neighbours kept: these may leave them while the lock is not held.
    const auto hold = [&](bool held) {
        for (const Waking::Item& item : waking.items) {
            table_.for_each_extent(item.run.pages, [&](Extent& extent) { extent.waking = held; });
        }
    };
    hold(true);
    const Status status = try_wait_for_copies(lock, scrubbing);
    hold(false);
    if (status.ok()) waking.copying = false;
    return status;
}

void VirtualMemoryPool::undo(Waking& waking) noexcept {
    if (waking.copying) (void)driver_->synchronize();
    waking.copying = false;
    for (Extent& extent : waking.aliases) discard(std::move(extent));
    waking.aliases.clear();
    for (Extent& extent : waking.fresh) {
        if (extent.places && extent.places->count == 0) extent.places.reset();  // nobody else has it
    }
    undo(waking.fresh);
}

}  // namespace elastikv
