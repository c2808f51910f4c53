// Memory in use that moves to the host beneath its addresses, and back.
#include "shared/shared_memory_pool.h"
#include "support/each_failure.h"

namespace elastikv::testing {
namespace {

const PoolSetup scrubbing{.options = {.park_limit = MiB, .scrub_fresh = true}, .dirty = true, .asynchronous = true};

ByteRange all(const PoolFixture& at) { return {0, at.pool->capacity()}; }

// Three extents of 4 pages; of the last one 2 are in use.
void three(PoolFixture& at) {
    for (const Bytes begin : {Bytes{0}, 4 * at.page, 8 * at.page}) {
        at.pool->allocate(begin, 4 * at.page);
        at.stamp(begin, 4 * at.page, static_cast<std::uint8_t>(1 + begin / at.page));
    }
    at.pool->deallocate(10 * at.page, 2 * at.page);
    at.pool->drain();
}
bool threefold(PoolFixture& at) {
    return at.holds(0, 4 * at.page, 1) && at.holds(4 * at.page, 4 * at.page, 5) &&
           at.holds(8 * at.page, 2 * at.page, 9);
}

TEST_CASE("spilled memory is not charged, and read and written where it was", "[pool][spill]") {
    for (const PoolSetup& setup : {PoolSetup{}, scrubbing}) {
        PoolFixture at(setup);
        const Bytes page = at.page;
        three(at);
        CHECK(at.pool->spill({all(at)}, 5 * page) == 8 * page);  // whole extents
        MemoryStats stats = at.pool->stats();
        CHECK(stats.spilled == 8 * page);
        CHECK(stats.physical_usage == 4 * page);
        CHECK(at.budget->charged() == 4 * page);
        CHECK(threefold(at));
        at.stamp(page, page, 7);
        CHECK(at.pool->spill({{9 * page, 9 * page + 1}}) == 4 * page);
        CHECK(at.pool->stats().spilled == 10 * page);  // without the idle pages
        CHECK(at.budget->charged() == 0);
        CHECK(at.pool->spill({all(at)}) == 0);
        at.require_sound();
        CHECK(at.pool->unspill({{0, page}, {page, 4 * page}}) == 4 * page);
        CHECK(at.holds(page, page, 7));
        CHECK(at.pool->stats().physical_usage == 4 * page);
        CHECK(at.pool->unspill({all(at)}) == 6 * page);
        at.stamp(page, page, 1);
        CHECK(threefold(at));
        CHECK(at.pool->stats().spilled == 0);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("others are asked for all that is to come back, not for its first extent", "[pool][spill]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    SharedMemoryPool shared(2 * page, host);
    const ModelPtr asker = shared.register_model("asker", MiB, std::nullopt, {.priority = 1});
    const ModelPtr other = shared.register_model("other", MiB);
    for (int i = 0; i < 2; ++i) asker->allocate(page);
    CHECK(asker->spill(~Bytes{0}) == 2 * page);
    other->allocate(2 * page);
    Bytes left = 2 * page;
    other->account()->add_pressure_callback([&](const PressureRequest& request) {
        const Bytes given = std::min(request.wanted, left);
        if (given > 0) other->deallocate(left -= given, given);
    });
    CHECK(asker->unspill() == 2 * page);
    CHECK(asker->quota().charged == 2 * page);
    CHECK(other->quota().charged == 0);
}

TEST_CASE("spilled memory that is freed goes back and is not handed out", "[pool][spill]") {
    for (const PoolSetup& setup : {PoolSetup{.options = {.park_limit = MiB}}, scrubbing}) {
        PoolFixture at(setup);
        const Bytes page = at.page;
        three(at);
        at.pool->spill({all(at)});
        at.pool->deallocate(0, 4 * page);
        at.pool->allocate(0, 4 * page, zeroed());
        CHECK(at.pool->stats().spilled == 6 * page);
        CHECK(at.pool->stats().physical_usage == 4 * page);
        CHECK(at.holds(0, 4 * page, 0));
        at.pool->deallocate(4 * page, page);
        CHECK(at.pool->compact() == 0);  // moves within the host
        CHECK(at.pool->stats().spilled == 5 * page);
        CHECK(at.holds(5 * page, 3 * page, 5));
        at.pool->deallocate_within(0, at.pool->capacity());
        at.pool->drain();
        at.pool->trim();
        CHECK(at.pool->stats().extents == 0);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("what is shared, exported or spilled keeps apart", "[pool][spill][alias]") {
    PoolFixture at;
    const Bytes page = at.page;
    three(at);
    at.pool->alias(20 * page, 0, 4 * page, 4 * page);
    const auto fds = at.pool->export_extents(4 * page, page);
    CHECK(at.pool->spill({all(at)}) == 4 * page);
    CHECK(throws<InvalidArgument>([&] { at.pool->export_extents(8 * page, page); }));
    at.pool->alias(30 * page, 8 * page, 2 * page, 2 * page);  // copied
    CHECK(at.holds(30 * page, 2 * page, 9));
    CHECK(at.pool->stats().aliased == 4 * page);
    CHECK(threefold(at));
    at.require_sound();
    at.finish();
}

TEST_CASE("there is no way back where the budget is used up, and nothing is lost", "[pool][spill][budget]") {
    PoolFixture at(PoolSetup{.limit_pages = 16});
    const Bytes page = at.page;
    three(at);
    at.pool->spill({all(at)});
    at.pool->allocate(32 * page, 11 * page);
    CHECK(throws<OutOfPhysicalMemory>([&] { at.pool->unspill({all(at)}); }));
    CHECK(at.pool->stats().spilled == 6 * page);  // the first one fitted
    CHECK(threefold(at));
    at.pool->deallocate(32 * page, 11 * page);
    at.pool->unspill({all(at)});
    CHECK(threefold(at));
    at.require_sound();
    at.finish();
}

TEST_CASE("what is spilled sleeps where it is", "[pool][spill][pause]") {
    PoolFixture at;
    const Bytes page = at.page;
    three(at);
    at.pool->spill({{0, page}});
    CHECK(at.pool->pause({{all(at)}}, Keep::on_host) == 8 * page);
    CHECK(at.pool->stats().spilled == 4 * page);
    CHECK(at.pool->stats().backup == 6 * page);
    CHECK(at.holds(0, 4 * page, 1));
    CHECK(throws<ModelPaused>([&] { at.pool->unspill({{0, page}}); }));
    at.pool->resume({all(at)});
    CHECK(threefold(at));
    at.require_sound();
    at.finish();
}

TEST_CASE("invariant 2: each extent is spilled as a whole or not at all", "[pool][spill][faults]") {
    const auto operation = [](PoolFixture& at) { at.pool->spill({all(at)}); };
    fail_each_call_both_ways({PoolSetup{}, three, operation, threefold}, 20);
    fail_each_call_both_ways({scrubbing, three, operation, threefold}, 24);
}

TEST_CASE("invariant 2: each extent comes back as a whole or not at all", "[pool][spill][faults]") {
    const auto prepare = [](PoolFixture& at) {
        three(at);
        at.pool->spill({all(at)});
    };
    const auto operation = [](PoolFixture& at) { at.pool->unspill({all(at)}); };
    fail_each_call_both_ways({PoolSetup{}, prepare, operation, threefold}, 20);
    fail_each_call_both_ways({scrubbing, prepare, operation, threefold}, 24);
}

}  // namespace
}  // namespace elastikv::testing
