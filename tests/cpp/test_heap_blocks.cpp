// Blocks of the heap: sizes, places, splitting, coalescing, statistics.
#include "support/heap_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("heap: sizes are rounded to 512 bytes, and 0 is refused", "[heap]") {
    HeapFixture at;
    for (const auto& [asked, given] : {std::pair<Bytes, Bytes>{1, 512}, {512, 512}, {513, 1024}, {1 * MiB, 1 * MiB}}) {
        CAPTURE(asked);
        const Address address = at.get(asked);
        const auto view = at.heap->find(address);
        REQUIRE(view.has_value());
        CHECK(view->size == given);
        CHECK(view->requested == asked);
        CHECK(view->allocated);
        CHECK(view->active);
        CHECK(address % heap_unit == 0);
    }
    CHECK_THROWS_AS(at.get(0), InvalidSize);
    CHECK_THROWS_AS(at.get(~Bytes{0}), InvalidSize);
    at.finish();
}

TEST_CASE("heap: freeing what is not handed out is told and changes nothing", "[heap]") {
    HeapFixture at;
    const Address block = at.get(2048);
    CHECK_FALSE(at.heap->free(block + 512));
    CHECK_FALSE(at.heap->free(0));
    CHECK_FALSE(at.heap->record_stream(block + 512, {1}));
    CHECK(at.heap->free(block));
    CHECK_FALSE(at.heap->free(block));
    CHECK_FALSE(at.heap->find(block).has_value());
    CHECK_FALSE(at.heap->record_stream(block, {1}));
    at.finish();
}

TEST_CASE("heap: the smallest free block that holds a request is split for it", "[heap]") {
    HeapFixture at;
    const Address big = at.get(8 * KiB);
    const Address between = at.get(512);
    const Address close = at.get(3 * KiB);
    const Address last = at.get(512);
    CHECK(between == big + 8 * KiB);
    CHECK(last == close + 3 * KiB);
    at.heap->free(big);
    at.heap->free(close);
    CHECK(at.get(2 * KiB) == close);
    CHECK(at.get(1 * KiB) == close + 2 * KiB);
    CHECK(at.get(4 * KiB) == big);
    CHECK(at.get(4 * KiB) == big + 4 * KiB);
    at.finish();
}

TEST_CASE("heap: freed neighbours coalesce in every order", "[heap]") {
    std::vector<std::size_t> order{0, 1, 2, 3};
    do {
        HeapFixture at;
        std::vector<Address> blocks;
        for (int i = 0; i < 4; ++i) blocks.push_back(at.get(1 * KiB));
        for (const std::size_t i : order) {
            CHECK(at.heap->free(blocks[i]));
            at.require_sound();
        }
        CHECK(at.heap->largest_free() == at.page);
        CHECK(at.heap->stats().inactive_split.of[0].current == 0);
        CHECK(at.get(4 * KiB) == blocks[0]);
        at.finish();
    } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("heap: small and large requests live apart, and so do streams", "[heap]") {
    HeapFixture at;
    at.get(1 * MiB);
    at.get(1 * MiB + 1);
    at.get(1 * MiB, 5);
    const auto segments = at.heap->snapshot();
    REQUIRE(segments.size() == 3);
    for (const SegmentView& segment : segments) {
        CHECK(segment.elastic);
        Address expected = segment.address;
        for (const BlockView& block : segment.blocks) {
            CHECK(block.address == expected);
            expected += block.size;
        }
        CHECK(expected == segment.address + segment.size);
        REQUIRE(segment.blocks.front().allocated);
        CHECK(segment.large == (segment.blocks.front().requested > 1 * MiB));
        CHECK(at.heap->base_of(segment.blocks.front().address) == std::pair{segment.address, segment.size});
    }
    at.finish();
}

TEST_CASE("heap: statistics count as torch's do", "[heap]") {
    HeapFixture at({.lags = true});
    const Address one = at.get(1000);
    const Address two = at.get(3 * MiB);
    HeapStats stats = at.heap->stats();
    CHECK(stats.allocation.of[0].current == 2);
    CHECK(stats.allocation.of[1].current == 1);
    CHECK(stats.allocation.of[2].current == 1);
    CHECK(stats.allocated_bytes.of[1].current == 1024);
    CHECK(stats.requested_bytes.of[1].current == 1000);
    CHECK(stats.inactive_split.of[1].current == 1);
    CHECK(stats.inactive_split_bytes.of[1].current == static_cast<std::int64_t>(at.page) - 1024);
    CHECK(stats.reserved_bytes.of[0].current == static_cast<std::int64_t>(at.budget->charged()));

    at.lagging->enqueue({1}, one, 1000, [] {});
    at.heap->record_stream(one, {1});
    at.heap->free(one);
    stats = at.heap->stats();
    CHECK(stats.allocation.of[1].current == 0);
    CHECK(stats.active.of[1].current == 1);  // another stream may use it still
    CHECK(stats.active_bytes.of[1].current == 1024);
    CHECK(stats.allocation.of[0].peak == 2);
    CHECK(stats.allocation.of[0].freed == 1);

    at.heap->reset_peak_stats();
    at.heap->reset_accumulated_stats();
    stats = at.heap->stats();
    CHECK(stats.allocation.of[0].current == 1);
    CHECK(stats.allocation.of[0].peak == 1);
    CHECK(stats.allocation.of[0].allocated == 0);
    CHECK(stats.allocation.of[0].freed == 0);
    CHECK(stats.device_allocs == 0);

    at.heap->free(two);
    at.heap->empty_cache();
    stats = at.heap->stats();
    CHECK(stats.active.of[0].current == 0);
    CHECK(stats.reserved_bytes.of[0].current == 0);
    CHECK(stats.segment.of[0].current == 0);
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
