// Every driver call of every public operation of a pool, failed in turn.
#include "support/each_failure.h"

namespace elastikv::testing {
namespace {

constexpr std::uint8_t mine = 0x5c;

void nothing(PoolFixture&) {}

// Two allocations with stamped content, and parked memory between and behind them.
void scattered(PoolFixture& at) {
    at.pool->allocate(2 * at.page, 2 * at.page);
    at.pool->allocate(6 * at.page, 2 * at.page);
    at.pool->deallocate(6 * at.page, 2 * at.page);
    at.pool->allocate(10 * at.page, 100);
    at.pool->drain();
    at.stamp(2 * at.page, 2 * at.page, mine);
    at.stamp(10 * at.page, 100, mine);
}
bool scattered_content(PoolFixture& at) {
    return at.holds(2 * at.page, 2 * at.page, mine) && at.holds(10 * at.page, 100, mine);
}

const PoolSetup parking{.options = {.park_limit = MiB}};
const PoolSetup dirty{.options = {.park_limit = MiB}, .dirty = true};
const PoolSetup scrubbing{.options = {.park_limit = MiB, .scrub_fresh = true}, .dirty = true, .asynchronous = true};
const PoolSetup asynchronous{.options = {.park_limit = 0}, .dirty = true, .asynchronous = true};

TEST_CASE("invariant 2: an exact allocation is all or nothing", "[pool][faults]") {
    fail_each_call_both_ways({parking, nothing, [](PoolFixture& at) { at.pool->allocate(0, 3 * at.page); }}, 3);
}

TEST_CASE("invariant 2: an allocation over several gaps is all or nothing", "[pool][faults]") {
    const auto operation = [](PoolFixture& at) { at.pool->allocate(4 * at.page, 6 * at.page); };
    fail_each_call_both_ways({parking, scattered, operation, scattered_content}, 6);
    fail_each_call_both_ways({scrubbing, scattered, operation, scattered_content}, 10);
}

TEST_CASE("invariant 2: an open-ended allocation is all or nothing", "[pool][faults]") {
    const auto prepare = [](PoolFixture& at) { at.pool->allocate(0, 32 * at.page); };
    const auto operation = [](PoolFixture& at) {
        at.pool->allocate(32 * at.page, 100, open_ended(32 * at.page, at.pool->capacity()));
    };
    for (const PoolSetup& setup : {parking, scrubbing}) fail_each_call_both_ways({setup, prepare, operation}, 3);
}

TEST_CASE("invariant 2: an allocation of zeroed memory is all or nothing", "[pool][faults]") {
    const auto operation = [](PoolFixture& at) {
        at.pool->allocate(4 * at.page, 6 * at.page, zeroed());
        if (!at.holds(4 * at.page, 6 * at.page, 0)) FAIL("not zeroed");
    };
    fail_each_call_both_ways({dirty, scattered, operation, scattered_content}, 9);
    fail_each_call_both_ways({scrubbing, scattered, operation, scattered_content}, 10);
}

TEST_CASE("invariant 2: taking retiring memory up again is all or nothing", "[pool][faults][retire]") {
    const auto prepare = [](PoolFixture& at) {
        at.pool->allocate(0, 4 * at.page);
        at.stamp(0, at.page, mine);
        at.faults->hold_fences();
        at.pool->deallocate(at.page, 3 * at.page);
    };
    const auto operation = [](PoolFixture& at) { at.pool->allocate(2 * at.page, 4 * at.page, on_stream(3)); };
    const auto content = [](PoolFixture& at) { return at.holds(0, at.page, mine); };
    PoolSetup setup = scrubbing;
    setup.options.scrub_fresh = false;  // or undoing would wait for the fences that the test holds
    fail_each_call_both_ways({setup, prepare, operation, content}, 4);
}

TEST_CASE("invariant 2: a free is all or nothing", "[pool][faults]") {
    const auto operation = [](PoolFixture& at) {
        if (at.pool->is_mapped(3 * at.page, at.page)) at.pool->deallocate(3 * at.page, at.page);
        if (at.pool->is_mapped(10 * at.page, 1)) at.pool->deallocate(10 * at.page, 50);
    };
    const auto content = [](PoolFixture& at) { return at.holds(2 * at.page, at.page, mine); };
    fail_each_call_both_ways({PoolSetup{}, scattered, operation, content}, 0);
    const auto one = [](PoolFixture& at) { at.pool->deallocate(2 * at.page, 2 * at.page); };
    fail_each_call_both_ways({PoolSetup{}, scattered, one}, 2);
    fail_each_call_both_ways({asynchronous, scattered, one}, 1);
    const auto within = [](PoolFixture& at) { at.pool->deallocate_within(0, at.pool->capacity()); };
    fail_each_call_both_ways({PoolSetup{}, scattered, within}, 4);
    fail_each_call_both_ways({asynchronous, scattered, within}, 1);
}

TEST_CASE("invariant 2: a prefetch that fails leaves nothing behind", "[pool][faults][prefetch]") {
    const auto operation = [](PoolFixture& at) {
        at.pool->prefetch(0, 8 * at.page);
        at.pool->drain();
    };
    fail_each_call_both_ways({parking, scattered, operation, scattered_content}, 6);
    fail_each_call_both_ways({scrubbing, scattered, operation, scattered_content}, 6);
}

TEST_CASE("invariant 2: trimming gives back what the driver takes", "[pool][faults]") {
    const auto operation = [](PoolFixture& at) { at.pool->trim(); };
    fail_each_call_both_ways({parking, scattered, operation, scattered_content}, 2);
}

TEST_CASE("invariant 2: a compaction that fails moves nothing", "[pool][faults][compact]") {
    const auto prepare = [](PoolFixture& at) {
        at.pool->allocate(0, 8 * at.page);
        at.pool->deallocate(2 * at.page, at.page);
        at.pool->deallocate(5 * at.page, 2 * at.page);
        at.pool->drain();
        at.stamp(0, 2 * at.page, mine);
        at.stamp(3 * at.page, 2 * at.page, mine);
        at.stamp(7 * at.page, at.page, mine);
    };
    const auto operation = [](PoolFixture& at) {
        const Bytes before = at.budget->charged();
        const Bytes freed = at.pool->compact();
        if (before - freed != at.budget->charged()) FAIL("compact() freed " << before - at.budget->charged());
    };
    const auto content = [](PoolFixture& at) {
        return at.holds(0, 2 * at.page, mine) && at.holds(3 * at.page, 2 * at.page, mine) &&
               at.holds(7 * at.page, at.page, mine);
    };
    fail_each_call_both_ways({parking, prepare, operation, content}, 20);
    fail_each_call_both_ways({dirty, prepare, operation, content}, 20);
    fail_each_call_both_ways({asynchronous, prepare, operation, content}, 20);
}

// The state after it is that of a closed pool, so the loop differs from the others'.
TEST_CASE("invariant 8: closing goes on where a call fails, and what was refused is given back later",
          "[pool][faults]") {
    for (const PoolSetup& setup : {PoolSetup{}, parking, scrubbing}) {
        for (const bool close : {true, false}) {
            for (std::uint64_t n = 1;; ++n) {
                CAPTURE(n, close);
                PoolFixture at(setup);
                scattered(at);
                at.pool->prefetch(20 * at.page, 2 * at.page);
                at.pool->drain();
                at.faults->fail_nth(n);
                if (close) {
                    at.pool->close();
                    at.require_sound();
                    CHECK(at.pool->stats().live == 0);
                    CHECK(at.pool->stats().retiring == 0);
                    const bool refused = at.pool->stats().physical_usage != 0;
                    CHECK(refused == (at.pool->stats().reclaims_refused != 0));
                    at.pool->close();  // tries once more
                    CHECK((at.budget->charged() == 0 || !at.faults->struck()));
                } else {
                    at.pool.reset();
                }
                const bool struck = at.faults->struck();
                at.faults->heal();
                at.pool.reset();
                CHECK(at.budget->charged() == 0);
                CHECK(at.host->live_extents() == 0);
                CHECK(at.host->live_mappings() == 0);
                CHECK(at.host->live_reservations() == 0);
                if (!struck) break;
                REQUIRE(n < 1000);
            }
        }
    }
}

TEST_CASE("invariant 8: a pool whose driver is gone is destroyed without a word, and stays charged", "[pool][faults]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    scattered(at);
    const Bytes charged = at.budget->charged();
    at.faults->fail_from(1, std::nullopt, StatusCode::unavailable);
    at.pool.reset();
    CHECK(at.budget->charged() == charged);  // invariant 1: the memory is still there
    CHECK(at.host->live_extents() == 3);
}

TEST_CASE("a pool that can't be made leaves nothing", "[pool][faults]") {
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(host);
    for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
        faults->fail_nth(1, std::nullopt, code);
        CHECK_THROWS_AS(VirtualMemoryPool(MiB, faults), OutOfVirtualMemory);
        require_nothing_left(*host);
    }
}

// An extent that was neither made accessible nor taken back: what it holds is another owner's until it is zeroed.
TEST_CASE("invariant 4: an extent kept after two refusals is scrubbed before its first use", "[pool][faults][scrub]") {
    for (const bool asynchronous_device : {false, true}) {
        CAPTURE(asynchronous_device);
        PoolSetup setup{.options = {.park_limit = MiB, .scrub_fresh = true}, .dirty = true};
        setup.asynchronous = asynchronous_device;
        PoolFixture at(setup);
        at.faults->fail_from(1, DriverCall::zero);
        const auto refuse_release = [&] { at.pool->allocate(0, 4 * at.page); };
        CHECK_THROWS_AS(refuse_release(), CudaError);
        CHECK(at.pool->stats().parked == 0);
        at.faults->fail_from(3);  // create and map pass; set-access and what would undo the two do not
        CHECK_THROWS_AS(refuse_release(), MappingFailed);
        at.faults->heal();
        CHECK(at.pool->stats().parked == 4 * at.page);
        at.require_sound();
        at.pool->allocate(0, 100);
        CHECK(at.holds(0, 100, 0));
        at.pool->allocate(100, 4 * at.page - 100);
        CHECK(at.holds(0, 4 * at.page, 0));
        at.finish();
    }
}

}  // namespace
}  // namespace elastikv::testing
