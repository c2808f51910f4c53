// Every driver call of an operation fails in turn: the operation happens as a whole or not at all.
#include <functional>

#include "support/heap_fixture.h"

namespace elastikv::testing {
namespace {

// Returns how many calls were failed.
std::uint64_t fail_each_heap_call(const std::function<void(HeapFixture&)>& prepare,
                                  const std::function<void(HeapFixture&)>& operation, StatusCode code, bool lags) {
    for (std::uint64_t n = 1;; ++n) {
        CAPTURE(n, name_of(code), lags);
        HeapFixture at({.lags = lags});
        prepare(at);
        const HeapSnapshot before(*at.heap);
        at.faults->fail_nth(n, std::nullopt, code);
        bool threw = false;
        try {
            operation(at);
        } catch (const VmmError&) {
            threw = true;
            CHECK(HeapSnapshot(*at.heap) == before);
        }
        const bool struck = at.faults->struck();
        at.faults->heal();
        REQUIRE((struck || !threw));
        at.require_sound();
        if (threw) operation(at);  // nothing stands in its way now
        at.require_sound();
        at.finish();
        if (!struck) return n - 1;
        REQUIRE(n < 1000);
    }
}

void fail_each(const std::function<void(HeapFixture&)>& prepare, const std::function<void(HeapFixture&)>& operation,
               std::uint64_t at_least) {
    for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
        for (const bool lags : {false, true}) {
            CHECK(fail_each_heap_call(prepare, operation, code, lags) >= at_least);
        }
    }
}

TEST_CASE("heap: allocation that fails changes nothing", "[heap][faults]") {
    fail_each([](HeapFixture&) {}, [](HeapFixture& at) { at.get(3 * MiB); }, 3);
    fail_each([](HeapFixture&) {}, [](HeapFixture& at) { at.get(3 * MiB, 0, graph_arena); }, 3);
    fail_each([](HeapFixture& at) { at.get(3 * MiB); }, [](HeapFixture& at) { at.get(5 * MiB); }, 3);
}

TEST_CASE("heap: growth that takes another stream's idle memory may fail at any call", "[heap][faults]") {
    fail_each([](HeapFixture& at) { at.heap->free(at.get(8 * MiB, 1)); }, [](HeapFixture& at) { at.get(6 * MiB, 2); },
              3);
}

TEST_CASE("heap: empty_cache that fails leaves every block", "[heap][faults]") {
    fail_each(
        [](HeapFixture& at) {
            at.get(2 * MiB);
            const Address idle = at.get(4 * MiB, 1);
            at.heap->record_stream(idle, {2});
            at.heap->free(idle);
        },
        [](HeapFixture& at) { at.heap->empty_cache(); }, 2);
}

TEST_CASE("heap: a free is never refused, whatever the driver answers", "[heap][faults]") {
    for (const DriverCall call : {DriverCall::record_fence, DriverCall::query_fence, DriverCall::synchronize}) {
        HeapFixture at({.lags = true});
        const Address block = at.get(4 * KiB, 1);
        at.heap->record_stream(block, {2});
        at.faults->fail_from(1, call);
        CHECK(at.heap->free(block));
        at.faults->heal();
        at.finish();
    }
}

}  // namespace
}  // namespace elastikv::testing
