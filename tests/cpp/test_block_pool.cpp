// Blocks of one size: memory that comes with the first and goes with the last, errors, streams, and failures.
#include "support/block_fixture.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Ids = std::vector<BlockId>;

TEST_CASE("block layout: extents are whole blocks and whole pages, at little padding", "[blocks]") {
    const Bytes page = 2 * MiB;
    const auto fits = [page](const BlockLayout& layout) {
        return layout.extent % layout.stride == 0 && layout.extent % page == 0 && layout.stride >= layout.block &&
               layout.stride - layout.block <= layout.block / 8;
    };
    const BlockLayout even = BlockLayout::fit(4096, MiB, page);
    CHECK(fits(even));
    CHECK(even.stride == MiB);
    CHECK(even.extent == 16 * MiB);
    CHECK(BlockLayout::fit(64, MiB, page, 1).extent == page);
    CHECK(BlockLayout::fit(64, MiB, page, 7 * MiB).extent == 6 * MiB);
    CHECK(BlockLayout::fit(3, MiB, page, 64 * MiB).extent == 4 * MiB);
    const BlockLayout twelve_layers = BlockLayout::fit(4096, 12 * 64 * KiB, page);
    CHECK(twelve_layers.stride == twelve_layers.block);
    CHECK(fits(twelve_layers));
    // 61 layers of 16 tokens of 576 numbers: with no padding at all an extent would have 549 pages.
    const BlockLayout latent = BlockLayout::fit(4096, 61 * 16 * 576 * 2, page);
    CHECK(fits(latent));
    CHECK(latent.extent <= 32 * MiB);
    for (const Bytes block : {Bytes{1}, Bytes{513}, 5 * MiB + 3, 100 * MiB + 1}) {
        const BlockLayout odd = BlockLayout::fit(1000, block, page);
        CAPTURE(block, odd.stride, odd.extent);
        CHECK(odd.extent % odd.stride == 0);
        CHECK(odd.extent % page == 0);
        CHECK(odd.stride >= block);
    }
    CHECK(throws<InvalidSize>([&] { BlockLayout::fit(0, MiB, page); }));
    CHECK(throws<InvalidSize>([&] { BlockLayout::fit(1, 0, page); }));
    CHECK(throws<InvalidArgument>([&] { BlockLayout::fit(std::uint64_t{1} << 31, 1, page); }));
    CHECK(throws<OutOfVirtualMemory>([&] { BlockLayout::fit(1000, ~Bytes{0} / 1000, page); }));
    CHECK(throws<OutOfVirtualMemory>([&] { BlockLayout::fit(1, ~Bytes{0}, page); }));
}

TEST_CASE("blocks: an extent is mapped with its first block and goes back with its last", "[blocks]") {
    BlockFixture at;
    CHECK(at.watching->physical() == 0);
    CHECK(at.take(1) == Ids{0});
    CHECK(at.watching->physical() == at.page);
    CHECK(at.take(3) == Ids{1, 2, 3});
    CHECK(at.watching->physical() == at.page);
    CHECK(at.take(5) == Ids{4, 5, 6, 7, 8});
    CHECK(at.watching->physical() == 3 * at.page);
    for (BlockId id = 0; id < 9; ++id) at.stamp(id, static_cast<std::uint8_t>(id + 1));
    at.free({4, 5, 6});
    CHECK(at.watching->physical() == 3 * at.page);
    at.free({7, 0});
    at.require_sound();
    CHECK(at.watching->physical() == 2 * at.page);
    for (const BlockId id : {1, 2, 3, 8}) CHECK(at.holds(id, static_cast<std::uint8_t>(id + 1)));
    CHECK(at.take(2) == Ids{0, 9});  // the fullest first
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: a short last extent that is parked is not mapped for nothing", "[blocks]") {
    BlockFixture at({.blocks = 14, .park_pages = 1});  // the last extent has two
    const Ids ids = at.take(14);
    at.free({4, 5, 6, 7, 8, 9, 10, 11});
    at.model->pool().drain();
    at.model->pool().trim();
    at.free({12, 13});
    at.model->pool().drain();
    REQUIRE(at.model->stats().parked == at.page);
    const Ids whole = at.take(4);
    CHECK(at.pool->stats().physical == 2 * at.page);
    at.require_sound();
    at.free(whole);
    at.free({0, 1, 2, 3});
    at.model->pool().drain();
    at.model->pool().trim();
    CHECK(at.pool->stats().physical == 0);
    CHECK(at.watching->physical() == 0);
    at.finish();
}

TEST_CASE("blocks: one that is shared stays until its last reference goes", "[blocks]") {
    BlockFixture at;
    const Ids ids = at.take(4);
    at.pool->touch(ids);
    at.pool->touch(Ids{2});
    at.free(ids);
    CHECK(at.pool->stats().held == 4);
    at.free({0, 1, 2, 3});
    CHECK(at.pool->references(2) == 1);
    CHECK(at.pool->stats().held == 1);
    CHECK(at.watching->physical() == at.page);
    at.free({2});
    CHECK(at.watching->physical() == 0);
    at.finish();
}

TEST_CASE("blocks: what can't be is refused, and changes nothing", "[blocks]") {
    BlockFixture at({.blocks = 10});
    const Ids ids = at.take(6);
    CHECK(throws<OutOfVirtualMemory>([&] { at.take(5); }));
    CHECK(throws<InvalidArgument>([&] { at.free({0, 1, 1}); }));
    CHECK(throws<InvalidArgument>([&] { at.free({0, 6}); }));
    CHECK(throws<InvalidArgument>([&] { at.free({10}); }));
    CHECK(throws<InvalidArgument>([&] { at.free({-1}); }));
    CHECK(throws<InvalidArgument>([&] { at.pool->touch(Ids{0, 7}); }));
    CHECK(throws<InvalidArgument>([&] { (void)at.pool->references(10); }));
    CHECK(at.pool->references(0) == 1);
    CHECK(at.pool->stats().held == 6);
    at.require_sound();
    at.free(ids);
    CHECK(throws<InvalidArgument>([&] { at.free({0}); }));
    CHECK(at.take(0).empty());
    at.free({});
    CHECK(at.take(10).size() == 10);
    at.pool->close();
    at.pool->close();
    CHECK(at.watching->physical() == 0);
    CHECK(throws<PoolClosed>([&] { at.take(1); }));
    CHECK(throws<PoolClosed>([&] { at.free({0}); }));
    CHECK(throws<PoolClosed>([&] { at.pool->touch(Ids{0}); }));
    CHECK(throws<PoolClosed>([&] { (void)at.pool->available(); }));
    at.finish();
}

TEST_CASE("blocks: a budget that runs dry in the middle of a batch gives nothing and loses nothing", "[blocks]") {
    BlockFixture at({.limit_pages = 5, .park_pages = 64});
    ModelPtr other = at.shared->register_model("other", 64 * at.page);
    other->allocate(2 * at.page);
    const Ids ids = at.take(5);
    for (const BlockId id : ids) at.stamp(id, 0x5a);
    CHECK(at.pool->available() == 3 + 4);
    CHECK(throws<OutOfPhysicalMemory>([&] { at.take(8); }));
    CHECK(at.pool->stats().held == 5);
    CHECK(at.pool->stats().extents == 2);
    at.require_sound();
    CHECK(at.take(7).size() == 7);
    CHECK(at.pool->available() == 0);
    other->deallocate(0, 2 * at.page);  // parked there, and taken for us
    CHECK(at.take(8).size() == 8);
    for (const BlockId id : ids) CHECK(at.holds(id, 0x5a));
    other.reset();
    at.require_sound();
    at.finish();
}

TEST_CASE("blocks: holes between mapped extents are filled, all of them or none", "[blocks]") {
    BlockFixture at({.limit_pages = 8});
    at.take(28);
    at.free({4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23});  // extents 1, 3 and 5 of 7
    at.require_sound();
    CHECK(throws<OutOfPhysicalMemory>([&] { at.take(20); }));
    CHECK(at.watching->physical() == 4 * at.page);
    at.require_sound();
    CHECK(at.take(12).size() == 12);
    CHECK(at.pool->stats().extents == 7);
    at.finish();
}

TEST_CASE("invariant 3: an extent stays until the work that was enqueued before its blocks' release", "[blocks]") {
    BlockFixture at({.lags = true});
    const Ids ids = at.take(4, 1);
    at.lagging->advance(LaggingDriver::service, 100);
    at.lagging->enqueue({2}, at.at(ids[0]), at.pool->layout().block, [] {});
    at.free({ids[0]}, {{1}, {2}});
    at.lagging->enqueue({1}, at.at(ids[1]), at.pool->layout().block, [] {});
    at.free({ids[1], ids[2], ids[3]}, {{1}});
    CHECK(at.pool->stats().extents == 0);
    CHECK(at.model->stats().retiring == at.page);
    at.lagging->advance({1}, 100);
    at.model->pool().reclaim(~Bytes{0}, false);
    CHECK(at.watching->physical() == at.page);  // stream 2 has not finished
    at.lagging->advance({2}, 100);
    at.model->pool().reclaim(~Bytes{0}, false);
    CHECK(at.watching->physical() == 0);
    at.finish();
}

TEST_CASE("blocks: reused at once on their stream, and by another only after its work", "[blocks]") {
    BlockFixture at({.lags = true});
    const Ids ids = at.take(4, 1);
    const Bytes size = at.pool->layout().block;
    std::string order;
    at.lagging->enqueue({1}, at.at(ids[1]), size, [&] { order += "first "; });
    at.free({ids[1]}, {{1}});
    const std::uint64_t fences = at.calls(DriverCall::record_fence);
    CHECK(at.take(1, 1) == Ids{ids[1]});
    CHECK(at.calls(DriverCall::record_fence) == fences);
    at.free({ids[1]}, {{1}});
    CHECK(at.take(1, 2) == Ids{ids[1]});
    at.lagging->enqueue({2}, at.at(ids[1]), size, [&] { order += "second "; });
    at.lagging->advance({2}, 100);
    CHECK(order.empty());
    at.lagging->advance(LaggingDriver::service, 100);
    at.lagging->advance({1}, 100);
    at.lagging->advance({2}, 100);
    CHECK(order == "first second ");
    const std::uint64_t before = at.calls(DriverCall::record_fence);
    at.free({ids[1]}, {{2}});
    CHECK(at.take(1, 2) == Ids{ids[1]});  // ordered after stream 1 already
    CHECK(at.calls(DriverCall::record_fence) == before);
    at.finish();
}

TEST_CASE("blocks: a stream that captures keeps its blocks to itself", "[blocks]") {
    BlockFixture at({.lags = true});
    const Ids ids = at.take(3, 1);
    at.faults->set_capturing({1}, true);
    at.free({ids[0]}, {{1}});
    CHECK(throws<InvalidArgument>([&] { at.take(1, 2); }));
    CHECK(at.take(1, 1) == Ids{ids[0]});
    at.faults->set_capturing({1}, false);
    CHECK(at.take(1, 2).size() == 1);
    at.finish();
}

TEST_CASE("blocks: of a stream that is gone come back once the device has finished", "[blocks]") {
    BlockFixture at({.lags = true});
    const Ids ids = at.take(4, 1);
    at.free({ids[0]}, {{1}});
    at.faults->fail_from(1, DriverCall::record_fence);
    CHECK(at.take(1, 2) == Ids{ids[0]});
    at.free(ids, {{2}});
    at.faults->heal();
    at.require_sound();
    CHECK(at.watching->physical() == 0);
    at.finish();
}

// What fails once fails whole, whatever the call; then it goes through.
TEST_CASE("invariant 2: blocks, with every driver call failed in turn", "[blocks][faults]") {
    const auto each = [](auto operation, const Ids& ids_after) {
        for (const bool lags : {false, true}) {
            for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
                for (std::uint64_t n = 1;; ++n) {
                    CAPTURE(lags, name_of(code), n);
                    BlockFixture at({.lags = lags});
                    const Ids ids = at.take(9, 1);
                    at.free({4, 5, 6, 7}, {{1}});
                    at.require_sound();
                    for (const BlockId id : {0, 8}) at.stamp(id, 0x77);
                    at.faults->fail_nth(n, std::nullopt, code);
                    bool threw = false;
                    try {
                        operation(at);
                    } catch (const VmmError&) {
                        threw = true;
                        REQUIRE(at.pool->stats().held == 5);
                        REQUIRE(at.pool->stats().extents == 2);
                    }
                    const bool struck = at.faults->struck();
                    at.faults->heal();
                    REQUIRE((struck || !threw));
                    at.require_sound();
                    if (threw) operation(at);
                    at.require_sound();
                    REQUIRE(at.pool->stats().held == ids_after.size());
                    for (const BlockId id : ids_after) REQUIRE(at.pool->references(id) == 1);
                    if (at.pool->references(8) == 1) REQUIRE(at.holds(8, 0x77));
                    at.finish();
                    if (!struck) break;
                    REQUIRE(n < 200);
                }
            }
        }
    };
    each([](BlockFixture& at) { at.take(12, 2); }, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16});
    each([](BlockFixture& at) { at.free({0, 1, 2, 3}, {{2}}); }, {8});
    each([](BlockFixture& at) { at.pool->close(), at.pool = std::make_unique<BlockPool>(at.model, at.pool->layout()); },
         {});
}

}  // namespace
}  // namespace elastikv::testing
