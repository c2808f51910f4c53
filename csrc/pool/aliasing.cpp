// VirtualMemoryPool: the same physical memory at several places.
//
// An extent that is mapped at several places is charged once, and lives until the last place is given back; each place
// retires by itself, so the memory waits for the fences of everyone who used it. None of the places may be written,
// which only their owners can see to: before a write they ask for a copy of their own, by make_writable(). Idle pages
// of such a place are not handed out; an idle place is unmapped at once and not parked. compact() leaves shared extents
// where they are, export_extents() refuses them, and exported ones are copied where they would be shared.
#include <algorithm>
#include <set>
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

void VirtualMemoryPool::alias(Bytes to, Bytes from, Bytes size, Bytes shared, const AllocateOptions& options) {
    const Bytes lacking = try_with_room([&](HandOver&) { return try_alias(to, from, size, shared, options); });
    if (lacking > 0) throw out_of_memory(lacking);
}

Bytes VirtualMemoryPool::try_alias(Bytes to, Bytes from, Bytes size, Bytes shared, AllocateOptions options) {
    process_.require_same_process();
    AliasPlan plan;
    plan.target = checked_range(to, size);
    plan.shift = to - from;
    const ByteRange source = checked_range(from, size);
    if (plan.target.overlaps(source)) {
        throw InvalidArgument("offsets [" + std::to_string(to) + ", " + std::to_string(plan.target.end) +
                              ") can't alias bytes of themselves, from " + std::to_string(from) + " on");
    }
    if (to % page_size() != from % page_size()) {
        throw InvalidAlignment("offset " + std::to_string(to) + " can't alias offset " + std::to_string(from) +
                               ": they must lie at the same place of a page of " + format_bytes(page_size()));
    }
    options.open_ended = false;
    std::unique_lock lock(mutex_);
    require_open();
    clear_unparkable(lock, {&plan.target, 1});
    require_awake(plan.target);
    require_awake(source);
    const Bytes gap = table_.live().first_gap(source);
    if (gap != source.end) throw NotMapped(source, gap);
    if (const auto held = table_.live().first_overlap(plan.target)) throw AlreadyMapped(plan.target, *held);
    make_plan(plan, source, {source.begin, source.begin + std::min(shared, size)});
    return carry_out(plan, options);
}

// Which extents of the source can be mapped at the target, and which of its bytes are to be copied.
void VirtualMemoryPool::make_plan(AliasPlan& plan, ByteRange source, ByteRange shared) {
    table_.for_each_extent(table_.pages_of(source), [&](Extent& extent) {
        const ByteRange place{extent.range.begin + plan.shift, extent.range.end + plan.shift};
        if (shared.contains(extent.range) && !extent.exported && !extent.spilled && try_vacate(place)) {
            plan.whole.push_back(&extent);
        } else {
            const ByteRange part = extent.range.clipped_to(source);
            plan.copied.add({part.begin + plan.shift, part.end + plan.shift});
        }
    });
}

// Gives back the idle extents that lie in the way. False where others than idle ones do.
bool VirtualMemoryPool::try_vacate(ByteRange place) {
    std::vector<Bytes> in_the_way;
    bool idle = true;
    table_.for_each_extent(place, [&](const Extent& extent) {
        idle = idle && extent.idle();
        in_the_way.push_back(extent.range.begin);
    });
    if (!idle) return false;
    return std::all_of(in_the_way.begin(), in_the_way.end(),
                       [this](Bytes begin) { return try_give_back(*table_.find(begin)).has_value(); });
}

Bytes VirtualMemoryPool::carry_out(const AliasPlan& plan, const AllocateOptions& options) {
    const ByteRange everywhere{0, capacity()};
    std::vector<Extent> fresh, aliases;
    std::vector<Extent*> scrubbed;
    bool busy = false;  // the service stream may touch what an undo would unmap
    try {
        Bytes lacking = 0;
        plan.copied.for_each(everywhere, [&](ByteRange part) {
            if (lacking == 0) lacking = try_fill_gaps(table_.pages_of(part), options, fresh);
        });
        if (lacking > 0) {
            undo(fresh);
            return lacking;
        }
        const Status made = try_scrub(fresh, busy);
        if (!made.ok()) throw CudaError(made, "scrubbing new memory");
        plan.copied.for_each(everywhere, [&](ByteRange part) {
            order_after_earlier_users(part, options.stream);
            prepare_kept_extents(part, options, busy, scrubbed);
        });
        for (Extent* const source : plan.whole) map_alias(*source, plan.shift, options.stream, aliases);
        if (!plan.copied.empty()) copy_parts(plan, options.stream, fresh, busy);
    } catch (...) {
        if (busy) wait_for_service_stream();
        for (Extent& extent : aliases) discard(std::move(extent));
        undo(fresh);
        throw;
    }
    for (Extent* extent : scrubbed) {
        if (extent->foreign) extent->clean = extent->range;
        extent->foreign = false;
    }
    for (std::vector<Extent>* made : {&fresh, &aliases}) {
        for (Extent& extent : *made) {
            if (extent.zeroing) scrubbing_.emplace_back(extent.range.begin, extent.zeroing);
            table_.insert(std::move(extent));
        }
    }
    table_.claim(plan.target);
    note_peaks();
    if (!former_places_.empty()) worker_.wake();
    return 0;
}

void VirtualMemoryPool::map_alias(Extent& source, Bytes shift, Stream stream, std::vector<Extent>& aliases) {
    Extent alias;
    alias.range = {source.range.begin + shift, source.range.end + shift};
    alias.mapping = std::make_unique<Mapping>(range_, source.mapping->shared_extent(), alias.range.begin);
    alias.places = table_.places_of(source);
    alias.zeroing = source.zeroing;
    Status status = alias.mapping->try_make_accessible();
    if (status.ok() && alias.zeroing && driver_->capabilities().asynchronous) status = alias.zeroing->try_order(stream);
    const ByteRange place = alias.range;
    aliases.push_back(std::move(alias));
    if (!status.ok()) throw MappingFailed(status, place);
}

// On the service stream: after what `stream` did so far, before what it does next, and before anything that the copies
// touch is given back.
void VirtualMemoryPool::copy_parts(const AliasPlan& plan, Stream stream, std::vector<Extent>& fresh, bool& busy) {
    const bool asynchronous = driver_->capabilities().asynchronous;
    const auto require = [](Status status, const char* doing) {
        if (!status.ok()) throw CudaError(status, doing);
    };
    if (asynchronous) {
        auto written = RecordedFence::try_record(driver_, stream);
        if (written.status().code == StatusCode::capturing) {
            throw InvalidArgument("a stream that captures a graph can't have memory copied for it; do so before");
        }
        require(written.status(), "recording the end of the source's writes");
        require(written.value()->try_order(driver_->service_stream()), "ordering a copy after the source's writes");
    }
    plan.copied.for_each({0, capacity()}, [&](ByteRange part) {
        order_after_earlier_users(part, driver_->service_stream());
        busy = true;
        const Address to = base_address() + part.begin;
        require(driver_->copy(to, to - plan.shift, part.size()), "copying what can't be shared");
    });
    if (!asynchronous) return;
    auto copied = RecordedFence::try_record(driver_, driver_->service_stream());
    require(copied.status(), "recording the end of a copy");
    require(copied.value()->try_order(stream), "ordering the stream after a copy");
    for (Extent& extent : fresh) extent.zeroing = copied.value();
    const auto hold = [&](Extent& extent) {
        extent.zeroing = copied.value();
        scrubbing_.emplace_back(extent.range.begin, extent.zeroing);
    };
    plan.copied.for_each({0, capacity()}, [&](ByteRange part) {
        table_.for_each_extent(table_.pages_of(part), hold);
        table_.for_each_extent(table_.pages_of({part.begin - plan.shift, part.end - plan.shift}), hold);
    });
}

// Where else extents of these bytes are mapped with nothing in use there: they were moved from there, or a fork has
// ended.
std::vector<ByteRange> VirtualMemoryPool::idle_places_of(ByteRange bytes) const {
    std::vector<ByteRange> found;
    if (table_.totals().aliased == 0) return found;
    std::set<const Places*> shared;
    table_.for_each_extent(table_.pages_of(bytes), [&](const Extent& extent) {
        if (extent.shared()) shared.insert(extent.places.get());
    });
    if (shared.empty()) return found;
    table_.for_each_extent({0, capacity()}, [&](const Extent& extent) {
        if (extent.used == 0 && shared.count(extent.places.get()) > 0) found.push_back(extent.range);
    });
    return found;
}

// Unmaps idle places of shared extents, and idle host memory, from where memory is wanted, after device work that may
// still touch them. Throws InvalidArgument where others of a shared extent's pages are in use.
void VirtualMemoryPool::clear_unparkable(std::unique_lock<std::mutex>& lock, std::span<const ByteRange> parts) {
    for (;;) {
        settle_passed();
        if (table_.totals().aliased == 0 && table_.totals().spilled == 0) return;
        std::vector<Bytes> idle;
        std::vector<FencePtr> fences;
        for (const ByteRange& part : parts) {
            if (table_.live().first_overlap(part)) continue;  // the caller refuses that
            table_.for_each_extent(table_.pages_of(part), [&](const Extent& extent) {
                if (!extent.unparkable() || (extent.spilled && extent.used > 0)) return;
                if (extent.used > 0) {
                    throw InvalidArgument("memory in [" + std::to_string(part.begin) + ", " + std::to_string(part.end) +
                                          ") lies on an extent that is shared; make_writable() comes first");
                }
                collect_fences(extent, fences);
                if (extent.idle()) idle.push_back(extent.range.begin);
            });
        }
        if (!fences.empty()) {
            lock.unlock();
            for (const FencePtr& fence : fences) (void)fence->try_wait();
            lock.lock();
            require_open();
            continue;
        }
        for (const Bytes begin : idle) {
            if (Extent& extent = *table_.find(begin); extent.unparkable() && !try_give_back(extent)) {
                throw MappingFailed("the driver refused to unmap the idle extent at offset " + std::to_string(begin));
            }
        }
        return;
    }
}

// Of all work on retiring pages of the extent, and of the service stream's. Throws InvalidArgument where some of it
// can't be waited for.
void VirtualMemoryPool::collect_fences(const Extent& extent, std::vector<FencePtr>& fences) const {
    for (const std::uint64_t id : table_.batches_in(extent.range)) {
        const RetireBatch* const batch = retiring_.find(id);
        if (batch == nullptr) continue;
        if (!batch->recorded()) {
            throw InvalidArgument("memory on the shared extent at offset " + std::to_string(extent.range.begin) +
                                  " was released while a stream captures a graph or its gate is closed; it can be "
                                  "taken up again once that is over");
        }
        fences.insert(fences.end(), batch->fences.begin(), batch->fences.end());
    }
    if (extent.zeroing && !extent.zeroing->has_passed()) fences.push_back(extent.zeroing);
}

void VirtualMemoryPool::make_writable(Bytes offset, Bytes size, std::span<const Stream> streams) {
    const Bytes lacking = try_with_room([&](HandOver&) { return try_make_writable(offset, size, streams); });
    if (lacking > 0) throw out_of_memory(lacking);
}

Bytes VirtualMemoryPool::try_make_writable(Bytes offset, Bytes size, std::span<const Stream> streams) {
    process_.require_same_process();
    const ByteRange pages = table_.pages_of(checked_range(offset, size));
    std::unique_lock lock(mutex_);
    require_open();
    for (bool fenced = false;;) {
        require_awake(pages);
        settle_passed();
        std::vector<Bytes> shared;
        std::vector<FencePtr> fences;
        if (table_.totals().aliased == 0) return 0;
        table_.for_each_extent(pages, [&](const Extent& extent) {
            if (!extent.shared() || extent.used == 0) return;
            shared.push_back(extent.range.begin);
            collect_fences(extent, fences);
        });
        if (shared.empty()) return 0;
        if (!fenced && driver_->capabilities().asynchronous) {
            for (const Stream stream : streams) {
                auto fence = RecordedFence::try_record(driver_, stream);
                if (fence.status().code == StatusCode::capturing) {
                    throw InvalidArgument(
                        "a stream that captures a graph can't be waited for; make memory writable before");
                }
                if (!fence.ok()) throw CudaError(fence.status(), "recording a fence on a user of shared memory");
                fences.push_back(std::move(fence.value()));
            }
        }
        fenced = true;
        if (!fences.empty()) {
            lock.unlock();
            for (const FencePtr& fence : fences) {
                if (const Status status = fence->try_wait(); !status.ok()) {
                    throw CudaError(status, "waiting for users of shared memory");
                }
            }
            lock.lock();
            require_open();
            continue;
        }
        Bytes left = 0;
        for (const Bytes begin : shared) left += table_.find(begin)->used;
        for (const Bytes begin : shared) {
            const Bytes used = table_.find(begin)->used;
            Bytes freed = 0;
            const Status status = try_retile(begin, freed, /*on_host=*/false);
            if (status.code == StatusCode::out_of_memory && status.call == DriverCall::create) return left;
            if (!status.ok()) throw CudaError(status, "copying the shared extent at offset " + std::to_string(begin));
            left -= used;
        }
        return 0;
    }
}

}  // namespace elastikv
