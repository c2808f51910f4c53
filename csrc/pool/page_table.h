// Which extents lie where, which of their pages are used, and what that sums to. Bookkeeping only: no driver, no
// policy.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/interval_set.h"
#include "vmm/mapping.h"
#include "vmm/recorded_fence.h"

namespace elastikv {

// A count that grows whenever an extent of any pool falls idle, so that pools can be compared.
using IdleTime = std::uint64_t;
inline constexpr IdleTime any_time = ~IdleTime{0};

// The places of one physical extent that is mapped at several.
struct Places {
    std::size_t count = 0;  // in the table
    bool lost = false;      // the driver would not unmap one of them, so the memory never goes back
};

struct Extent {
    ByteRange range;  // offsets in the pool, whole pages
    std::unique_ptr<Mapping> mapping;
    // The part that is known to read as zeros. One interval is enough: growth uses up an extent from its front.
    ByteRange clean;
    FencePtr zeroing;       // scrubbing or a copy that may still run; null once it has passed
    bool ahead = false;     // mapped before anyone asked, so the park limit does not apply
    bool foreign = false;   // may hold another owner's bytes: to be zeroed before any of it is handed out
    bool exported = false;  // other processes may have it mapped, so it must stay
    bool spilled = false;   // in host memory: not charged, never parked, never shared
    bool waking = false;    // content is being copied to pages that nobody has yet, so it must stay
    bool fixed = false;     // its size was its owner's choice, so it comes back from a pause as it was
    // Of extents whose physical memory is, was or is about to be mapped elsewhere in the pool, too.
    std::shared_ptr<Places> places;
    // Kept by PageTable:
    Bytes used = 0;
    Bytes retiring = 0;
    IdleTime idle_since = 0;  // 0 while any page is used or retiring

    bool idle() const { return used == 0 && retiring == 0; }
    bool shared() const { return places && places->count > 1; }
    // Idle memory that is of no use to the next who wants some.
    bool unparkable() const { return shared() || spilled; }
    // What it alone costs of the budget.
    Bytes cost() const { return unparkable() ? 0 : range.size(); }
};

inline constexpr std::uint64_t any_batch = 0;  // real ones count from 1

// Bytes of addresses, so that what is mapped at two places counts twice.
struct PageTotals {
    Bytes mapped = 0;
    Bytes aliased = 0;  // the part of `mapped` whose physical memory counts at another place
    Bytes spilled = 0;  // the part of `mapped` that lies in host memory
    Bytes used = 0;
    Bytes retiring = 0;
    Bytes parked = 0;
    Bytes ahead = 0;  // the part of `parked` that was mapped ahead

    Bytes physical() const { return mapped - aliased - spilled; }
};

// A page is used if any of its bytes is live; else retiring, if any of its bytes is; else idle.
// Not thread safe: the pool's lock guards it. Operations cost O(log n) and the extents and allocations they touch.
class PageTable {
  public:
    explicit PageTable(Bytes page_size) : page_size_(page_size) {}

    ByteRange pages_of(ByteRange bytes) const { return align_outward(bytes, page_size_); }

    const IntervalSet& live() const { return live_; }
    bool is_used(ByteRange bytes) const;
    // Parts of `pages` under which no extent lies, in order.
    std::vector<ByteRange> gaps(ByteRange pages) const;
    // Bytes of the gaps.
    Bytes missing(ByteRange pages) const;
    // How far a gap that starts at `offset` goes, at most to `limit`.
    Bytes gap_end(Bytes offset, Bytes limit) const;

    // One with `places` is one more of them.
    Extent& insert(Extent extent);
    // The extent must be idle. Its `places` then count those that are left.
    Extent take(Bytes begin);
    // The places of an extent, for another extent on the same physical memory.
    std::shared_ptr<Places> places_of(Extent& extent);
    Extent* find(Bytes begin);

    // Free bytes become live; retiring ones among them are revived.
    void claim(ByteRange bytes);
    // Live bytes become retiring, under the batch that will settle them.
    void release(ByteRange bytes, std::uint64_t batch);
    // What is still retiring under `batch` (or any_batch) within `bytes` becomes idle.
    void settle(ByteRange bytes, std::uint64_t batch);

    // Batches that have retiring bytes in `bytes`, each once.
    std::vector<std::uint64_t> batches_in(ByteRange bytes) const;

    template <typename Visit>
    void for_each_extent(ByteRange range, Visit visit) {
        for (auto it = first_at(range.begin); it != extents_.end() && it->first < range.end; ++it) visit(it->second);
    }

    template <typename Visit>
    void for_each_extent(ByteRange range, Visit visit) const {
        for (auto it = first_at(range.begin); it != extents_.end() && it->first < range.end; ++it) visit(it->second);
    }

    // Idle extents, oldest first, by their begin.
    const std::map<IdleTime, Bytes>& parked() const { return parked_; }
    const PageTotals& totals() const { return totals_; }
    // totals().parked for who has no lock: what it was a moment ago.
    Bytes parked_hint() const noexcept { return parked_hint_.load(std::memory_order_relaxed); }
    std::size_t extent_count() const { return extents_.size(); }
    Bytes page_size() const { return page_size_; }

    // Recounts everything from scratch and compares; for tests. Returns what disagrees, empty if nothing does.
    std::string check() const;

  private:
    struct RetiringRun {
        Bytes end;
        std::uint64_t batch;
    };
    struct Tally {
        Bytes used = 0;
        Bytes retiring = 0;
    };
    using Extents = std::map<Bytes, Extent>;
    using RetiringRuns = std::map<Bytes, RetiringRun>;

    Extents::iterator first_at(Bytes offset);
    Extents::const_iterator first_at(Bytes offset) const;
    Tally tally(ByteRange pages) const;
    template <typename Mutate>
    void edit(ByteRange bytes, Mutate mutate);
    void add_totals(const Extent& extent);
    void subtract_totals(const Extent& extent);
    void refresh_parking(Extent& extent);
    void note_parked() noexcept { parked_hint_.store(totals_.parked, std::memory_order_relaxed); }
    // The run that holds `offset`, or the first one behind it.
    RetiringRuns::iterator first_retiring(Bytes offset);
    RetiringRuns::const_iterator first_retiring(Bytes offset) const;
    // Removes retiring bytes of `bytes`, of one batch or of any_batch.
    void drop_retiring(ByteRange bytes, std::uint64_t batch);

    Bytes page_size_;
    Extents extents_;  // by begin
    IntervalSet live_;
    RetiringRuns retiring_;  // disjoint from live_ and from each other
    std::map<IdleTime, Bytes> parked_;
    PageTotals totals_;
    std::atomic<Bytes> parked_hint_{0};
};

}  // namespace elastikv
