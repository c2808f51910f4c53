// Compaction: idle pages of extents that others keep in use go back, beneath addresses and content that stay.
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("invariant 5: compaction changes neither addresses nor content", "[pool][compact]") {
    for (const bool dirty : {false, true}) {
        PoolFixture at({.dirty = dirty});
        const Address base = at.pool->base_address();
        const Address address = at.pool->allocate(0, 16 * at.page);
        for (Bytes i = 0; i < 16; ++i) at.stamp(i * at.page, at.page, static_cast<std::uint8_t>(i + 1));
        at.pool->deallocate(at.page / 2, 3 * at.page);  // leaves half a page at each end
        at.pool->deallocate(6 * at.page, 2 * at.page);
        at.pool->deallocate(15 * at.page, at.page);
        CHECK(at.pool->stats().stranded == 5 * at.page);
        CHECK(at.pool->compact() == 5 * at.page);
        CHECK(at.pool->base_address() == base);
        CHECK(at.pool->base_address() == address);
        CHECK(at.pool->physical_memory_usage() == 11 * at.page);
        CHECK(at.pool->stats().stranded == 0);
        CHECK(at.pool->stats().extents == 3);
        CHECK(at.holds(0, at.page / 2, 1));
        CHECK(at.holds(3 * at.page + at.page / 2, at.page / 2, 4));
        for (const Bytes i : {4, 5, 8, 9, 10, 11, 12, 13, 14}) {
            CHECK(at.holds(i * at.page, at.page, static_cast<std::uint8_t>(i + 1)));
        }
        at.require_sound();
        // What was given back can be had again, and what was moved can be freed.
        at.pool->allocate(6 * at.page, 2 * at.page, zeroed());
        CHECK(at.holds(6 * at.page, 2 * at.page, 0));
        at.pool->deallocate(4 * at.page, 11 * at.page);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("compaction gives back what is parked, and nothing where all is in use", "[pool][compact]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    CHECK(at.pool->compact() == 0);
    at.pool->allocate(0, 4 * at.page);
    at.pool->allocate(8 * at.page, 4 * at.page);
    at.pool->deallocate(8 * at.page, 4 * at.page);
    CHECK(at.pool->compact() == 4 * at.page);
    const std::uint64_t creates = at.calls(DriverCall::create);
    CHECK(at.pool->compact() == 0);
    CHECK(at.calls(DriverCall::create) == creates);
    at.finish();
}

TEST_CASE("compaction leaves memory alone whose release waits for a gate", "[pool][compact]") {
    PoolFixture at({.asynchronous = true});
    const auto gate = std::make_shared<ReleaseGate>();
    at.pool->allocate(0, 4 * at.page);
    at.pool->deallocate(0, 2 * at.page, default_stream, gate);
    CHECK(at.pool->compact() == 0);
    CHECK(at.pool->physical_memory_usage() == 4 * at.page);
    gate->open();
    CHECK(at.pool->compact() == 2 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("compaction waits for the device", "[pool][compact]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging);
        const Bytes page = pool.page_size();
        const Address base = pool.allocate(0, 4 * page);
        lagging->enqueue({}, base, 4 * page, [=] { std::memset(host_pointer(base), 0x31, 4 * page); });
        pool.deallocate(page, 2 * page);
        CHECK(pool.compact() == 2 * page);
        CHECK(all_bytes_are(pool.device(), base, page, 0x31));
        CHECK(all_bytes_are(pool.device(), base + 3 * page, page, 0x31));
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("without room in the budget for a copy compaction leaves things as they are", "[pool][compact]") {
    PoolFixture at({.limit_pages = 8});
    at.pool->allocate(0, 8 * at.page);
    at.stamp(0, 8 * at.page, 3);
    at.pool->deallocate(2 * at.page, at.page);
    CHECK(at.pool->compact() == 0);
    CHECK(at.holds(0, 2 * at.page, 3));
    CHECK(at.holds(3 * at.page, 5 * at.page, 3));
    at.require_sound();
    at.finish();
}

TEST_CASE("a compaction that runs out of budget after its first copy gives that back", "[pool][compact]") {
    PoolFixture at({.limit_pages = 9});
    at.pool->allocate(0, 8 * at.page);
    at.stamp(0, 8 * at.page, 3);
    at.pool->deallocate(at.page, 2 * at.page);  // runs of one page and of five; there is room for one
    CHECK(at.pool->compact() == 0);
    CHECK(at.budget->charged() == 8 * at.page);
    // Even where the driver refuses to take the copy back at first.
    at.faults->fail_nth(1, DriverCall::release);
    CHECK(at.pool->compact() == 0);
    CHECK(at.faults->struck());
    CHECK(at.budget->charged() == 8 * at.page);
    CHECK(at.host->live_extents() == 1);
    CHECK(at.holds(0, at.page, 3));
    CHECK(at.holds(3 * at.page, 5 * at.page, 3));
    at.require_sound();
    at.finish();
}

TEST_CASE("pages that compaction could not put back keep their content until it can", "[pool][compact]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.stamp(0, 4 * at.page, 0x66);
    at.pool->deallocate(0, 2 * at.page);
    // Map: the window of the copy, the copy's own place, then the old extent, again and again.
    at.faults->fail_from(2, DriverCall::map);
    CHECK_THROWS_AS(at.pool->compact(), MappingFailed);
    CHECK(at.pool->stats().live == 2 * at.page);
    at.require_sound();
    at.faults->heal();
    CHECK(at.pool->compact() == 2 * at.page);
    CHECK(at.holds(2 * at.page, 2 * at.page, 0x66));
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
