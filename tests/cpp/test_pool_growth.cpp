// How a pool grows: one extent for a known size, few for open-ended growth, page by page when the budget is tight.
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

struct Grown {
    Bytes worst_overshoot = 0;  // of what was needed at the time, in thousandths
    Bytes needed = 0;
};

// Grows from nothing to `pages` in steps of one page, as a sequence of tokens does.
Grown grow_page_by_page(PoolFixture& at, Bytes pages) {
    Grown grown;
    for (Bytes held = 0; held < pages * at.page; held += at.page) {
        at.pool->allocate(held, at.page, open_ended(held, at.pool->capacity()));
        const Bytes needed = held + at.page;
        const Bytes beyond = at.pool->physical_memory_usage() - needed;
        grown.worst_overshoot = std::max(grown.worst_overshoot, beyond * 1000 / needed);
        grown.needed = needed;
    }
    return grown;
}

TEST_CASE("open-ended growth overshoots by an eighth at most, in few extents", "[pool][growth]") {
    PoolFixture at({.pages = 2048});
    const Grown grown = grow_page_by_page(at, 512);
    CHECK(grown.worst_overshoot <= 125);
    const MemoryStats stats = at.pool->stats();
    CHECK(stats.live == grown.needed);
    CHECK(stats.extents < 60);  // 512 by single pages; 8 + log(512 / 8) / log(1.125) ~ 43 by shares
    CHECK(at.calls(DriverCall::create) == stats.extents);
    CHECK(at.calls(DriverCall::map) == stats.extents);
    CHECK(at.calls(DriverCall::set_access) == stats.extents);
    at.require_sound();
    at.finish();
}

TEST_CASE("the share of open-ended growth is an option", "[pool][growth]") {
    PoolFixture none({.pages = 256, .options = {.growth_share = 0.0}});
    CHECK(grow_page_by_page(none, 64).worst_overshoot == 0);
    CHECK(none.pool->stats().extents == 64);
    none.finish();
    PoolFixture whole({.pages = 256, .options = {.growth_share = 1.0}});
    CHECK(grow_page_by_page(whole, 64).worst_overshoot <= 1000);
    CHECK(whole.pool->stats().extents <= 8);
    whole.finish();
}

TEST_CASE("open-ended growth stays below the end that it is given", "[pool][growth]") {
    PoolFixture at;
    at.pool->allocate(0, 32 * at.page);
    at.pool->allocate(32 * at.page, 1, open_ended(32 * at.page, 34 * at.page + 17));
    CHECK(at.pool->physical_memory_usage() == 34 * at.page);  // the end is in the middle of a page, which is not taken
    at.finish();
}

TEST_CASE("open-ended growth stays in its gap and in the capacity", "[pool][growth]") {
    PoolFixture at({.pages = 40});
    at.pool->allocate(0, 32 * at.page);
    at.pool->allocate(34 * at.page, at.page);
    at.pool->allocate(32 * at.page, 1, open_ended(32 * at.page, ~Bytes{0}));
    CHECK(at.pool->physical_memory_usage() == 35 * at.page);
    at.pool->allocate(39 * at.page, 1, open_ended(32 * at.page, ~Bytes{0}));
    CHECK(at.pool->physical_memory_usage() == 36 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("what was mapped ahead is used without a driver call", "[pool][growth]") {
    PoolFixture at;
    at.pool->allocate(0, 32 * at.page);
    at.pool->allocate(32 * at.page, at.page, open_ended(32 * at.page, at.pool->capacity()));
    CHECK(at.pool->physical_memory_usage() == 37 * at.page);  // the page, and an eighth of 33 more
    const std::uint64_t calls = at.all_calls();
    for (Bytes i = 33; i < 37; ++i) {
        at.pool->allocate(i * at.page, at.page, open_ended(i * at.page, at.pool->capacity()));
    }
    CHECK(at.all_calls() == calls);
    CHECK(at.pool->stats().stranded == 0);
    at.finish();
}

TEST_CASE("open-ended growth takes exactly what it needs where the budget is tight", "[pool][growth]") {
    PoolFixture at({.limit_pages = 34});
    at.pool->allocate(0, 32 * at.page);
    at.pool->allocate(32 * at.page, at.page, open_ended(32 * at.page, at.pool->capacity()));
    at.pool->allocate(33 * at.page, at.page, open_ended(33 * at.page, at.pool->capacity()));
    CHECK(at.budget->charged() == 34 * at.page);
    CHECK_THROWS_AS(at.pool->allocate(34 * at.page, 1, open_ended(34 * at.page, at.pool->capacity())),
                    OutOfPhysicalMemory);
    CHECK(at.budget->peak() == 34 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("open-ended growth takes exactly what it needs where the device has no more", "[pool][growth]") {
    PoolFixture at;
    at.pool->allocate(0, 32 * at.page);
    at.faults->fail_nth(1, DriverCall::create, StatusCode::out_of_memory);
    at.pool->allocate(32 * at.page, at.page, open_ended(32 * at.page, at.pool->capacity()));
    CHECK(at.faults->struck());
    CHECK(at.pool->physical_memory_usage() == 33 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("a request over parked, used and unmapped pages makes one extent a gap", "[pool][growth]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    at.pool->allocate(4 * at.page, 2 * at.page);
    at.pool->deallocate(4 * at.page, 2 * at.page);
    at.pool->allocate(10 * at.page, 100);
    at.pool->allocate(0, 10 * at.page);
    CHECK(at.pool->stats().extents == 4);
    CHECK(at.pool->stats().used == 11 * at.page);
    CHECK(at.calls(DriverCall::create) == 4);
    at.finish();
}

TEST_CASE("a request that does not fit names what was asked for, what there is, and who holds it", "[pool][growth]") {
    PoolFixture at({.limit_pages = 8});
    at.pool->allocate(0, 6 * at.page);
    try {
        at.pool->allocate(6 * at.page, 3 * at.page);
        FAIL("it was allocated");
    } catch (const OutOfPhysicalMemory& error) {
        CHECK(error.requested == 3 * at.page);
        CHECK(error.available == 2 * at.page);
        CHECK_THAT(error.what(), Catch::Matchers::ContainsSubstring("'pool'"));
    }
    at.require_sound();
    CHECK(at.budget->charged() == 6 * at.page);
    at.finish();
}

TEST_CASE("a pool without a budget is limited by the device alone", "[pool][growth]") {
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(host);
    {
        VirtualMemoryPool pool(MiB, faults, {.park_limit = MiB});
        const Bytes page = pool.page_size();
        pool.allocate(0, 8 * page);
        pool.deallocate(0, 8 * page);
        faults->fail_from(1, DriverCall::create, StatusCode::out_of_memory);
        CHECK_THROWS_AS(pool.allocate(100 * page, 4 * page), OutOfPhysicalMemory);
        CHECK(pool.physical_memory_usage() == 0);  // parked memory was given to the device before it failed
        faults->heal();
        CHECK(pool.check().empty());
    }
    require_nothing_left(*host);
}

TEST_CASE("zeroed bytes are zero, in fresh memory and in memory that was used before", "[pool][scrub]") {
    for (const bool dirty : {false, true}) {
        CAPTURE(dirty);
        PoolFixture at({.options = {.park_limit = MiB}, .dirty = dirty});
        at.pool->allocate(0, 4 * at.page, zeroed());
        CHECK(at.holds(0, 4 * at.page, 0));
        at.stamp(0, 4 * at.page, 0xab);
        at.pool->deallocate(100, 2 * at.page);
        at.pool->allocate(100, 2 * at.page, zeroed());
        CHECK(at.holds(100, 2 * at.page, 0));
        CHECK(at.holds(0, 100, 0xab));  // the neighbours in the same pages keep theirs
        CHECK(at.holds(2 * at.page + 100, 2 * at.page - 100, 0xab));
        at.finish();
    }
}

TEST_CASE("what is known to be clean is not zeroed again", "[pool][scrub]") {
    PoolFixture at({.dirty = true});
    at.pool->allocate(0, 32 * at.page);
    AllocateOptions options = open_ended(32 * at.page, at.pool->capacity());
    options.zero = true;
    at.pool->allocate(32 * at.page, 100, options);
    CHECK(at.calls(DriverCall::zero) == 1);
    for (Bytes offset = 32 * at.page + 100; offset < 33 * at.page - 100; offset += 100) {
        at.pool->allocate(offset, 100, options);
        CHECK(at.holds(offset, 100, 0));
        at.stamp(offset, 100, 0xee);
    }
    CHECK(at.calls(DriverCall::zero) == 1);
    at.finish();
}

TEST_CASE("a request may be kept to extents of a size, which then go back one by one", "[pool][growth]") {
    PoolFixture at;
    AllocateOptions options;
    options.extents.largest = 4 * at.page;
    CHECK(at.pool->try_claim(0, 10 * at.page, options) == 0);
    CHECK(at.pool->stats().extents == 3);
    const std::vector<ByteRange> all = {{0, 4 * at.page}, {4 * at.page, 8 * at.page}, {8 * at.page, 10 * at.page}};
    CHECK(at.pool->extents_within(0, 10 * at.page) == all);
    CHECK(at.pool->extents_within(at.page, 8 * at.page) == std::vector<ByteRange>{all[1]});
    CHECK(at.pool->extents_within(0, 4 * at.page - 1).empty());
    const std::vector<ByteRange> halves = {{0, 2 * at.page}, {2 * at.page, 5 * at.page}, {9 * at.page, 10 * at.page}};
    const std::vector<std::vector<ByteRange>> pieces = {{{0, 2 * at.page}, {2 * at.page, 4 * at.page}}};
    CHECK(at.pool->extents_within(halves) == pieces);
    at.pool->deallocate(4 * at.page, 4 * at.page);
    CHECK(at.pool->physical_memory_usage() == 6 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("towards the end of a request extents may be halves of what is left", "[pool][growth]") {
    PoolFixture at;
    AllocateOptions options;
    options.extents.largest = 8 * at.page;
    options.extents.smallest = 2 * at.page;
    const auto sizes = [&](Bytes begin, Bytes pages) {
        at.pool->allocate(begin, pages * at.page, options);
        std::vector<Bytes> found;
        for (const ByteRange& each : at.pool->extents_within(begin, pages * at.page)) {
            found.push_back(each.size() / at.page);
        }
        at.require_sound();
        return found;
    };
    CHECK(sizes(0, 32) == std::vector<Bytes>{8, 8, 8, 4, 2, 2});
    CHECK(sizes(34 * at.page, 13) == std::vector<Bytes>{7, 3, 2, 1});
    CHECK(sizes(48 * at.page, 1) == std::vector<Bytes>{1});
    options.open_ended = true;
    options.held = 32 * at.page;
    options.grow_end = at.pool->capacity();
    at.pool->allocate(50 * at.page, 10 * at.page, options);  // 5, 3, and 2 with 4 ahead
    CHECK(at.pool->stats().extents == 6 + 4 + 1 + 3);
    CHECK(at.pool->physical_memory_usage() == (32 + 13 + 1 + 14) * at.page);
    at.finish();
}

TEST_CASE("open-ended growth in extents of a size maps ahead within the last of them", "[pool][growth]") {
    PoolFixture at({.options = {.growth_share = 1.0}});
    AllocateOptions options = open_ended(0, 64 * at.page);
    options.extents.largest = 4 * at.page;
    at.pool->allocate(0, 10 * at.page, options);
    CHECK(at.pool->physical_memory_usage() == 12 * at.page);
    CHECK(at.pool->stats().extents == 3);
    options.held = 10 * at.page;
    at.pool->allocate(10 * at.page, 3 * at.page, options);
    CHECK(at.pool->physical_memory_usage() == 16 * at.page);
    CHECK(at.pool->stats().extents == 4);
    at.require_sound();
    at.finish();
}

TEST_CASE("several parts are claimed as a whole or not at all", "[pool][growth]") {
    PoolFixture at({.limit_pages = 6});
    at.pool->allocate(20 * at.page, at.page);
    const std::vector<ByteRange> parts = {{0, at.page}, {4 * at.page, 6 * at.page + 1}, {10 * at.page, 11 * at.page}};
    CHECK(at.pool->try_claim_all(parts) == 0);
    CHECK(at.pool->stats().live == 5 * at.page + 1);
    at.pool->deallocate_all(parts, {});
    CHECK(at.pool->physical_memory_usage() == at.page);

    const std::vector<ByteRange> taken = {{0, at.page}, {20 * at.page, 21 * at.page}};
    CHECK(throws<AlreadyMapped>([&] { (void)at.pool->try_claim_all(taken); }));
    const std::vector<ByteRange> large = {{0, 4 * at.page}, {8 * at.page, 10 * at.page}};
    CHECK(at.pool->try_claim_all(large) == 6 * at.page);  // nothing of it is kept
    for (const std::vector<ByteRange>& wrong :
         {std::vector<ByteRange>{{0, 1}, {2, 3}}, {{at.page, 2 * at.page}, {0, 1}}, {{0, 1}, {0, 1}}}) {
        CHECK(throws<InvalidArgument>([&] { (void)at.pool->try_claim_all(wrong); }));
    }
    CHECK(throws<InvalidSize>([&] { (void)at.pool->try_claim_all(std::vector<ByteRange>{{0, 0}}); }));
    CHECK(at.pool->physical_memory_usage() == at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("a claim says what room it needs, and makes none", "[pool][growth]") {
    PoolFixture at({.options = {.park_limit = MiB}, .limit_pages = 8});
    at.pool->allocate(32 * at.page, 4 * at.page);
    at.pool->deallocate(32 * at.page, 4 * at.page);  // parked, so there is room to be made
    AllocateOptions options;
    options.extents.largest = 2 * at.page;
    CHECK(at.pool->try_claim(0, 8 * at.page, options) == 8 * at.page);  // nothing of it is kept
    CHECK(at.pool->stats().live == 0);
    CHECK(at.pool->physical_memory_usage() == 4 * at.page);
    CHECK(at.pool->make_room(4 * at.page, false) == 4 * at.page);
    CHECK(at.pool->try_claim(0, 8 * at.page, options) == 0);
    CHECK(at.pool->out_of_memory(at.page).requested == at.page);
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
