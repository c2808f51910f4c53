// Freed extents: parked up to a limit, reused without a driver call, given back oldest first and under pressure.
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("parked memory is used again without a driver call", "[pool][park]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    at.pool->allocate(0, 16 * at.page);
    at.stamp(0, 16 * at.page, 7);
    at.pool->deallocate(0, 16 * at.page);
    CHECK(at.pool->stats().parked == 16 * at.page);
    const std::uint64_t calls = at.all_calls();
    at.pool->allocate(0, 16 * at.page);
    CHECK(at.all_calls() == calls);
    CHECK(at.pool->stats().parked == 0);
    CHECK(at.pool->stats().used == 16 * at.page);
    at.pool->deallocate(0, 16 * at.page);
    for (Bytes i = 0; i < 16; ++i) at.pool->allocate(i * at.page, at.page);
    CHECK(at.all_calls() == calls);
    at.finish();
}

TEST_CASE("without a park limit the host parks nothing", "[pool][park]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.pool->deallocate(0, 4 * at.page);
    CHECK(at.pool->physical_memory_usage() == 0);
    CHECK(at.host->live_extents() == 0);
    at.finish();
}

TEST_CASE("beyond the park limit the oldest goes first", "[pool][park]") {
    PoolFixture at;
    const Bytes page = at.page;
    PoolFixture limited({.options = {.park_limit = 3 * page}});
    for (const Bytes i : {Bytes{0}, Bytes{10}, Bytes{20}, Bytes{30}}) limited.pool->allocate(i * page, page);
    for (const Bytes i : {Bytes{20}, Bytes{0}, Bytes{30}}) limited.pool->deallocate(i * page, page);
    CHECK(limited.pool->stats().parked == 3 * page);
    limited.pool->deallocate(10 * page, page);
    CHECK(limited.pool->stats().parked == 3 * page);
    const std::uint64_t creates = limited.calls(DriverCall::create);
    for (const Bytes i : {Bytes{0}, Bytes{30}, Bytes{10}}) limited.pool->allocate(i * page, page);  // still there
    CHECK(limited.calls(DriverCall::create) == creates);
    limited.pool->allocate(20 * page, page);  // the one that was freed first
    CHECK(limited.calls(DriverCall::create) == creates + 1);
    limited.finish();
    at.finish();
}

TEST_CASE("trimming gives back as much as was asked for, oldest first", "[pool][park]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    for (Bytes i = 0; i < 8; ++i) at.pool->allocate(4 * i * at.page, 2 * at.page);
    for (Bytes i = 0; i < 8; ++i) at.pool->deallocate(4 * i * at.page, 2 * at.page);
    CHECK(at.pool->trim(0) == 0);
    CHECK(at.pool->trim(3 * at.page) == 4 * at.page);  // extents go whole
    CHECK(at.pool->stats().parked == 12 * at.page);
    const std::uint64_t creates = at.calls(DriverCall::create);
    at.pool->allocate(8 * at.page, 2 * at.page);  // the third is still there
    CHECK(at.calls(DriverCall::create) == creates);
    at.pool->allocate(0, 2 * at.page);
    CHECK(at.calls(DriverCall::create) == creates + 1);
    CHECK(at.pool->trim() == 10 * at.page);
    CHECK(at.pool->trim() == 0);
    at.require_sound();
    at.finish();
}

TEST_CASE("parked memory goes before a request fails", "[pool][park]") {
    PoolFixture at({.options = {.park_limit = MiB}, .limit_pages = 8});
    at.pool->allocate(0, 6 * at.page);
    at.pool->deallocate(0, 6 * at.page);
    at.pool->allocate(10 * at.page, 8 * at.page);
    CHECK(at.pool->stats().parked == 0);
    CHECK(at.budget->peak() == 8 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("stranded pages are told and are not parked", "[pool][park]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    at.pool->allocate(0, 8 * at.page);
    at.pool->deallocate(0, 7 * at.page);
    CHECK(at.pool->stats().stranded == 7 * at.page);
    CHECK(at.pool->stats().parked == 0);
    CHECK(at.pool->trim() == 0);
    at.pool->deallocate(7 * at.page, at.page);
    CHECK(at.pool->stats().stranded == 0);
    CHECK(at.pool->stats().parked == 8 * at.page);
    at.finish();
}

TEST_CASE("what the driver refuses to take back stays parked and is tried again", "[pool][park]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.faults->fail_nth(1, DriverCall::unmap);
    at.pool->deallocate(0, 4 * at.page);
    CHECK(at.pool->stats().parked == 4 * at.page);
    CHECK(at.pool->stats().reclaims_refused == 1);
    CHECK(at.budget->charged() == 4 * at.page);
    at.require_sound();
    CHECK(at.pool->trim() == 4 * at.page);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("an extent that is unmapped but not released is mapped again when it is taken up", "[pool][park]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.faults->fail_nth(1, DriverCall::release);
    at.pool->deallocate(0, 4 * at.page);
    CHECK(at.pool->stats().parked == 4 * at.page);
    CHECK(at.host->live_mappings() == 0);
    const std::uint64_t creates = at.calls(DriverCall::create);
    at.pool->allocate(0, 4 * at.page);
    CHECK(at.calls(DriverCall::create) == creates);
    at.stamp(0, 4 * at.page, 1);  // accessible
    at.require_sound();
    at.finish();
}

TEST_CASE("high-water marks stay", "[pool][park]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    at.pool->allocate(0, 8 * at.page);
    at.pool->deallocate(0, 8 * at.page);
    at.pool->allocate(20 * at.page, 4 * at.page);
    CHECK(at.pool->stats().peak_physical == 12 * at.page);
    CHECK(at.pool->stats().peak_used == 8 * at.page);
    at.pool->trim();
    CHECK(at.pool->stats().peak_physical == 12 * at.page);
    CHECK(at.budget->peak() == 12 * at.page);
    at.finish();
}

TEST_CASE("driver calls are counted by kind, with their failures", "[pool][stats]") {
    PoolFixture at;
    at.faults->fail_nth(1, DriverCall::map);
    CHECK_THROWS_AS(at.pool->allocate(0, at.page), MappingFailed);
    at.pool->allocate(0, at.page);
    const DriverCallTable calls = at.pool->stats().driver_calls;
    const auto of = [&](DriverCall call) { return calls[static_cast<std::size_t>(call)]; };
    CHECK(of(DriverCall::reserve).count == 1);
    CHECK(of(DriverCall::create).count == 2);
    CHECK(of(DriverCall::map).count == 2);
    CHECK(of(DriverCall::map).failures == 1);
    CHECK(of(DriverCall::set_access).count == 1);
    CHECK(of(DriverCall::release).count == 1);
    at.finish();
}

TEST_CASE("each page is in exactly one class", "[pool][stats]") {
    PoolFixture at({.options = {.park_limit = MiB}, .asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.pool->allocate(8 * at.page, 4 * at.page);
    at.pool->deallocate(8 * at.page, 4 * at.page);
    at.pool->drain();
    at.faults->hold_fences();
    at.pool->allocate(16 * at.page, 4 * at.page);
    at.pool->deallocate(17 * at.page, 2 * at.page);
    at.pool->deallocate(100, 200);
    const MemoryStats stats = at.pool->stats();
    CHECK(stats.used == 4 * at.page + 2 * at.page);  // the first page keeps its other bytes
    CHECK(stats.parked == 4 * at.page);
    CHECK(stats.retiring == 2 * at.page);
    CHECK(stats.stranded == 0);
    CHECK(stats.live == 6 * at.page - 200);
    CHECK(stats.fragmentation_ratio == 1.0 - static_cast<double>(stats.live) / static_cast<double>(12 * at.page));
    at.require_sound();
    at.faults->let_pass();
    at.pool->drain();
    CHECK(at.pool->stats().retiring == 0);
    CHECK(at.pool->stats().stranded == 2 * at.page);
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
