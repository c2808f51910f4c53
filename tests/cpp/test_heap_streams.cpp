// Blocks that change hands between streams, on a device whose work lags.
#include <map>
#include <set>

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

// Streams that record a graph, by the numbers of the nodes that they are at; nodes come after all of smaller numbers.
struct LineOfNodes final : CaptureOrder {
    std::map<std::uintptr_t, std::uintptr_t> at;
    std::map<std::uintptr_t, std::uint64_t> capture;

    std::optional<CapturePoint> point_of(Stream stream) noexcept override {
        if (!at.contains(stream.value)) return std::nullopt;
        return CapturePoint{stream, capture[stream.value], {reinterpret_cast<const void*>(at[stream.value])}};
    }
    bool runs_after(Stream stream, const CapturePoint& point) noexcept override {
        if (!at.contains(stream.value) || capture[stream.value] != point.capture) return false;
        return at[stream.value] >= reinterpret_cast<std::uintptr_t>(point.nodes.at(0));
    }
};

TEST_CASE("heap: a block that streams of one capture used is reused once they have joined", "[heap][streams]") {
    HeapFixture at({.lags = true});
    LineOfNodes order;
    at.heap->set_capture_order(&order);
    at.heap->use_arena(graph_arena);
    const auto get = [&](std::uintptr_t stream, ArenaId arena) { return at.get(4 * KiB, stream, arena); };
    for (const std::uintptr_t stream : {1U, 2U, 3U}) {
        at.faults->set_capturing({stream}, true);
        order.at[stream] = stream;
        order.capture[stream] = 5;
    }
    const Address block = get(1, graph_arena), outside = get(1, {});
    const std::vector<Address> more{get(1, graph_arena), get(1, graph_arena), get(1, graph_arena)};
    for (const Address each : {block, outside}) {
        at.heap->record_stream(each, {2});
        at.heap->record_stream(each, {3});
        at.heap->free(each);
    }
    CHECK(get(1, graph_arena) != block);
    order.at[1] = 2;  // behind the one, not yet behind the other
    CHECK(get(1, graph_arena) != block);
    SECTION("and behind the other") {
        order.at[1] = 3;
        CHECK(get(1, graph_arena) == block);
        CHECK(get(1, {}) != outside);  // which no graph owns
        at.faults->set_capturing({2}, false);
        at.faults->set_capturing({3}, false);
        CHECK(get(1, {}) == outside);
    }
    SECTION("however late it was freed") {
        order.at[1] = 4;
        for (const Address each : more) {
            at.heap->record_stream(each, {2});
            order.at[2] = 9;
            at.heap->free(each);
        }
        const Address first = get(1, graph_arena);
        CHECK(first == block);
        order.at[1] = 9;
        std::set<Address> again{get(1, graph_arena), get(1, graph_arena), get(1, graph_arena)};
        CHECK(again == std::set<Address>(more.begin(), more.end()));
    }
    SECTION("but not in another capture") {
        order.at[1] = 9;
        order.capture[1] = 6;
        CHECK(get(1, graph_arena) != block);
        for (const std::uintptr_t stream : {1U, 2U, 3U}) order.at.erase(stream);
        CHECK(get(1, graph_arena) != block);
        at.faults->set_capturing({2}, false);
        at.faults->set_capturing({3}, false);
        CHECK(get(1, graph_arena) == block);
    }
    SECTION("nor where it is not asked for") {
        at.heap->set_capture_order(nullptr);
        order.at[1] = 9;
        CHECK(get(1, graph_arena) != block);
    }
    CHECK(at.heap->check().empty());
    for (const std::uintptr_t stream : {1U, 2U, 3U}) at.faults->set_capturing({stream}, false);
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
