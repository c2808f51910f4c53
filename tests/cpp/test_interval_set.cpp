// IntervalSet against an array of bytes.
#include <vector>

#include "base/interval_set.h"
#include "catch.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

constexpr Bytes length = 96;

struct NaiveSet {
    std::vector<bool> has = std::vector<bool>(length, false);

    void put(ByteRange range, bool value) {
        for (Bytes i = range.begin; i < range.end; ++i) has[i] = value;
    }
    Bytes total() const {
        Bytes sum = 0;
        for (const bool bit : has) sum += bit ? 1 : 0;
        return sum;
    }
    Bytes first_gap(ByteRange range) const {
        Bytes i = range.begin;
        while (i < range.end && has[i]) ++i;
        return i;
    }
    std::optional<ByteRange> first_overlap(ByteRange range) const {
        for (Bytes i = range.begin; i < range.end; ++i) {
            if (!has[i]) continue;
            Bytes begin = i;
            Bytes end = i;
            while (begin > 0 && has[begin - 1]) --begin;
            while (end < length && has[end]) ++end;
            return ByteRange{begin, end};
        }
        return std::nullopt;
    }
    std::optional<Bytes> find(Bytes size, Bytes unit, Bytes from) const {
        for (Bytes start = (from + unit - 1) / unit * unit; start + size <= length; start += unit) {
            if (first_gap({start, start + size}) == start + size) return start;
        }
        return std::nullopt;
    }
};

TEST_CASE("an interval set is a set of bytes", "[interval_set]") {
    const std::uint64_t seed = test_seed(20240601);
    CAPTURE(seed);
    Random random(seed);
    IntervalSet set;
    NaiveSet naive;
    for (std::uint64_t step = 0; step < test_steps(50'000); ++step) {
        CAPTURE(step);
        const Bytes begin = random.below(length + 1);
        const ByteRange range{begin, begin + random.below(length - begin + 1)};
        switch (random.below(3)) {
            case 0:
                set.add(range);
                naive.put(range, true);
                break;
            case 1:
                set.remove(range);
                naive.put(range, false);
                break;
            default: break;
        }
        const Bytes at = random.below(length + 1);
        const ByteRange asked{at, at + random.below(length - at + 1)};
        const Bytes gap = naive.first_gap(asked);
        const Bytes unit = Bytes{1} << random.below(5);
        const Bytes size = 1 + random.below(20);
        bool same = set.total() == naive.total() && set.empty() == (naive.total() == 0);
        same = same && set.first_gap(asked) == gap && set.contains(asked) == (gap == asked.end);
        same = same && set.first_overlap(asked) == naive.first_overlap(asked);
        same = same && set.find(size, unit, at) == naive.find(size, unit, at);
        NaiveSet visited;
        Bytes last_end = 0;
        set.for_each(asked, [&](ByteRange part) {
            same = same && asked.contains(part) && !part.empty() && (last_end == 0 || part.begin > last_end);
            last_end = part.end;
            visited.put(part, true);
        });
        for (Bytes i = asked.begin; i < asked.end; ++i) same = same && visited.has[i] == naive.has[i];
        if (!same) FAIL("the set and the array differ in [" << asked.begin << ", " << asked.end << ")");
    }
}

TEST_CASE("intervals that touch become one", "[interval_set]") {
    IntervalSet set;
    set.add({0, 4});
    set.add({8, 12});
    CHECK(set.first_overlap({8, 9}) == ByteRange{8, 12});
    set.add({4, 8});
    CHECK(set.first_overlap({8, 9}) == ByteRange{0, 12});
    CHECK(set.total() == 12);
    set.add({5, 5});
    set.remove({5, 5});
    CHECK(set.total() == 12);
}

TEST_CASE("an interval set reaches to the end of 64 bits", "[interval_set]") {
    constexpr Bytes top = ~Bytes{0};
    IntervalSet set;
    set.add({0, top});
    set.remove({4096, top - 10});
    CHECK(set.total() == 4096 + 10);
    CHECK(set.find(10, 1, 5000) == top - 10);
    CHECK_FALSE(set.find(11, 1, 5000).has_value());
    CHECK_FALSE(set.find(8, 4096, 5000).has_value());  // rounding up would pass 2^64
}

}  // namespace
}  // namespace elastikv::testing
