// Bytes, addresses and ranges: the arithmetic that every room shares, with its overflow checks in one place.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>

namespace elastikv {

using Bytes = std::uint64_t;
using Address = std::uint64_t;

inline constexpr Bytes KiB = Bytes{1} << 10;
inline constexpr Bytes MiB = Bytes{1} << 20;
inline constexpr Bytes GiB = Bytes{1} << 30;

// A half-open interval [begin, end) of offsets. Empty when begin == end.
struct ByteRange {
    Bytes begin = 0;
    Bytes end = 0;

    constexpr Bytes size() const { return end - begin; }
    constexpr bool empty() const { return begin >= end; }
    constexpr bool contains(const ByteRange& other) const { return begin <= other.begin && other.end <= end; }
    constexpr bool overlaps(const ByteRange& other) const { return begin < other.end && other.begin < end; }
    constexpr ByteRange clipped_to(const ByteRange& other) const {
        const Bytes low = begin > other.begin ? begin : other.begin;
        const Bytes high = end < other.end ? end : other.end;
        return low < high ? ByteRange{low, high} : ByteRange{low, low};
    }
    friend constexpr bool operator==(const ByteRange&, const ByteRange&) = default;
};

// nullopt where offset + size does not fit 64 bits: a caller that adds first would wrap around and pass its bounds
// check.
constexpr std::optional<ByteRange> range_of(Bytes offset, Bytes size) {
    if (size > std::numeric_limits<Bytes>::max() - offset) return std::nullopt;
    return ByteRange{offset, offset + size};
}

constexpr Bytes align_down(Bytes value, Bytes unit) { return value - value % unit; }

// nullopt where rounding up does not fit 64 bits.
constexpr std::optional<Bytes> align_up(Bytes value, Bytes unit) {
    const Bytes rest = value % unit;
    if (rest == 0) return value;
    if (value > std::numeric_limits<Bytes>::max() - (unit - rest)) return std::nullopt;
    return value + (unit - rest);
}

// The smallest run of whole units that covers `range`, whose end must be at most a multiple of `unit` below 2^64.
constexpr ByteRange align_outward(const ByteRange& range, Bytes unit) {
    return {align_down(range.begin, unit), align_up(range.end, unit).value_or(range.end)};
}

constexpr bool is_power_of_two(Bytes value) { return std::has_single_bit(value); }

}  // namespace elastikv
