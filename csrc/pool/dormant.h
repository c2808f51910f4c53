// What of a pool's memory sleeps: its addresses are kept, its pages are gone, and its content is in a backup or
// nowhere. Bookkeeping only: no driver, no policy.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/interval_set.h"
#include "pool/pinned_buffers.h"

namespace elastikv {

// The content of some pages, in pieces one behind the other. Without pieces nothing was kept.
struct Backup {
    struct Piece {
        PinnedBufferPtr buffer;
        Bytes offset = 0;  // in the buffer
        Bytes size = 0;
    };
    std::vector<Piece> pieces;

    bool kept() const { return !pieces.empty(); }
};

// Pages that lay on one extent, or on several of one owner side by side, and are to lie on one again.
struct DormantRun {
    ByteRange pages;
    // Runs that shared physical memory have it in common.
    std::shared_ptr<Backup> backup;
    bool fixed = false;  // as in Extent
};

// Not thread safe: the pool's lock guards it.
class Dormant {
  public:
    explicit Dormant(Bytes page_size) : page_size_(page_size) {}

    // Addresses that sleep, whether or not they held anything: nothing may be put there meanwhile.
    const IntervalSet& area() const { return area_; }
    bool sleeps(ByteRange bytes) const { return !area_.empty() && area_.first_overlap(bytes).has_value(); }
    void lay_down(ByteRange bytes) { area_.add(bytes); }
    void wake(ByteRange bytes) { area_.remove(bytes); }

    const IntervalSet& live() const { return live_; }
    // No other run lies there. `live`: bytes of it that have an owner.
    void add(DormantRun run, const std::vector<ByteRange>& live);
    // The bytes have no owner any more; runs that are left without one go, with their backups.
    void drop(ByteRange bytes);
    void clear();
    // Those that lie within `bytes` or reach into it, in order.
    std::vector<DormantRun> runs_in(ByteRange bytes) const;

    // What it takes to wake all: what several runs shared counts once.
    Bytes bytes() const { return bytes_; }
    // The part of it that has a backup.
    Bytes backed_up() const { return backed_up_; }

    // Recounts everything from scratch; for tests. Returns what disagrees, empty if nothing does.
    std::string check() const;

  private:
    using Runs = std::map<Bytes, DormantRun>;
    Runs::const_iterator first_at(Bytes offset) const;
    void remove(Runs::const_iterator run);

    Bytes page_size_;
    IntervalSet area_;
    IntervalSet live_;
    Runs runs_;                                     // by begin
    std::map<const Backup*, std::size_t> sharing_;  // how many runs have each
    Bytes bytes_ = 0;
    Bytes backed_up_ = 0;
};

}  // namespace elastikv
