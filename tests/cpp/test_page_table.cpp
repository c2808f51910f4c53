// PageTable against arrays of bytes and pages.
#include <algorithm>
#include <set>

#include "catch.h"
#include "pool/page_table.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

constexpr Bytes page = 16;
constexpr Bytes pages = 24;
constexpr Bytes length = page * pages;

struct NaiveTable {
    std::vector<bool> live = std::vector<bool>(length, false);
    std::vector<std::uint64_t> batch = std::vector<std::uint64_t>(length, 0);  // 0: not retiring
    std::vector<int> extent = std::vector<int>(pages, -1);                     // its first page
    std::vector<Bytes> parked;                                                 // begins, oldest first

    enum class Page { idle, retiring, used };
    Page state(Bytes index) const {
        Page found = Page::idle;
        for (Bytes i = index * page; i < (index + 1) * page; ++i) {
            if (live[i]) return Page::used;
            if (batch[i] != 0) found = Page::retiring;
        }
        return found;
    }
    ByteRange extent_pages(Bytes first) const {
        Bytes end = first;
        while (end < pages && extent[end] == static_cast<int>(first)) ++end;
        return {first, end};
    }
    bool idle(Bytes first) const {
        const ByteRange range = extent_pages(first);
        for (Bytes i = range.begin; i < range.end; ++i) {
            if (state(i) != Page::idle) return false;
        }
        return true;
    }
    // Called after each change: extents that became idle go to the end of the list.
    void refresh_parked() {
        std::erase_if(parked, [this](Bytes begin) {
            const auto first = begin / page;
            return extent[first] != static_cast<int>(first) || !idle(first);
        });
        for (Bytes i = 0; i < pages; ++i) {
            if (extent[i] != static_cast<int>(i) || !idle(i)) continue;
            if (std::find(parked.begin(), parked.end(), i * page) == parked.end()) parked.push_back(i * page);
        }
    }
};

struct Both {
    PageTable table{page};
    NaiveTable naive;
    Random random;
    std::uint64_t last_batch = 0;
    std::vector<std::pair<ByteRange, std::uint64_t>> open_batches;

    explicit Both(std::uint64_t seed) : random(seed) {}

    void insert() {
        const Bytes first = random.below(pages);
        Bytes end = first;
        const Bytes most = 1 + random.below(6);
        while (end < pages && end - first < most && naive.extent[end] < 0) ++end;
        if (end == first) return;
        Extent extent;
        extent.range = {first * page, end * page};
        if (random.one_in(2)) extent.clean = extent.range;
        table.insert(std::move(extent));
        for (Bytes i = first; i < end; ++i) naive.extent[i] = static_cast<int>(first);
    }

    void take() {
        if (naive.parked.empty()) return;
        const Bytes begin = naive.parked[random.below(naive.parked.size())];
        const Extent gone = table.take(begin);
        REQUIRE(gone.range.begin == begin);
        for (Bytes i = gone.range.begin / page; i < gone.range.end / page; ++i) naive.extent[i] = -1;
    }

    void claim() {
        const Bytes begin = random.below(length);
        Bytes end = begin;
        const Bytes most = 1 + random.below(70);
        while (end < length && end - begin < most && !naive.live[end] && naive.extent[end / page] >= 0) ++end;
        if (end == begin) return;
        table.claim({begin, end});
        for (Bytes i = begin; i < end; ++i) {
            naive.live[i] = true;
            naive.batch[i] = 0;
        }
    }

    void release() {
        const Bytes begin = random.below(length);
        Bytes end = begin;
        const Bytes most = 1 + random.below(70);
        while (end < length && end - begin < most && naive.live[end]) ++end;
        if (end == begin) return;
        const std::uint64_t id = ++last_batch;
        table.release({begin, end}, id);
        open_batches.push_back({{begin, end}, id});
        for (Bytes i = begin; i < end; ++i) {
            naive.live[i] = false;
            naive.batch[i] = id;
        }
    }

    void settle() {
        if (open_batches.empty()) return;
        const auto chosen = open_batches.begin() + static_cast<std::ptrdiff_t>(random.below(open_batches.size()));
        table.settle(chosen->first, chosen->second);
        for (std::uint64_t& id : naive.batch) id = id == chosen->second ? 0 : id;
        open_batches.erase(chosen);
    }

    void compare() {
        naive.refresh_parked();
        PageTotals sum;
        Bytes live = 0;
        for (Bytes i = 0; i < length; ++i) live += naive.live[i] ? 1 : 0;
        for (Bytes i = 0; i < pages; ++i) {
            if (naive.extent[i] >= 0) sum.mapped += page;
            if (naive.state(i) == NaiveTable::Page::used) sum.used += page;
            if (naive.state(i) == NaiveTable::Page::retiring) sum.retiring += page;
        }
        for (const Bytes begin : naive.parked) sum.parked += naive.extent_pages(begin / page).size() * page;
        const PageTotals& totals = table.totals();
        if (!table.check().empty()) FAIL(table.check());
        if (totals.mapped != sum.mapped) FAIL("mapped " << totals.mapped << ", not " << sum.mapped);
        if (totals.used != sum.used) FAIL("used " << totals.used << ", not " << sum.used);
        if (totals.retiring != sum.retiring) FAIL("retiring " << totals.retiring << ", not " << sum.retiring);
        if (totals.parked != sum.parked) FAIL("parked " << totals.parked << ", not " << sum.parked);
        if (table.live().total() != live) FAIL("live " << table.live().total() << ", not " << live);
        std::vector<Bytes> order;
        for (const auto& [since, begin] : table.parked()) order.push_back(begin);
        if (order != naive.parked) FAIL("the parked extents are not in the order in which they became idle");
        compare_queries();
    }

    void compare_queries() {
        const Bytes begin = random.below(length);
        const ByteRange asked{begin, begin + 1 + random.below(length - begin)};
        const ByteRange touched = table.pages_of(asked);
        bool used = true;
        std::vector<ByteRange> gaps;
        for (Bytes i = touched.begin / page; i < touched.end / page; ++i) {
            used = used && naive.state(i) == NaiveTable::Page::used;
            if (naive.extent[i] >= 0) continue;
            if (gaps.empty() || gaps.back().end != i * page) gaps.push_back({i * page, i * page});
            gaps.back().end += page;
        }
        if (table.is_used(asked) != used) FAIL("is_used answers wrongly");
        if (table.gaps(touched) != gaps) FAIL("gaps answers wrongly");
        Bytes gap_end = touched.begin;
        while (gap_end < touched.end && naive.extent[gap_end / page] < 0) gap_end += page;
        if (table.gap_end(touched.begin, touched.end) != gap_end) FAIL("gap_end answers wrongly");
        std::set<std::uint64_t> batches(naive.batch.begin() + static_cast<std::ptrdiff_t>(asked.begin),
                                        naive.batch.begin() + static_cast<std::ptrdiff_t>(asked.end));
        batches.erase(0);
        const std::vector<std::uint64_t> found = table.batches_in(asked);
        if (found.size() != batches.size() || std::set(found.begin(), found.end()) != batches) {
            FAIL("batches_in answers wrongly");
        }
    }
};

TEST_CASE("a page table agrees with arrays of bytes and pages", "[page_table]") {
    const std::uint64_t seed = test_seed(20240602);
    CAPTURE(seed);
    Both both(seed);
    for (std::uint64_t step = 0; step < test_steps(30'000); ++step) {
        CAPTURE(step);
        switch (both.random.below(8)) {
            case 0: both.insert(); break;
            case 1: both.take(); break;
            case 2:
            case 3: both.claim(); break;
            case 4:
            case 5: both.release(); break;
            default: both.settle(); break;
        }
        both.compare();
    }
}

TEST_CASE("what is left of the clean part of an extent is never live", "[page_table]") {
    PageTable table(page);
    Extent extent;
    extent.range = extent.clean = {0, 4 * page};
    table.insert(std::move(extent));
    const auto clean = [&] { return table.find(0)->clean; };
    table.claim({0, 10});
    CHECK(clean() == ByteRange{10, 4 * page});
    table.claim({50, 54});
    CHECK(clean() == ByteRange{10, 50});  // the larger piece
    table.release({0, 10}, 1);
    table.settle({0, 10}, 1);
    CHECK(clean() == ByteRange{10, 50});  // used bytes are dirty for good
    table.claim({0, 50});
    CHECK(clean().empty());
    CHECK(table.check().empty());
}

TEST_CASE("bytes that are claimed again leave their batch", "[page_table]") {
    PageTable table(page);
    Extent extent;
    extent.range = {0, 2 * page};
    table.insert(std::move(extent));
    table.claim({0, 32});
    table.release({0, 32}, 1);
    CHECK(table.totals().retiring == 2 * page);
    table.claim({8, 12});
    CHECK(table.totals().used == page);
    CHECK(table.totals().retiring == page);
    table.settle({0, 32}, 1);
    CHECK(table.live().total() == 4);
    CHECK(table.totals().used == page);
    CHECK(table.totals().retiring == 0);
    CHECK(table.totals().parked == 0);
}

}  // namespace
}  // namespace elastikv::testing
