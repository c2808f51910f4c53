// Blocks that are there before they are asked for: extents that stay parked, and some that are mapped in the
// background.
#include "support/block_fixture.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Ids = std::vector<BlockId>;

// Idle bytes that are mapped, once what was asked of the worker is done.
Bytes parked(const BlockFixture& at) {
    at.model->pool().drain();
    return at.model->stats().parked;
}

TEST_CASE("blocks: with extents ahead, growth needs no driver call of the caller's", "[blocks][ahead]") {
    for (const bool lags : {false, true}) {
        BlockFixture at({.blocks = 256, .lags = lags, .ahead_pages = 4});
        CHECK(at.pool->ahead() == 4 * at.page);
        at.take(4 * 40, 1);
        CHECK(parked(at) == 4 * at.page);
        at.faults->fail_from(1, DriverCall::create);
        CHECK(at.take(4 * 3, 1).size() == 4 * 3);
        CHECK(at.take(4, 1).size() == 4);
        CHECK(throws<VmmError>([&] { at.take(1, 1); }));
        at.model->pool().drain();
        at.faults->heal();
        CHECK(at.take(1, 1).size() == 1);  // what was dropped meanwhile is asked for again
        CHECK(parked(at) == 4 * at.page);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("blocks: what is ahead is an eighth of what is in use at most, and goes with it", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .ahead_pages = 4});
    at.take(4 * 7);
    CHECK(parked(at) == 0);
    const Ids eighth = at.take(4);
    CHECK(parked(at) == at.page);
    Ids more = at.take(4 * 24);
    CHECK(parked(at) == 4 * at.page);
    at.require_sound();
    at.free(Ids(more.begin() + 8, more.end()));
    CHECK(parked(at) == at.page);
    at.free(eighth);
    at.free({more[0], more[1], more[2], more[3]});
    CHECK(at.pool->stats().extents == 8);
    at.free({more[4], more[5], more[6], more[7]});
    CHECK(parked(at) == 0);
    CHECK(at.watching->physical() == 7 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: what is ahead is mapped anew between steps, a little at a time", "[blocks][ahead]") {
    BlockFixture at({.blocks = 1024, .ahead_pages = 16});
    at.take(4 * 128);
    CHECK(parked(at) == 16 * at.page);
    const std::uint64_t creates = at.calls(DriverCall::create);
    at.take(4 * 8);
    CHECK(parked(at) == 8 * at.page);
    CHECK(at.calls(DriverCall::create) == creates);  // not while somebody allocates
    at.pool->expect(0, /*refill=*/false);
    CHECK(parked(at) == 8 * at.page);
    for (const Bytes pages : {10, 12, 14, 16, 16}) {
        at.pool->expect(0);
        CHECK(parked(at) == pages * at.page);
    }
    at.take(4 * 12);  // however little is left
    CHECK(parked(at) == 4 * at.page);
    at.take(4 * 8);
    CHECK(parked(at) == 0);
    CHECK(at.pool->stats().on_demand == 128 + 4);
    at.pool->expect(0);
    CHECK(parked(at) == 2 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: what comes and goes within what is ahead makes no driver calls", "[blocks][ahead]") {
    for (const bool lags : {false, true}) {
        BlockFixture at({.blocks = 256, .lags = lags, .ahead_pages = 8});
        at.take(4 * 64, 1);
        at.free({4 * 10, 4 * 10 + 1, 4 * 10 + 2, 4 * 10 + 3}, {{1}});
        const auto pass = [&] {
            if (lags) {
                at.lagging->advance({1}, 100);
                at.lagging->advance(LaggingDriver::service, 100);
            }
            return parked(at);
        };
        CHECK(pass() == at.page);
        const std::uint64_t creates = at.calls(DriverCall::create), unmaps = at.calls(DriverCall::unmap);
        for (int round = 0; round < 20; ++round) {
            const Ids ids = at.take(4, 1);
            at.free(ids, {{1}});
            CHECK(pass() == at.page);
        }
        CHECK(at.calls(DriverCall::create) == creates);
        CHECK(at.calls(DriverCall::unmap) == unmaps);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("blocks: extents that are parked are taken before others are mapped", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .park_pages = 8});
    at.take(4 * 8);
    at.free({4, 5, 6, 7, 20, 21, 22, 23});  // extents 1 and 5
    CHECK(parked(at) == 2 * at.page);
    at.model->pool().trim(at.page);  // the older one, which is the lowest
    CHECK(parked(at) == at.page);
    const std::uint64_t creates = at.calls(DriverCall::create);
    CHECK(at.take(4) == Ids{20, 21, 22, 23});
    CHECK(at.calls(DriverCall::create) == creates);
    CHECK(parked(at) == 0);
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: others get what is ahead, and nothing is mapped ahead on their account", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .limit_pages = 20, .ahead_pages = 4});
    at.take(4 * 16);
    CHECK(parked(at) == 2 * at.page);
    ModelPtr other = at.shared->register_model("other", 64 * at.page);
    other->allocate(4 * at.page);
    CHECK(at.model->stats().parked == 0);
    at.free({0, 1, 2, 3});
    CHECK(parked(at) == at.page);  // there is room again
    at.take(4);
    CHECK(parked(at) == 0);
    CHECK(at.shared->global_stats().physical_usage == 20 * at.page);
    CHECK(at.model->stats().prefetches_dropped > 0);
    other.reset();
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: extents ahead are blocks' extents after a pause, too", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .ahead_pages = 4});
    Ids ids = at.take(4 * 32);
    CHECK(parked(at) == 4 * at.page);
    for (const BlockId id : at.take(4 * 4)) ids.push_back(id);
    for (const BlockId id : ids) at.stamp(id, static_cast<std::uint8_t>(id + 1));
    CHECK(parked(at) > 0);
    at.model->pause(Keep::on_host);
    CHECK(at.watching->physical() == 0);
    at.model->resume();
    for (const BlockId id : ids) CHECK(at.holds(id, static_cast<std::uint8_t>(id + 1)));
    at.require_sound();
    CHECK(at.model->stats().extents == 36);
    at.free(Ids(ids.begin() + 4 * 34, ids.end()));
    CHECK(at.pool->stats().extents == 34);
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: a pool that ends takes what was ahead with it", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .ahead_pages = 4});
    auto beside = at.model->reserve(64 * at.page);
    beside->claim(0, 32 * at.page, {});
    at.take(4 * 32);
    CHECK(parked(at) == 4 * at.page);
    at.pool->close();
    CHECK(parked(at) == 0);
    CHECK(at.watching->physical() == 32 * at.page);
    beside.reset();
    at.finish();
}

TEST_CASE("blocks: what is expected is mapped before it is asked for, whatever is in use", "[blocks][ahead]") {
    for (const bool lags : {false, true}) {
        BlockFixture at({.blocks = 256, .lags = lags, .ahead_pages = 4});
        const auto pass = [&] {
            at.model->pool().drain();
            if (lags) at.lagging->advance(LaggingDriver::service, 100);  // scrubbed, and may go
            return parked(at);
        };
        at.pool->expect(4 * 40);
        CHECK(pass() == 40 * at.page);  // more than would stay for what is in use
        at.pool->expect(4 * 3 - 1);
        CHECK(pass() == 3 * at.page);
        const std::uint64_t creates = at.calls(DriverCall::create);
        at.take(4, 1);
        CHECK(pass() == 2 * at.page);  // what was taken is expected no longer
        at.take(4 * 2, 1);
        CHECK(pass() == 0);
        CHECK(at.calls(DriverCall::create) == creates);
        CHECK(at.pool->stats().on_demand == 0);
        at.take(4 * 2, 1);
        CHECK(at.pool->stats().on_demand == 2);
        at.pool->expect(4 * 2);
        CHECK(pass() == 2 * at.page);
        at.pool->expect(0);
        CHECK(pass() == 0);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("blocks: what is expected counts blocks that have memory, and those that there are", "[blocks][ahead]") {
    BlockFixture at({.blocks = 4 * 6, .ahead_pages = 4});
    at.take(1);
    at.pool->expect(3);
    CHECK(parked(at) == 0);
    at.pool->expect(4);
    CHECK(parked(at) == at.page);
    at.take(4 * 4);
    at.pool->expect(100);
    CHECK(parked(at) == at.page);  // the last one
    at.pool->close();
    CHECK(parked(at) == 0);
    CHECK(throws<PoolClosed>([&] { at.pool->expect(1); }));
    at.require_sound();
    at.finish();
    BlockFixture none({.blocks = 64});
    none.pool->expect(64);
    CHECK(parked(none) == 0);
    none.finish();
}

TEST_CASE("blocks: nobody is asked for what is only expected, and others get it", "[blocks][ahead]") {
    BlockFixture at({.blocks = 256, .limit_pages = 8, .ahead_pages = 4});
    ModelPtr other = at.shared->register_model("other", 64 * at.page, 8 * at.page);
    other->allocate(4 * at.page);
    other->deallocate(other->allocate(at.page) - other->base_address(), at.page);
    at.pool->expect(4 * 4);
    CHECK(parked(at) == 3 * at.page);
    CHECK(other->stats().parked == at.page);
    other->allocate(3 * at.page);
    CHECK(at.model->stats().parked < 3 * at.page);
    CHECK(at.shared->global_stats().physical_usage <= 8 * at.page);
    other.reset();
    at.require_sound();
    at.finish();
}

// The worker's calls fail as the caller's do, at any moment: what is asked for is there or is not, and nothing is lost.
TEST_CASE("invariant 2: blocks with extents ahead, with every driver call failed in turn", "[blocks][ahead][faults]") {
    for (const bool lags : {false, true}) {
        for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
            for (std::uint64_t n = 1;; ++n) {
                CAPTURE(lags, name_of(code), n);
                BlockFixture at({.blocks = 256, .lags = lags, .ahead_pages = 2});
                at.take(4 * 16, 1);
                at.require_sound();
                at.faults->fail_nth(n, std::nullopt, code);
                std::size_t held = 4 * 16;
                for (int round = 0; round < 3; ++round) {
                    try {
                        held += at.take(6, 1).size();
                    } catch (const VmmError&) {
                    }
                    at.model->pool().drain();
                    REQUIRE(at.pool->stats().held == held);
                }
                const bool struck = at.faults->struck();
                at.faults->heal();
                at.require_sound();
                at.finish();
                if (!struck || (lags && n == 100)) break;  // a worker that polls for fences makes calls without end
                REQUIRE(n < 200);
            }
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
