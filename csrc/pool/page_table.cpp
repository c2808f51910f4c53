#include "pool/page_table.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>
#include <utility>

namespace elastikv {
namespace {

std::atomic<IdleTime> idle_clock{0};  // of all pools

}  // namespace

PageTable::Extents::iterator PageTable::first_at(Bytes offset) {
    auto it = extents_.upper_bound(offset);
    if (it != extents_.begin() && std::prev(it)->second.range.end > offset) --it;
    return it;
}

PageTable::Extents::const_iterator PageTable::first_at(Bytes offset) const {
    return const_cast<PageTable*>(this)->first_at(offset);
}

PageTable::RetiringRuns::iterator PageTable::first_retiring(Bytes offset) {
    auto it = retiring_.upper_bound(offset);
    if (it != retiring_.begin() && std::prev(it)->second.end > offset) --it;
    return it;
}

PageTable::RetiringRuns::const_iterator PageTable::first_retiring(Bytes offset) const {
    return const_cast<PageTable*>(this)->first_retiring(offset);
}

bool PageTable::is_used(ByteRange bytes) const {
    const ByteRange pages = pages_of(bytes);
    return tally(pages).used == pages.size();
}

std::vector<ByteRange> PageTable::gaps(ByteRange pages) const {
    std::vector<ByteRange> found;
    Bytes at = pages.begin;
    for (auto it = first_at(pages.begin); it != extents_.end() && it->first < pages.end; ++it) {
        if (it->first > at) found.push_back({at, it->first});
        at = it->second.range.end;
    }
    if (at < pages.end) found.push_back({at, pages.end});
    return found;
}

Bytes PageTable::missing(ByteRange pages) const {
    Bytes sum = 0;
    for (const ByteRange& gap : gaps(pages)) sum += gap.size();
    return sum;
}

Bytes PageTable::gap_end(Bytes offset, Bytes limit) const {
    const auto it = first_at(offset);
    return it == extents_.end() ? limit : std::min(limit, std::max(offset, it->first));
}

// Bytes of `pages` in pages with a live byte, and in those without one but with a retiring byte: one walk over live
// intervals and retiring runs together, in order of their begin, each rounded outward to pages.
PageTable::Tally PageTable::tally(ByteRange pages) const {
    struct Cover {
        Bytes reached;
        Bytes total = 0;
        void add(ByteRange part) {
            if (part.end <= reached) return;
            total += part.end - std::max(part.begin, reached);
            reached = part.end;
        }
    };
    Cover used{pages.begin};
    Cover any{pages.begin};
    auto run = first_retiring(pages.begin);
    const auto add_runs_before = [&](Bytes limit) {
        for (; run != retiring_.end() && run->first < limit; ++run) {
            const ByteRange part = ByteRange{run->first, run->second.end}.clipped_to(pages);
            if (!part.empty()) any.add(pages_of(part));
        }
    };
    live_.for_each(pages, [&](ByteRange part) {
        add_runs_before(part.begin);
        used.add(pages_of(part));
        any.add(pages_of(part));
    });
    add_runs_before(pages.end);
    return {used.total, any.total - used.total};
}

void PageTable::add_totals(const Extent& extent) {
    totals_.mapped += extent.range.size();
    if (extent.spilled) totals_.spilled += extent.range.size();
    totals_.used += extent.used;
    totals_.retiring += extent.retiring;
    if (extent.idle()) totals_.parked += extent.range.size();
    if (extent.idle() && extent.ahead) totals_.ahead += extent.range.size();
}

void PageTable::subtract_totals(const Extent& extent) {
    totals_.mapped -= extent.range.size();
    if (extent.spilled) totals_.spilled -= extent.range.size();
    totals_.used -= extent.used;
    totals_.retiring -= extent.retiring;
    if (extent.idle()) totals_.parked -= extent.range.size();
    if (extent.idle() && extent.ahead) totals_.ahead -= extent.range.size();
}

void PageTable::refresh_parking(Extent& extent) {
    if (extent.idle() == (extent.idle_since != 0)) return;
    if (extent.idle()) {
        extent.idle_since = idle_clock.fetch_add(1, std::memory_order_relaxed) + 1;
        parked_.emplace(extent.idle_since, extent.range.begin);
    } else {
        parked_.erase(extent.idle_since);
        extent.idle_since = 0;
        extent.ahead = false;
    }
}

// Runs `mutate`, which changes the state of `bytes` only, and carries the difference into extents and totals.
template <typename Mutate>
void PageTable::edit(ByteRange bytes, Mutate mutate) {
    const ByteRange pages = pages_of(bytes);
    for_each_extent(pages, [&](Extent& extent) {
        subtract_totals(extent);
        const Tally before = tally(extent.range.clipped_to(pages));
        extent.used -= before.used;
        extent.retiring -= before.retiring;
    });
    mutate();
    for_each_extent(pages, [&](Extent& extent) {
        const Tally after = tally(extent.range.clipped_to(pages));
        extent.used += after.used;
        extent.retiring += after.retiring;
        add_totals(extent);
        refresh_parking(extent);
    });
    note_parked();
}

Extent& PageTable::insert(Extent extent) {
    const Bytes begin = extent.range.begin;
    const Tally now = tally(extent.range);  // compaction puts extents under pages that are in use
    extent.used = now.used;
    extent.retiring = now.retiring;
    extent.idle_since = 0;
    Extent& kept = extents_.emplace(begin, std::move(extent)).first->second;
    if (kept.places && ++kept.places->count > 1) totals_.aliased += kept.range.size();
    add_totals(kept);
    refresh_parking(kept);
    note_parked();
    return kept;
}

Extent PageTable::take(Bytes begin) {
    const auto it = extents_.find(begin);
    Extent extent = std::move(it->second);
    extents_.erase(it);
    subtract_totals(extent);
    note_parked();
    if (extent.idle_since != 0) parked_.erase(extent.idle_since);
    extent.idle_since = 0;
    if (extent.places && --extent.places->count > 0) totals_.aliased -= extent.range.size();
    return extent;
}

std::shared_ptr<Places> PageTable::places_of(Extent& extent) {
    if (!extent.places) extent.places = std::make_shared<Places>(Places{1, false});
    return extent.places;
}

Extent* PageTable::find(Bytes begin) {
    const auto it = extents_.find(begin);
    return it == extents_.end() ? nullptr : &it->second;
}

void PageTable::claim(ByteRange bytes) {
    edit(bytes, [&] {
        drop_retiring(bytes, any_batch);
        live_.add(bytes);
    });
    for_each_extent(bytes, [&](Extent& extent) {
        // What is left of the clean part is the larger of the two pieces.
        const ByteRange& clean = extent.clean;
        if (!clean.overlaps(bytes)) return;
        const ByteRange low{clean.begin, std::max(clean.begin, bytes.begin)};
        const ByteRange high{std::min(clean.end, bytes.end), clean.end};
        extent.clean = low.size() >= high.size() ? low : high;
    });
}

void PageTable::release(ByteRange bytes, std::uint64_t batch) {
    edit(bytes, [&] {
        live_.remove(bytes);
        retiring_.emplace(bytes.begin, RetiringRun{bytes.end, batch});
    });
}

void PageTable::settle(ByteRange bytes, std::uint64_t batch) {
    edit(bytes, [&] { drop_retiring(bytes, batch); });
}

void PageTable::drop_retiring(ByteRange bytes, std::uint64_t batch) {
    auto it = first_retiring(bytes.begin);
    while (it != retiring_.end() && it->first < bytes.end) {
        const ByteRange whole{it->first, it->second.end};
        const std::uint64_t owner = it->second.batch;
        if ((batch != any_batch && owner != batch) || !whole.overlaps(bytes)) {
            ++it;
            continue;
        }
        it = retiring_.erase(it);
        if (whole.begin < bytes.begin) retiring_.emplace(whole.begin, RetiringRun{bytes.begin, owner});
        if (whole.end > bytes.end) it = retiring_.emplace(bytes.end, RetiringRun{whole.end, owner}).first;
    }
}

std::vector<std::uint64_t> PageTable::batches_in(ByteRange bytes) const {
    std::vector<std::uint64_t> found;
    for (auto it = first_retiring(bytes.begin); it != retiring_.end() && it->first < bytes.end; ++it) {
        if (it->second.end <= bytes.begin) continue;
        if (std::find(found.begin(), found.end(), it->second.batch) == found.end()) found.push_back(it->second.batch);
    }
    return found;
}

std::string PageTable::check() const {
    PageTotals sum;
    Bytes previous_end = 0;
    std::size_t idle = 0;
    std::map<const Places*, std::size_t> places;
    for (const auto& [begin, extent] : extents_) {
        const std::string where = "extent at " + std::to_string(begin) + ": ";
        if (begin != extent.range.begin || begin < previous_end) return where + "out of place";
        if (begin % page_size_ != 0 || extent.range.size() % page_size_ != 0) return where + "not whole pages";
        previous_end = extent.range.end;
        const Tally now = tally(extent.range);
        if (now.used != extent.used || now.retiring != extent.retiring) return where + "its counts are stale";
        if (extent.idle() != (extent.idle_since != 0)) return where + "its parking is stale";
        if (extent.idle() && parked_.count(extent.idle_since) == 0) return where + "not in the parked list";
        if (!extent.clean.empty() && live_.first_overlap(extent.clean)) return where + "live bytes are marked clean";
        idle += extent.idle() ? 1 : 0;
        if (extent.spilled && extent.shared()) return where + "spilled and shared";
        sum.mapped += extent.range.size();
        if (extent.spilled) sum.spilled += extent.range.size();
        if (extent.places && ++places[extent.places.get()] > 1) sum.aliased += extent.range.size();
        sum.used += extent.used;
        sum.retiring += extent.retiring;
        if (extent.idle()) sum.parked += extent.range.size();
    }
    if (idle != parked_.size()) return "the parked list holds what is not parked";
    for (const auto& [each, count] : places) {
        if (each->count != count) return "the number of an extent's places is stale";
    }
    if (sum.mapped != totals_.mapped || sum.aliased != totals_.aliased || sum.spilled != totals_.spilled ||
        sum.used != totals_.used || sum.retiring != totals_.retiring || sum.parked != totals_.parked) {
        return "the totals are stale";
    }
    return {};
}

}  // namespace elastikv
