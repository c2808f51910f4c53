// Events and ranges: off unless asked for, whole, bounded, and balanced also where a driver call fails.
#include "base/events.h"
#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

constexpr std::uint32_t bit(EventKind kind) { return 1U << static_cast<unsigned>(kind); }
constexpr std::uint32_t everything = (1U << event_kinds) - 1;

struct Wanted {
    explicit Wanted(std::uint32_t kinds) {
        (void)take();
        queue.want(kinds);
    }
    ~Wanted() {
        queue.want(0);
        (void)take();
    }
    std::vector<Event> take() { return queue.take(std::chrono::milliseconds(0), dropped); }
    EventQueue& queue = EventQueue::instance();
    std::uint64_t dropped = 0;
};

TEST_CASE("growth, reclaim and running out are events, with what the pool then holds", "[events]") {
    Wanted wanted(everything);
    PoolFixture at({.options = {.name = "chat"}, .limit_pages = 4});
    at.pool->allocate(0, 3 * at.page);
    at.pool->allocate(0x10 * at.page, at.page);
    CHECK_THROWS_AS(at.pool->allocate(8 * at.page, at.page), OutOfPhysicalMemory);
    at.pool->deallocate(0, 3 * at.page);
    const std::vector<Event> events = wanted.take();
    REQUIRE(events.size() == 4);
    const EventKind kinds[] = {EventKind::growth, EventKind::growth, EventKind::out_of_memory, EventKind::reclaim};
    const Bytes sizes[] = {3 * at.page, at.page, at.page, 3 * at.page};
    const Bytes physical[] = {3 * at.page, 4 * at.page, 4 * at.page, at.page};
    for (std::size_t i = 0; i < events.size(); ++i) {
        CHECK(events[i].kind == kinds[i]);
        CHECK(events[i].bytes == sizes[i]);
        CHECK(events[i].physical == physical[i]);
        CHECK(events[i].pool == "chat");
    }
    CHECK(wanted.dropped == 0);
}

TEST_CASE("only what is wanted is recorded", "[events]") {
    Wanted wanted(bit(EventKind::reclaim));
    PoolFixture at;
    at.pool->allocate(0, at.page);
    CHECK(wanted.take().empty());
    wanted.queue.want(0);
    at.pool->deallocate(0, at.page);
    CHECK(wanted.take().empty());
}

TEST_CASE("events that nobody takes are bounded and counted", "[events]") {
    Wanted wanted(everything);
    PoolFixture at;
    for (int i = 0; i < 5000; ++i) {
        at.pool->allocate(0, at.page);
        at.pool->deallocate(0, at.page);
    }
    const std::size_t taken = wanted.take().size();
    CHECK(taken < 10'000);
    CHECK(taken + wanted.dropped == 10'000);
}

int open_ranges = 0;
int all_ranges = 0;
constexpr RangeHooks counting{[](const char*) noexcept { ++open_ranges, ++all_ranges; },
                              []() noexcept { --open_ranges; }};

TEST_CASE("ranges begin and end around every extent, also where the driver refuses", "[events]") {
    set_range_hooks(&counting);
    all_ranges = 0;
    PoolFixture at;
    for (const DriverCall call : {DriverCall::create, DriverCall::map, DriverCall::set_access}) {
        at.faults->fail_nth(1, call);
        CHECK_THROWS_AS(at.pool->allocate(0, at.page), VmmError);
        CHECK(open_ranges == 0);
    }
    at.pool->allocate(0, at.page);
    at.pool->deallocate(0, at.page);
    set_range_hooks(nullptr);
    CHECK(open_ranges == 0);
    CHECK(all_ranges >= 5);
}

TEST_CASE("bytes ever created and released are counted", "[events]") {
    PoolFixture at;
    at.pool->allocate(0, 3 * at.page);
    at.pool->deallocate(0, 3 * at.page);
    at.pool->allocate(0, 2 * at.page);
    CHECK(at.pool->stats().created == 5 * at.page);
    CHECK(at.pool->stats().released == 3 * at.page);
}

}  // namespace
}  // namespace elastikv::testing
