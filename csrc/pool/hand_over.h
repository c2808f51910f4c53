// Idle extents that go from one pool's addresses to another's as they are: the driver's release and creation, which
// cost by the byte, are spared.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "pool/budget.h"
#include "vmm/physical_extent.h"

namespace elastikv {

// What others give up for one request, between their leaving it and the request's mapping it. It is charged to the
// request's budget throughout, and may still be mapped where it was (see FormerPlace). The content is its last owner's,
// so the request scrubs it as it would scrub new memory. What the request has not taken in the end goes back to the
// device. Owned by the request; not thread safe.
class HandOver {
  public:
    // For a pool on `driver`, which draws on `budget` (or on none) and maps pages of `page` bytes. Extents below
    // `smallest` are not worth it. Takes nothing before want().
    HandOver(MeteredDriverPtr driver, std::shared_ptr<Budget> budget, Bytes page, Bytes smallest);
    ~HandOver() { give_back(); }
    HandOver(const HandOver&) = delete;
    HandOver& operator=(const HandOver&) = delete;

    // An attempt lacked `total` bytes, in gaps of at most `largest`; with `exact` in extents of just that size.
    void want(Bytes total, Bytes largest, bool exact) noexcept;

    // For the one who gives: takes over the extent, which no work and no other process can touch any more, with its
    // charge. False, and nothing has changed, where it does not suit or its charge can't be passed on.
    bool try_take(Budget* giver, const MeteredDriver& driver, const std::shared_ptr<PhysicalExtent>& extent) noexcept;

    // Whether an extent of this size could be of use.
    bool suits(Bytes size) const noexcept;

    // For the one who asked: how much of a gap the extents here fill, and the first of those, the largest first. With
    // what is left of that much, next() gives the others.
    Bytes fitting(Bytes gap) const noexcept;
    std::shared_ptr<PhysicalExtent> next(Bytes left) noexcept;

    Bytes total() const noexcept { return total_; }
    // For the one who makes room, who says whether the budget has room for what the last attempt lacked: whether that
    // is news, so that another attempt comes before anyone is asked. If not, it is the device that lacks it.
    bool note_room(bool there) noexcept { return room_is_news_ = there && !std::exchange(had_room_, there); }
    // What note_room answered last: nobody was asked then.
    bool room_is_news() const noexcept { return room_is_news_; }
    // To the device, with the charge: what did not fit, or is no longer needed. Returns the bytes. What the driver
    // refuses twice stays charged, as it is still there, and counts as abandoned.
    Bytes give_back() noexcept;

  private:
    const MeteredDriverPtr driver_;
    const std::shared_ptr<Budget> budget_;
    const Bytes page_;
    const Bytes smallest_;
    Bytes wanted_ = 0;
    Bytes largest_ = 0;
    bool exact_ = false;
    std::vector<std::shared_ptr<PhysicalExtent>> extents_;  // the largest first
    Bytes total_ = 0;
    bool had_room_ = false;
    bool room_is_news_ = false;
};

}  // namespace elastikv
