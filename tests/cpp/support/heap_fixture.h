// A heap over a pool and drivers of its own, so that a test can fail calls, hold work back, and see that nothing is
// left.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "heap/heap.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {

inline constexpr ArenaId graph_arena{7, 1};

struct HeapSetup {
    HeapOptions options{.idle_share = 0};  // so that growth is exact
    Bytes addresses = 1 * GiB;
    Bytes limit = no_limit;  // of the budget
    bool lags = false;       // device work runs when the test says so
};

struct HeapFixture {
    explicit HeapFixture(HeapSetup setup = {}) : page(host->capabilities().granularity) {
        DriverPtr beneath = host;
        if (setup.lags) beneath = lagging = std::make_shared<LaggingDriver>(host);
        faults = std::make_shared<FaultDriver>(beneath);
        budget = std::make_shared<PhysicalBudget>(setup.limit);
        pool = pool_on(budget, "heap", setup.addresses, faults, {.park_limit = 0});
        heap = std::make_shared<Heap>(pool, ByteRange{0, setup.addresses}, setup.options);
        pool->budget()->add_idle_holder(heap);
    }

    Address get(Bytes size, std::uintptr_t stream = 0, ArenaId arena = {}) const {
        HeapRequest request;
        request.requested = size;
        request.stream = {stream};
        request.arena = arena;
        return heap->allocate(request);
    }
    std::uint64_t calls(DriverCall call) const {
        return pool->stats().driver_calls[static_cast<std::size_t>(call)].count;
    }
    void require_sound() const {
        if (const std::string wrong = heap->check(); !wrong.empty()) FAIL(wrong);
        if (const std::string wrong = pool->check(); !wrong.empty()) FAIL(wrong);
        if (lagging && !lagging->breach().empty()) FAIL(lagging->breach());
    }
    // Destroys the heap and its pool: no byte charged, no handle and no fence left.
    void finish() {
        faults->heal();
        require_sound();
        heap.reset();
        pool.reset();
        REQUIRE(budget->charged() == 0);
        require_nothing_left(*host);
        REQUIRE(faults->live_fences() == 0);
        if (lagging) REQUIRE(lagging->breach().empty());
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    Bytes page;
    std::shared_ptr<LaggingDriver> lagging;
    std::shared_ptr<FaultDriver> faults;
    std::shared_ptr<PhysicalBudget> budget;
    std::shared_ptr<VirtualMemoryPool> pool;
    std::shared_ptr<Heap> heap;
};

// What callers can see of a heap's blocks: address, size and state of those that are handed out or still in use.
struct HeapSnapshot {
    explicit HeapSnapshot(const Heap& heap) {
        for (const SegmentView& segment : heap.snapshot()) {
            for (const BlockView& block : segment.blocks) {
                if (block.active) active.emplace_back(block.address, block.size, block.requested, block.allocated);
            }
        }
        std::sort(active.begin(), active.end());
    }
    friend bool operator==(const HeapSnapshot&, const HeapSnapshot&) = default;

    std::vector<std::tuple<Address, Bytes, Bytes, bool>> active;
};

}  // namespace elastikv::testing
