#include "base/interval_set.h"

#include <algorithm>
#include <iterator>

namespace elastikv {

// The interval that holds `offset`, or the first one behind it.
IntervalSet::Map::const_iterator IntervalSet::first_at(Bytes offset) const {
    auto it = ends_.upper_bound(offset);
    if (it != ends_.begin()) {
        const auto before = std::prev(it);
        if (before->second > offset) return before;
    }
    return it;
}

void IntervalSet::add(ByteRange range) {
    if (range.empty()) return;
    auto it = ends_.upper_bound(range.begin);
    if (it != ends_.begin() && std::prev(it)->second >= range.begin) --it;  // overlaps, or touches from below
    while (it != ends_.end() && it->first <= range.end) {
        range.begin = std::min(range.begin, it->first);
        range.end = std::max(range.end, it->second);
        total_ -= it->second - it->first;
        it = ends_.erase(it);
    }
    ends_.emplace_hint(it, range.begin, range.end);
    total_ += range.size();
}

void IntervalSet::remove(ByteRange range) {
    if (range.empty()) return;
    auto it = first_at(range.begin);
    while (it != ends_.end() && it->first < range.end) {
        const ByteRange whole{it->first, it->second};
        it = ends_.erase(it);
        total_ -= whole.size();
        if (whole.begin < range.begin) {
            ends_.emplace(whole.begin, range.begin);
            total_ += range.begin - whole.begin;
        }
        if (whole.end > range.end) {
            it = ends_.emplace(range.end, whole.end).first;
            total_ += whole.end - range.end;
            break;
        }
    }
}

bool IntervalSet::contains(ByteRange range) const { return range.empty() || first_gap(range) == range.end; }

std::optional<ByteRange> IntervalSet::first_overlap(ByteRange range) const {
    const auto it = first_at(range.begin);
    if (it == ends_.end() || it->first >= range.end || range.empty()) return std::nullopt;
    return ByteRange{it->first, it->second};
}

Bytes IntervalSet::first_gap(ByteRange range) const {
    // Intervals are coalesced, so the one that holds range.begin either reaches range.end or ends in a gap.
    const auto it = first_at(range.begin);
    if (it == ends_.end() || it->first > range.begin) return range.begin;
    return std::min(it->second, range.end);
}

std::optional<Bytes> IntervalSet::find(Bytes size, Bytes unit, Bytes from) const {
    for (auto it = first_at(from); it != ends_.end(); ++it) {
        const auto start = align_up(std::max(it->first, from), unit);
        if (start && *start <= it->second && it->second - *start >= size) return *start;
    }
    return std::nullopt;
}

}  // namespace elastikv
