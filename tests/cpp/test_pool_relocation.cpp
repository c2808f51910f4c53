// Extents that an owner moves to other addresses of its own: at once, for nothing, and never under work that uses them.
#include <array>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

// Extents of 2 pages in the first 8, each page with a value of its own.
void prepare(PoolFixture& at) {
    at.pool->allocate(0, 8 * at.page, in_extents_of(2 * at.page));
    for (Bytes p = 0; p < 8; ++p) at.stamp(p * at.page, at.page, static_cast<std::uint8_t>(p + 1));
}

std::vector<ByteRange> second_and_fourth(const PoolFixture& at) {
    return {{2 * at.page, 4 * at.page}, {6 * at.page, 8 * at.page}};
}

bool move(PoolFixture& at, const std::vector<ByteRange>& extents, Bytes to) {
    return at.pool->try_relocate(extents, to, {}, default_stream);
}

TEST_CASE("relocation: extents change their addresses for a map and an unmap each", "[pool][relocation]") {
    PoolFixture at;
    prepare(at);
    const MemoryStats before = at.pool->stats();
    const std::array<std::uint64_t, 4> calls{at.calls(DriverCall::create), at.calls(DriverCall::release),
                                             at.calls(DriverCall::map), at.calls(DriverCall::unmap)};
    REQUIRE(move(at, second_and_fourth(at), 20 * at.page));
    CHECK(at.calls(DriverCall::create) == calls[0]);
    CHECK(at.calls(DriverCall::release) == calls[1]);
    CHECK(at.calls(DriverCall::map) == calls[2] + 2);
    CHECK(at.calls(DriverCall::unmap) == calls[3] + 2);
    CHECK(at.pool->stats().live == before.live);
    CHECK(at.pool->stats().physical_usage == before.physical_usage);
    CHECK(at.pool->stats().peak_physical == before.peak_physical);
    CHECK(at.pool->stats().aliased == 0);
    CHECK(at.pool->is_mapped(20 * at.page, 4 * at.page));
    CHECK_FALSE(at.pool->is_mapped(2 * at.page, at.page));
    for (const Bytes kept : {0U, 1U, 4U, 5U}) {
        CHECK(at.holds(kept * at.page, at.page, static_cast<std::uint8_t>(kept + 1)));
    }
    at.require_sound();
    // Both places are like any other.
    at.pool->allocate(2 * at.page, 2 * at.page);
    REQUIRE(move(at, {{20 * at.page, 22 * at.page}}, 30 * at.page));
    at.stamp(22 * at.page, 2 * at.page, 0x44);
    CHECK(at.holds(22 * at.page, 2 * at.page, 0x44));
    at.require_sound();
    at.finish();
}

TEST_CASE("invariant 3: an extent is at both places until the work at the old one has finished", "[pool][relocation]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    const Bytes page = host->capabilities().granularity;
    VirtualMemoryPool pool(32 * page, lagging, {.park_limit = 0});
    const Address old_place = pool.allocate(0, 2 * page, on_stream(1));
    lagging->enqueue({1}, old_place, 2 * page, [=] { *host_pointer(old_place) = 5; });
    const ByteRange extent{0, 2 * page};
    const Stream user{1};
    REQUIRE(pool.try_relocate({&extent, 1}, 8 * page, user, {&user, 1}));
    const Address place = pool.base_address() + 8 * page;
    std::uint8_t seen = 0;
    lagging->enqueue({1}, place, 2 * page, [&seen, place] { seen = *host_pointer(place); });
    CHECK(pool.stats().physical_usage == 2 * page);
    CHECK(pool.stats().retiring == 2 * page);
    CHECK(pool.is_leaving(0, page));
    CHECK_FALSE(pool.is_leaving(2 * page, 4 * page));
    CHECK_FALSE(pool.try_relocate({&extent, 1}, 16 * page, user, {&user, 1}));  // it is nobody's there
    const ByteRange again{8 * page, 10 * page};
    CHECK_FALSE(pool.try_relocate({&again, 1}, 16 * page, user, {&user, 1}));  // and there once the rest has passed
    CHECK(pool.movable_within(0, 32 * page).empty());
    lagging->advance({1}, 10);
    CHECK(seen == 5);
    pool.drain();
    pool.trim();
    CHECK_FALSE(pool.is_leaving(0, page));
    CHECK(pool.movable_within(0, 32 * page) == std::vector{again});
    CHECK(pool.stats().aliased == 0);
    CHECK(pool.check().empty());
    CHECK(lagging->breach().empty());
}

TEST_CASE("relocation: what was just moved sleeps and wakes with its content", "[pool][relocation][pause]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    const Bytes page = host->capabilities().granularity;
    VirtualMemoryPool pool(32 * page, lagging, {.park_limit = 0});
    const Address old_place = pool.allocate(0, 2 * page, on_stream(1));
    lagging->enqueue({1}, old_place, 2 * page, [=] { *host_pointer(old_place) = 5; });
    const ByteRange extent{0, 2 * page};
    const Stream user{1};
    REQUIRE(pool.try_relocate({&extent, 1}, 8 * page, user, {&user, 1}));
    pool.pause({{{0, 32 * page}}}, Keep::on_host);
    pool.drain();
    CHECK(pool.physical_memory_usage() == 0);
    CHECK(pool.resume({{0, 32 * page}}) == 2 * page);
    CHECK(all_bytes_are(host->capabilities(), pool.base_address() + 8 * page, 1, 5));
    CHECK(pool.stats().aliased == 0);
    CHECK(pool.check().empty());
    CHECK(lagging->breach().empty());
}

TEST_CASE("relocation: only whole extents of which all is the owner's can be moved", "[pool][relocation]") {
    PoolFixture at;
    prepare(at);
    at.pool->allocate(10 * at.page, 2 * at.page);
    at.pool->export_extents(10 * at.page, at.page);
    at.pool->deallocate(2 * at.page, at.page);
    CHECK(at.pool->movable_within(0, 32 * at.page) ==
          std::vector<ByteRange>{{0, 2 * at.page}, {4 * at.page, 6 * at.page}, {6 * at.page, 8 * at.page}});
    CHECK(at.pool->movable_within(at.page, 6 * at.page) == std::vector<ByteRange>{{4 * at.page, 6 * at.page}});
    const Snapshot before(at);
    CHECK_FALSE(move(at, {{2 * at.page, 4 * at.page}}, 20 * at.page));    // in use in part
    CHECK_FALSE(move(at, {{4 * at.page, 5 * at.page}}, 20 * at.page));    // a part
    CHECK_FALSE(move(at, {{10 * at.page, 12 * at.page}}, 20 * at.page));  // others may have it mapped
    CHECK_FALSE(move(at, {{30 * at.page, 32 * at.page}}, 20 * at.page));  // nothing is there
    CHECK_THROWS_AS(move(at, {{4 * at.page, 6 * at.page}}, 11 * at.page), AlreadyMapped);
    CHECK_THROWS_AS(move(at, {{4 * at.page, 6 * at.page}}, 63 * at.page), InvalidOffset);
    CHECK_THROWS_AS(move(at, {}, 20 * at.page), InvalidSize);
    CHECK(Snapshot(at) == before);
    at.require_sound();
    at.finish();
}

TEST_CASE("relocation: what lies idle at the new place makes way, what retires there does not", "[pool][relocation]") {
    PoolFixture at({.options = {.park_limit = 64 * MiB}, .asynchronous = true});
    prepare(at);
    at.pool->allocate(20 * at.page, 2 * at.page);
    at.faults->hold_fences();
    at.pool->deallocate(20 * at.page, 2 * at.page);
    CHECK_FALSE(move(at, {{0, 2 * at.page}}, 20 * at.page));
    at.faults->let_pass();
    at.pool->drain();
    CHECK(at.pool->stats().parked == 2 * at.page);
    CHECK(move(at, {{0, 2 * at.page}}, 20 * at.page));
    at.pool->drain();
    at.require_sound();
    CHECK(at.pool->physical_memory_usage() == 8 * at.page);
    at.finish();
}

TEST_CASE("invariant 2: every driver call of a relocation, failed in turn", "[pool][relocation][faults]") {
    for (const bool asynchronous : {false, true}) {
        for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
            std::uint64_t n = 1;
            for (bool struck = true; struck; ++n) {
                CAPTURE(asynchronous, name_of(code), n);
                PoolFixture at({.asynchronous = asynchronous});
                prepare(at);
                const Snapshot before(at);
                at.faults->fail_nth(n, std::nullopt, code);
                const bool moved = move(at, second_and_fourth(at), 20 * at.page);
                struck = at.faults->struck();
                at.faults->heal();
                REQUIRE((moved || struck));
                REQUIRE((moved || Snapshot(at) == before));
                REQUIRE(at.pool->is_mapped(20 * at.page, 4 * at.page) == moved);
                at.require_sound();
                // What the driver would not unmap goes when it is asked again.
                if (!moved) REQUIRE(move(at, second_and_fourth(at), 20 * at.page));
                at.pool->drain();
                at.pool->trim();
                at.require_sound();
                REQUIRE(at.pool->stats().aliased == 0);
                REQUIRE(at.pool->physical_memory_usage() == 8 * at.page);
                at.finish();
            }
            CHECK(n > 5);
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
