// A set of bytes kept as disjoint, coalesced half-open intervals.
#pragma once

#include <map>
#include <optional>

#include "base/units.h"

namespace elastikv {

// Each operation costs O(log n) and, for those that change or visit intervals, the number of intervals they touch.
// Not thread safe: the owner's lock guards it.
class IntervalSet {
  public:
    // Adds every byte of `range`; bytes that are there already stay.
    void add(ByteRange range);
    // Removes every byte of `range`; bytes that are not there are ignored.
    void remove(ByteRange range);
    bool contains(ByteRange range) const;
    // The first interval that overlaps `range`, if any.
    std::optional<ByteRange> first_overlap(ByteRange range) const;
    // The first byte of `range` that is not in the set, or range.end.
    Bytes first_gap(ByteRange range) const;
    // The lowest place, at `from` or above and at a multiple of `unit`, where `size` bytes of the set lie in one
    // interval.
    std::optional<Bytes> find(Bytes size, Bytes unit, Bytes from = 0) const;

    // Calls visit(ByteRange) for each interval that overlaps `range`, clipped to it, in order.
    template <typename Visit>
    void for_each(ByteRange range, Visit visit) const {
        for (auto it = first_at(range.begin); it != ends_.end() && it->first < range.end; ++it) {
            const ByteRange part = ByteRange{it->first, it->second}.clipped_to(range);
            if (!part.empty()) visit(part);
        }
    }

    Bytes total() const { return total_; }
    bool empty() const { return ends_.empty(); }

  private:
    using Map = std::map<Bytes, Bytes>;  // begin -> end
    Map::const_iterator first_at(Bytes offset) const;

    Map ends_;
    Bytes total_ = 0;
};

}  // namespace elastikv
