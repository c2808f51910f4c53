// VirtualMemoryPool: making memory resident.
#include <algorithm>
#include <utility>

#include "base/events.h"
#include "pool/virtual_memory_pool.h"

namespace elastikv {

Bytes VirtualMemoryPool::try_allocate(std::span<const ByteRange> parts, const AllocateOptions& options) {
    for (const ByteRange& part : parts) {
        if (const auto held = table_.live().first_overlap(part)) throw AlreadyMapped(part, *held);
    }
    std::vector<Extent> fresh;
    std::vector<Extent*> scrubbed;
    bool zeroed = false;
    try {
        for (std::size_t i = 0; i < parts.size(); ++i) {
            AllocateOptions of_part = options;
            if (!options.bounds.empty()) {
                of_part.held = options.bounds[i].held;
                of_part.grow_end = options.bounds[i].grow_end;
                if (options.bounds[i].extents.largest > 0) of_part.extents = options.bounds[i].extents;
            }
            const Bytes lacking = try_fill_gaps(table_.pages_of(parts[i]), of_part, fresh);
            if (lacking == 0) continue;
            undo(fresh);
            // What was charged in part has gone back, so room is needed for all that is missing.
            Bytes missing = 0;
            for (const ByteRange& each : parts) missing += table_.missing(table_.pages_of(each));
            want(parts, std::max(lacking, missing), options);
            return std::max(lacking, missing);
        }
        const Status scrubbed_new = try_scrub(fresh, zeroed);
        if (!scrubbed_new.ok()) throw CudaError(scrubbed_new, "scrubbing new memory");
        for (const ByteRange& part : parts) {
            order_after_earlier_users(part, options.stream);
            prepare_kept_extents(part, options, zeroed, scrubbed);
        }
        if (zeroed && driver_->capabilities().asynchronous) {
            auto fence = RecordedFence::try_record(driver_, driver_->service_stream());
            if (!fence.ok()) throw CudaError(fence.status(), "recording the end of scrubbing");
            const Status ordered = fence.value()->try_order(options.stream);
            if (!ordered.ok()) throw CudaError(ordered, "ordering the stream after scrubbing");
            for (Extent& extent : fresh) extent.zeroing = fence.value();
            for (Extent* extent : scrubbed) {
                extent->zeroing = fence.value();
                scrubbing_.emplace_back(extent->range.begin, extent->zeroing);
            }
        }
    } catch (...) {
        if (zeroed) wait_for_service_stream();  // or it would zero what is handed out next, or is unmapped
        undo(fresh);
        throw;
    }
    for (Extent* extent : scrubbed) {
        if (extent->foreign) extent->clean = extent->range;
        extent->foreign = false;
    }
    for (Extent& extent : fresh) {
        if (extent.zeroing) scrubbing_.emplace_back(extent.range.begin, extent.zeroing);
        table_.insert(std::move(extent));
    }
    for (const ByteRange& part : parts) table_.claim(part);
    note_peaks();
    // Nobody waits for the end of scrubbing: who gives an extent back looks for it.
    if (!former_places_.empty()) worker_.wake();
    return 0;
}

Bytes VirtualMemoryPool::try_fill_gaps(ByteRange pages, const AllocateOptions& options, std::vector<Extent>& fresh) {
    for (const ByteRange& gap : table_.gaps(pages)) {
        // What is handed over is as large as it is: it fills a gap, or one of the extents that were asked for.
        const Bytes lacking = options.extents.exact ? try_fill_by_extents(gap, options, fresh, /*handed=*/true)
                                                    : try_fill_gap(gap, options, fresh);
        if (lacking > 0) return lacking;
    }
    return 0;
}

// By extents of the sizes that are asked for; with `handed`, of others' as far as they fit.
Bytes VirtualMemoryPool::try_fill_by_extents(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh,
                                             bool handed) {
    ByteRange piece{gap.begin, gap.begin};
    while (piece.end < gap.end) {
        piece = {piece.end, piece.end + extent_size(gap.end - piece.end, options)};
        AllocateOptions of_piece = options;
        of_piece.open_ended = options.open_ended && piece.end == gap.end;
        const Bytes lacking = handed ? try_fill_gap(piece, of_piece, fresh) : try_fill_with_new(piece, of_piece, fresh);
        if (lacking > 0) return gap.end - piece.begin;
    }
    return 0;
}

// Of the first extent of a gap of which so much is left.
Bytes VirtualMemoryPool::extent_size(Bytes left, const AllocateOptions& options) const {
    if (options.extents.largest == 0) return left;
    const Bytes most = std::min(options.extents.largest, left);
    if (options.extents.smallest == 0 || left <= options.extents.smallest) return most;
    const Bytes half = *align_up(left / 2, page_size());
    return std::min(most, std::max(options.extents.smallest, half));
}

// What others could give up for these parts.
void VirtualMemoryPool::want(std::span<const ByteRange> parts, Bytes lacking, const AllocateOptions& options) const {
    if (options.hand_over == nullptr) return;
    const ExtentSizes& extents = options.extents;
    Bytes largest = extents.exact ? extents.largest : 0;
    if (largest == 0) {
        for (const ByteRange& part : parts) {
            for (const ByteRange& gap : table_.gaps(table_.pages_of(part))) largest = std::max(largest, gap.size());
        }
        if (extents.largest > 0) largest = std::min(largest, extents.largest);
    }
    options.hand_over->want(lacking, largest, /*exact=*/extents.exact && extents.largest > 0);
}

Bytes VirtualMemoryPool::try_fill_gap(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh) {
    const Bytes handed = options.hand_over == nullptr ? 0 : options.hand_over->fitting(gap.size());
    const ByteRange rest{gap.begin + handed, gap.end};
    if (!rest.empty()) {  // first, as it may lack
        AllocateOptions of_rest = options;
        of_rest.held += handed;
        const Bytes lacking = options.extents.exact ? try_fill_with_new(rest, of_rest, fresh)
                                                    : try_fill_by_extents(rest, of_rest, fresh, /*handed=*/false);
        if (lacking > 0) return gap.size();
    }
    for (Bytes at = gap.begin; at < rest.begin;) {
        auto physical = options.hand_over->next(rest.begin - at);
        const ByteRange range{at, at + physical->size()};
        const Status status = try_make_extent(range, /*clean=*/true, fresh, std::move(physical));
        if (!status.ok()) throw MappingFailed(status, range);
        fresh.back().fixed = options.extents.largest > 0;
        at = range.end;
    }
    return 0;
}

Bytes VirtualMemoryPool::try_fill_with_new(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh) {
    // Mapping ahead is worth a try, but not worth anyone else's memory: where it does not fit, exactly the gap is
    // taken.
    const Bytes far_end = open_ended_end(gap, options);
    for (const Bytes end : {far_end, gap.end}) {
        const ByteRange range{gap.begin, end};
        if (!try_charge(range.size(), options.grant)) continue;
        const bool clean = options_.scrub_fresh || options.zero;
        const Status status = try_make_extent(range, clean, fresh);
        if (status.ok()) {
            fresh.back().fixed = options.extents.largest > 0;
            return 0;
        }
        if (status.code == StatusCode::out_of_memory && status.call == DriverCall::create) continue;
        if (status.call == DriverCall::create) {
            throw CudaError(status, "making an extent of " + format_bytes(range.size()));
        }
        throw MappingFailed(status, range);
    }
    return gap.size();
}

bool VirtualMemoryPool::try_charge(Bytes bytes, Grant* grant) noexcept {
    if (grant != nullptr && grant->take(bytes)) return true;
    return !budget_ || budget_->try_charge(bytes);
}

Bytes VirtualMemoryPool::open_ended_end(ByteRange gap, const AllocateOptions& options) const {
    if (!options.open_ended) return gap.end;
    Bytes limit = std::min(align_down(std::max(options.grow_end, gap.end), page_size()), capacity());
    if (options.extents.largest > 0) limit = std::min(limit, gap.begin + options.extents.largest);
    const double holds = static_cast<double>(options.held + gap.size());
    const Bytes ahead = align_down(static_cast<Bytes>(holds * options_.growth_share), page_size());
    if (ahead == 0 || limit <= gap.end) return gap.end;
    return table_.gap_end(gap.end, ahead < limit - gap.end ? gap.end + ahead : limit);
}

// On new memory, or on what was handed over; with `clean` it is to go through try_scrub. The bytes are charged already.
// After a failure they are refunded, or, where the driver would not take back what was made so far, the extent is kept
// as a parked one and the charge with it.
Status VirtualMemoryPool::try_make_extent(ByteRange range, bool clean, std::vector<Extent>& fresh,
                                          std::shared_ptr<PhysicalExtent> handed) {
    Observed observed(EventKind::growth, options_.name);
    const bool fresh_is_zero = driver_->capabilities().fresh_is_zero;
    Extent extent;
    extent.range = range;
    extent.foreign = handed != nullptr || (options_.scrub_fresh && !fresh_is_zero);
    if (!handed) {
        auto physical = PhysicalExtent::try_create(driver_, range.size());
        if (!physical.ok()) {
            if (budget_) budget_->refund(range.size());
            return physical.status();
        }
        handed = std::move(physical.value());
    } else if (handed->former_place()) {
        former_places_.push_back(handed->former_place());
    }
    extent.mapping = std::make_unique<Mapping>(range_, std::move(handed), range.begin);
    const Status status = extent.mapping->try_make_accessible();
    if (!status.ok()) {
        discard(std::move(extent));
        return status;
    }
    if (clean || fresh_is_zero) extent.clean = range;
    fresh.push_back(std::move(extent));
    Bytes physical_bytes = table_.totals().physical();
    for (const Extent& each : fresh) physical_bytes += each.range.size();
    observed.done(range.size(), physical_bytes);
    return status;
}

// Zeroes those that are to be clean, neighbours by one call, and says in `zeroed` whether there were any.
Status VirtualMemoryPool::try_scrub(std::vector<Extent>& fresh, bool& zeroed) noexcept {
    if (driver_->capabilities().fresh_is_zero) return Status::success();
    for (auto first = fresh.begin(); first != fresh.end();) {
        auto last = first;
        ByteRange run = first->clean;
        while (++last != fresh.end() && !run.empty() && last->clean.begin == run.end) run.end = last->clean.end;
        if (!run.empty()) {
            zeroed = true;
            const Status status = driver_->zero(base_address() + run.begin, run.size());
            if (!status.ok()) return status;
            std::for_each(first, last, [](Extent& extent) { extent.foreign = false; });
        }
        first = last;
    }
    return Status::success();
}

// Idle pages that are taken up again: makes them accessible, orders scrubbing after their last users, and scrubs.
// `scrubbed` are those in which anything is zeroed; foreign ones are zeroed as a whole.
void VirtualMemoryPool::prepare_kept_extents(ByteRange bytes, const AllocateOptions& options, bool& zeroed,
                                             std::vector<Extent*>& scrubbed) {
    std::vector<ByteRange> dirty;
    table_.for_each_extent(table_.pages_of(bytes), [&](Extent& extent) {
        const Status status = extent.mapping->try_make_accessible();
        if (!status.ok()) throw MappingFailed(status, extent.range);
        if (extent.zeroing && driver_->capabilities().asynchronous) {
            const Status ordered = extent.zeroing->try_order(options.stream);
            if (!ordered.ok()) throw CudaError(ordered, "ordering the stream after scrubbing");
        }
        const std::size_t found = dirty.size();
        const auto add = [&](ByteRange part) {
            if (!part.empty()) dirty.push_back(part);
        };
        if (extent.foreign) {
            add(extent.range);
        } else if (options.zero) {
            const ByteRange part = bytes.clipped_to(extent.range);
            const ByteRange clean = extent.clean.clipped_to(part);
            add({part.begin, clean.empty() ? part.end : clean.begin});
            if (!clean.empty()) add({clean.end, part.end});
        }
        if (dirty.size() > found) scrubbed.push_back(&extent);
    });
    if (dirty.empty()) return;
    order_after_earlier_users(bytes, driver_->service_stream());
    zeroed = true;
    for (const ByteRange& part : dirty) {
        const Status status = driver_->zero(base_address() + part.begin, part.size());
        if (!status.ok()) throw CudaError(status, "scrubbing");
    }
}

// Released memory may be taken up again before earlier work on it is done, as `stream` is made to wait for that work.
void VirtualMemoryPool::order_after_earlier_users(ByteRange bytes, Stream stream) {
    for (const std::uint64_t id : table_.batches_in(bytes)) {
        const RetireBatch* const batch = retiring_.find(id);
        if (batch == nullptr) continue;
        const bool same_stream = std::all_of(batch->unrecorded.begin(), batch->unrecorded.end(),
                                             [&](const Stream& s) { return s == stream; });
        if ((batch->gate && !batch->gate->is_open()) || !same_stream) {
            throw InvalidArgument(
                "memory in [" + std::to_string(bytes.begin) + ", " + std::to_string(bytes.end) +
                ") was released while a stream captures a graph or its gate is closed; it can be taken "
                "up again once that is over");
        }
        for (const FencePtr& fence : batch->fences) {
            const Status ordered = fence->try_order(stream);
            if (!ordered.ok()) throw CudaError(ordered, "ordering a stream after earlier users of the memory");
        }
    }
}

void VirtualMemoryPool::undo(std::vector<Extent>& fresh) noexcept {
    const bool scrubbed =
        std::any_of(fresh.begin(), fresh.end(), [](const Extent& extent) { return !extent.clean.empty(); });
    if (scrubbed && !driver_->capabilities().fresh_is_zero) wait_for_service_stream();
    for (Extent& extent : fresh) discard(std::move(extent));
    fresh.clear();
}

// Only on failure paths: what was being scrubbed is about to be unmapped.
void VirtualMemoryPool::wait_for_service_stream() noexcept {
    if (!driver_->capabilities().asynchronous) return;
    auto fence = RecordedFence::try_record(driver_, driver_->service_stream());
    if (!fence.ok() || !fence.value()->try_wait().ok()) (void)driver_->synchronize();
}

void VirtualMemoryPool::note_peaks() {
    peak_physical_ = std::max(peak_physical_, table_.totals().physical());
    peak_used_ = std::max(peak_used_, table_.totals().used);
}

}  // namespace elastikv
