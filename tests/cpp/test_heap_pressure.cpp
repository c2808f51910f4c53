// The heap and others on one budget: who gives way, and what is left when there is no more.
#include "support/heap_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

TEST_CASE("heap: out of memory changes nothing, names the holders, and can be recovered from", "[heap][pressure]") {
    HeapFixture at({.limit = 16 * MiB});
    const Address held = at.get(12 * MiB);
    const HeapSnapshot before(*at.heap);
    CHECK_THROWS_AS(at.get(8 * MiB), OutOfPhysicalMemory);
    CHECK_THROWS_WITH(at.get(8 * MiB), Catch::Matchers::ContainsSubstring("heap"));
    CHECK(HeapSnapshot(*at.heap) == before);
    CHECK(at.heap->stats().out_of_memory == 2);
    CHECK(at.budget->charged() == 12 * MiB);
    at.heap->free(held);
    CHECK(at.get(15 * MiB) != 0);
    at.finish();
}

TEST_CASE("heap: idle memory of one stream serves another", "[heap][pressure]") {
    for (const bool lags : {false, true}) {
        CAPTURE(lags);
        HeapFixture at({.limit = 16 * MiB, .lags = lags});
        at.heap->free(at.get(14 * MiB, 1));
        const Address other = at.get(14 * MiB, 2);
        CHECK(at.heap->find(other).has_value());
        CHECK(at.budget->charged() <= 16 * MiB);
        at.finish();
    }
}

TEST_CASE("heap: growth gives idle extents back rather than pass its highest load", "[heap][pressure]") {
    HeapFixture at;
    at.heap->free(at.get(64 * MiB, 1));
    at.get(32 * MiB, 2);
    CHECK(at.heap->stats().reserved_bytes.of[0].current <= static_cast<std::int64_t>(65 * MiB));
    at.finish();
}

TEST_CASE("heap: growth takes a little ahead of need, where nobody else wants it", "[heap][pressure]") {
    HeapFixture at(
        {.options = {.idle_share = 0.25, .largest_extent = 64 * MiB}, .addresses = 16 * GiB, .limit = 128 * MiB});
    at.get(32 * MiB);
    CHECK(at.budget->charged() == 40 * MiB);
    at.get(8 * MiB);
    CHECK(at.budget->charged() == 40 * MiB);
    CHECK(at.pool->stats().driver_calls[static_cast<std::size_t>(DriverCall::create)].count == 1);
    at.get(80 * MiB);  // a quarter more would pass the limit
    CHECK(at.budget->charged() == 120 * MiB);
    at.heap->free(at.get(8 * MiB));
    at.finish();
}

TEST_CASE("heap: after a peak that is over growth follows need again", "[heap][pressure]") {
    HeapFixture at({.options = {.idle_share = 0.25}, .addresses = 16 * GiB});
    at.heap->free(at.get(64 * MiB));
    at.heap->empty_cache();
    CHECK(at.budget->charged() == 0);
    at.get(4 * MiB);
    CHECK(at.budget->charged() == 5 * MiB);
    at.finish();
}

TEST_CASE("heap: extents are as large as the option allows", "[heap][pressure]") {
    HeapOptions options{.idle_share = 0};
    options.largest_extent = 4 * MiB;
    HeapFixture at({.options = options});
    const Address first = at.get(16 * MiB);
    CHECK(at.pool->stats().driver_calls[static_cast<std::size_t>(DriverCall::create)].count == 4);
    at.heap->free(first);
    at.get(2 * MiB);
    CHECK(at.heap->release_idle(~Bytes{0}) == 12 * MiB);
    at.finish();
}

TEST_CASE("heap: where extents are as small as blocks, no idle memory keeps a request from being served",
          "[heap][pressure]") {
    constexpr Bytes limit = 256 * MiB;
    const bool of_the_heap = GENERATE(false, true);
    HeapOptions options{.idle_share = 0, .largest_extent = 2 * MiB};
    if (of_the_heap) options.limit = limit;
    HeapFixture at({.options = options, .limit = of_the_heap ? no_limit : limit});
    Random random(11);
    std::vector<std::pair<Address, Bytes>> live;
    Bytes used = 0;
    std::uint64_t refused = 0;
    for (int step = 0; step < 4'000; ++step) {
        CAPTURE(step);
        if (!live.empty() && random.one_in(2)) {
            std::swap(live[random.below(live.size())], live.back());
            at.heap->free(live.back().first);
            used -= live.back().second;
            live.pop_back();
            continue;
        }
        const Bytes size = random.between(1, 24) * 2 * MiB;
        if (used + size > limit) {
            REQUIRE_THROWS_AS(at.get(size), OutOfPhysicalMemory);
            ++refused;
            continue;
        }
        live.emplace_back(at.get(size), size);
        used += size;
        REQUIRE(at.budget->charged() <= limit);
    }
    CHECK(refused > 100);
    for (const auto& block : live) at.heap->free(block.first);
    at.finish();
}

TEST_CASE("heap: extents are small where little room is left, so that what is idle can be given back",
          "[heap][pressure]") {
    HeapFixture at({.addresses = 4 * GiB, .limit = 64 * MiB});
    const Address first = at.get(48 * MiB);
    at.heap->free(first);
    at.get(2 * MiB);  // cut from what is idle: one extent is held by it
    CHECK(at.get(56 * MiB, 1) != 0);
    at.finish();
    HeapFixture roomy({.addresses = 4 * GiB});
    roomy.get(512 * MiB);
    CHECK(roomy.calls(DriverCall::create) == 1);
    roomy.finish();
}

TEST_CASE("heap: another client's need takes idle memory, never blocks in use", "[heap][pressure]") {
    HeapFixture at({.limit = 16 * MiB});
    const Address kept = at.get(4 * MiB);
    at.heap->free(at.get(8 * MiB));
    const auto other = pool_on(at.budget, "other", 64 * MiB, at.faults);
    other->allocate(0, 10 * MiB);
    CHECK(at.heap->find(kept).has_value());
    CHECK_THROWS_AS(other->allocate(32 * MiB, 10 * MiB), OutOfPhysicalMemory);
    CHECK_THROWS_AS(at.get(8 * MiB), OutOfPhysicalMemory);
    other->deallocate(0, 10 * MiB);
    CHECK(at.get(8 * MiB) != 0);
    other->close();
    const std::size_t reservations = at.host->live_reservations();
    CHECK(reservations == 2);
    at.require_sound();
}

TEST_CASE("heap: its own limit holds", "[heap][pressure]") {
    HeapOptions options{.idle_share = 0};
    options.limit = 8 * MiB;
    HeapFixture at({.options = options});
    const Address block = at.get(6 * MiB);
    CHECK_THROWS_AS(at.get(4 * MiB), OutOfPhysicalMemory);
    at.heap->free(block);
    CHECK(at.get(7 * MiB, 1) != 0);
    CHECK(at.heap->stats().reserved_bytes.of[0].peak <= static_cast<std::int64_t>(8 * MiB));
    at.finish();
}

TEST_CASE("heap: empty_cache gives back an extent that was taken up again in part", "[heap][pressure]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(8 * MiB, 1);
    at.lagging->enqueue({1}, block, 8 * MiB, [] {});
    at.heap->free(block);
    at.heap->release_idle(~Bytes{0});
    const Address part = at.get(2 * MiB, 1);  // of the same extent, which still retires
    CHECK(part == block);
    CHECK(at.budget->charged() == 8 * MiB);
    at.heap->free(part);
    CHECK(at.heap->empty_cache() == 2 * MiB);
    CHECK(at.heap->stats().reserved_bytes.of[0].current == 0);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("heap: an extent whose idle parts lie in several blocks goes back", "[heap][pressure]") {
    HeapFixture at({.lags = true});
    const Address first = at.get(10 * MiB, 1);
    const Address second = at.get(4 * MiB, 1);
    CHECK(second == first + 10 * MiB);  // in the same range, an extent each
    at.lagging->enqueue({1}, first, 10 * MiB, [] {});
    at.heap->free(first);
    CHECK(at.heap->release_idle(10 * MiB) == 10 * MiB);
    at.heap->free(second);
    // The first extent still retires; its end and its front are taken up again, with a hole between them.
    const Address end = at.get(5 * MiB, 1);
    CHECK(end == first + 9 * MiB);
    const Address front = at.get(2 * MiB, 1);
    CHECK(front == first);
    CHECK(at.budget->charged() == 14 * MiB);
    at.lagging->enqueue({1}, front, 2 * MiB, [] {});
    at.heap->free(front);

    SECTION("once all of them are idle") {
        at.heap->free(end);
        CHECK(at.heap->empty_cache() == 7 * MiB);
        CHECK(at.heap->stats().reserved_bytes.of[0].current == 0);
        CHECK(at.budget->charged() == 0);
    }
    SECTION("not while one of them is in use") {
        CHECK(at.heap->empty_cache() == 0);
        CHECK(at.heap->find(end)->allocated);
        CHECK(at.heap->stats().reserved_bytes.of[0].current == 7 * MiB);
        CHECK(at.budget->charged() == 14 * MiB);
        at.heap->free(end);
    }
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
