// Memory that is reused within a graph while it is recorded.
#include <set>

#include "support/drawn_graph.h"
#include "support/heap_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("capture order: a point has passed once the stream runs after all of it", "[heap][captures]") {
    DrawnGraph graph;
    graph.record(1);
    graph.join(2, 1);
    const auto begun = graph.point_of({2});
    graph.record(2);
    graph.record(1);
    const auto later = graph.point_of({2});
    REQUIRE(begun);
    REQUIRE(later);
    CHECK(graph.capture_of({2}) == 1);
    CHECK(later->stream == Stream{2});
    REQUIRE(graph.look({1}));
    CHECK(graph.passed(*begun));
    CHECK_FALSE(graph.passed(*later));
    graph.join(1, 2);
    REQUIRE(graph.look({1}));
    CHECK(graph.passed(*later));
    graph.record(1);
    REQUIRE(graph.look({1}));
    CHECK(graph.passed(*later));
    REQUIRE(graph.look({2}));  // which is not behind the other in turn
    CHECK_FALSE(graph.passed(*graph.point_of({1})));
}

TEST_CASE("capture order: each node is looked at once a stream", "[heap][captures]") {
    DrawnGraph graph;
    for (int i = 0; i < 100; ++i) {
        graph.record(1);
        graph.join(2, 1);
        graph.record(2);
        graph.join(1, 2);
        REQUIRE(graph.look({1}));
    }
    CHECK(graph.looks == 200);
    REQUIRE(graph.look({1}));
    CHECK(graph.looks == 200);
}

TEST_CASE("capture order: nothing is said where a node may begin early, of other captures, or of none",
          "[heap][captures]") {
    DrawnGraph graph;
    graph.record(1);
    const auto point = graph.point_of({1});
    REQUIRE(point);
    SECTION("an edge behind the stream") {
        graph.loose.push_back(graph.record(1));
        CHECK_FALSE(graph.look({1}));
        graph.loose.clear();
        graph.record(1);
        CHECK_FALSE(graph.look({1}));  // what was behind that node is not known
        CHECK_FALSE(graph.passed(*point));
    }
    SECTION("an edge of what comes next") {
        graph.at[1].strictly = false;
        CHECK_FALSE(graph.look({1}));
        CHECK_FALSE(graph.passed(*point));
        graph.at[1].strictly = true;
        CHECK(graph.look({1}));
        CHECK(graph.passed(*point));
    }
    SECTION("another capture") {
        graph.at[1].capture = 2;
        REQUIRE(graph.look({1}));
        CHECK_FALSE(graph.passed(*point));
    }
    SECTION("none") {
        REQUIRE(graph.look({1}));
        graph.at.erase(1);
        CHECK_FALSE(graph.look({1}));
        CHECK_FALSE(graph.passed(*point));
        CHECK(graph.capture_of({1}) == 0);
        CHECK_FALSE(graph.point_of({1}));
    }
}

// Three streams record one graph, in which the second and the third run what the first has begun.
struct CaptureFixture : HeapFixture {
    CaptureFixture() : HeapFixture({.lags = true}) {
        heap->set_capture_order(&graph);
        heap->use_arena(graph_arena);
        graph.record(1);
        for (const std::uintptr_t stream : {2U, 3U}) graph.join(stream, 1);
        capturing(true);
    }
    void capturing(bool value) const {
        for (const std::uintptr_t stream : {1U, 2U, 3U}) faults->set_capturing({stream}, value);
    }
    Address get_here(std::uintptr_t stream = 1) const { return get(4 * KiB, stream, graph_arena); }
    // Used by streams 2 and 3, and freed.
    void free_used(Address block) {
        for (const std::uintptr_t stream : {2U, 3U}) {
            graph.record(stream);
            heap->record_stream(block, {stream});
        }
        heap->free(block);
    }
    void done() {
        capturing(false);
        finish();
    }
    DrawnGraph graph;
};

TEST_CASE("heap: a block that streams of one capture used is reused once they have joined", "[heap][captures]") {
    CaptureFixture at;
    const Address block = at.get_here();
    at.free_used(block);
    const Address first = at.get_here();
    CHECK(first != block);
    at.graph.join(1, 2);
    CHECK(at.get_here() != block);  // not yet behind the other
    at.graph.join(1, 3);
    CHECK(at.get_here(2) != block);  // whose stream is not behind the others
    CHECK(at.get_here() == block);
    at.require_sound();
    SECTION("and again") {
        at.free_used(block);
        CHECK(at.get_here() != block);
        at.graph.join(1, 2);
        at.graph.join(1, 3);
        CHECK(at.get_here() == block);
    }
    at.done();
}

TEST_CASE("heap: blocks are reused within a capture in whatever order they were freed", "[heap][captures]") {
    CaptureFixture at;
    std::set<Address> blocks;
    for (int i = 0; i < 6; ++i) blocks.insert(at.get_here());
    for (const Address block : blocks) at.free_used(block);
    at.graph.join(1, 2);
    at.graph.join(1, 3);
    std::set<Address> again;
    for (int i = 0; i < 6; ++i) again.insert(at.get_here());
    CHECK(again == blocks);
    at.done();
}

TEST_CASE("heap: what no capture orders waits for fences", "[heap][captures]") {
    CaptureFixture at;
    SECTION("a block of the common arena") {
        const Address block = at.get(4 * KiB, 1);
        at.free_used(block);
        at.graph.join(1, 2);
        at.graph.join(1, 3);
        CHECK(at.get(4 * KiB, 1) != block);
        at.capturing(false);
        CHECK(at.get(4 * KiB, 1) == block);
    }
    SECTION("a block from before the capture, which users may have used before they joined it") {
        for (auto& [stream, stand] : at.graph.at) stand.capture = 2;
        const Address block = at.get_here();
        for (auto& [stream, stand] : at.graph.at) stand.capture = 3;
        at.free_used(block);
        at.graph.join(1, 2);
        at.graph.join(1, 3);
        CHECK(at.get_here() != block);
    }
    SECTION("a user that does not record") {
        const Address block = at.get_here();
        at.lagging->enqueue({4}, block, 4 * KiB, [] {});
        at.heap->record_stream(block, {4});
        at.free_used(block);
        at.graph.join(1, 2);
        at.graph.join(1, 3);
        CHECK(at.get_here() != block);
        at.lagging->advance({4}, 10);
        CHECK(at.get_here() == block);
    }
    SECTION("once the capture has ended") {
        const Address block = at.get_here();
        at.free_used(block);
        at.graph.at.clear();
        CHECK(at.get_here() != block);
        at.lagging->enqueue({2}, block, 4 * KiB, [] {});
        at.capturing(false);
        CHECK(at.get_here() != block);
        at.lagging->advance({2}, 10);
        CHECK(at.get_here() == block);
    }
    SECTION("where it is not asked for") {
        const Address block = at.get_here();
        at.free_used(block);
        at.heap->set_capture_order(nullptr);
        at.graph.join(1, 2);
        at.graph.join(1, 3);
        CHECK(at.get_here() != block);
    }
    at.done();
}

}  // namespace
}  // namespace elastikv::testing
