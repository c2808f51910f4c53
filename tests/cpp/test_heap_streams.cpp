// Blocks that change hands between streams, on a device whose work lags.
#include "support/heap_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("heap: a block is reused at once on its stream, and never on another", "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(4 * KiB, 1);
    at.lagging->enqueue({1}, block, 4 * KiB, [] {});
    const std::uint64_t fences = at.calls(DriverCall::record_fence);
    at.heap->free(block);
    const HeapRequest other{.requested = 4 * KiB, .stream = {2}};
    CHECK(at.heap->try_allocate_cached(other) == 0);
    CHECK(at.get(4 * KiB, 1) == block);
    CHECK(at.get(4 * KiB, 2) != block);
    CHECK(at.lagging->pending() == 1);
    CHECK(at.calls(DriverCall::record_fence) == fences);
    CHECK(at.calls(DriverCall::wait_fence) == 0);
    CHECK(at.calls(DriverCall::synchronize) == 0);
    at.finish();
}

TEST_CASE("heap: a block that other streams used is held until all of their work has passed", "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(4 * KiB, 1);
    for (const std::uintptr_t user : {2U, 3U}) {
        at.lagging->enqueue({user}, block, 4 * KiB, [] {});
        at.heap->record_stream(block, {user});
        at.heap->record_stream(block, {user});  // once is enough
    }
    at.heap->free(block);
    CHECK(at.get(4 * KiB, 1) != block);
    at.lagging->advance({2}, 10);
    CHECK(at.get(4 * KiB, 1) != block);
    CHECK(at.heap->stats().active.of[0].current == 3);
    at.lagging->advance({3}, 10);
    CHECK(at.get(4 * KiB, 1) == block);
    at.finish();
}

TEST_CASE("heap: a block of a stream that captures is held until it can be fenced", "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(4 * KiB, 1);
    at.faults->set_capturing({2}, true);
    at.heap->record_stream(block, {2});
    at.heap->free(block);
    CHECK(at.get(4 * KiB, 1) != block);
    at.heap->empty_cache();
    CHECK(at.get(4 * KiB, 1) != block);
    at.lagging->enqueue({2}, block, 4 * KiB, [] {});
    at.faults->set_capturing({2}, false);
    CHECK(at.get(4 * KiB, 1) != block);  // fenced now, behind its work
    at.lagging->advance({2}, 10);
    CHECK(at.get(4 * KiB, 1) == block);
    at.finish();
}

TEST_CASE("heap: a block of a stream that is gone comes back once the device has finished", "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(4 * KiB, 1);
    bool ran = false;
    at.lagging->enqueue({2}, block, 4 * KiB, [&ran] { ran = true; });
    at.heap->record_stream(block, {2});
    at.faults->fail_nth(1, DriverCall::record_fence, StatusCode::invalid_argument);
    at.heap->free(block);
    CHECK(ran);
    CHECK(at.get(4 * KiB, 1) == block);
    at.finish();
}

TEST_CASE("heap: memory that goes back is not unmapped under its stream's work", "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address block = at.get(4 * MiB, 1);
    at.lagging->enqueue({1}, block, 4 * MiB, [] {});
    at.heap->free(block);
    CHECK(at.heap->release_idle(~Bytes{0}) == 4 * MiB);
    CHECK(at.lagging->breach().empty());
    CHECK(at.budget->charged() == 4 * MiB);  // it retires
    at.lagging->advance({1}, 10);
    at.pool->reclaim(~Bytes{0}, true);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("heap: memory that goes back waits for every stream that the heap serves, also where nobody told of its use",
          "[heap][streams]") {
    HeapFixture at({.lags = true});
    const Address others = at.get(4 * KiB, 2);
    at.get(4 * KiB, 3);
    const Address block = at.get(4 * MiB, 1);
    at.lagging->enqueue({2}, block, 4 * MiB, [] {});  // and no record_stream
    at.heap->free(block);
    at.faults->set_capturing({3}, true);  // what it captures does not run now
    CHECK(at.heap->release_idle(4 * MiB) == 4 * MiB);
    at.pool->reclaim(~Bytes{0}, false);
    CHECK(at.lagging->breach().empty());
    CHECK(at.pool->stats().retiring == 4 * MiB);
    at.lagging->advance({2}, 10);
    at.pool->reclaim(~Bytes{0}, true);
    CHECK(at.pool->stats().retiring == 0);
    at.faults->set_capturing({3}, false);
    at.heap->free(others);
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
