// A block pool over drivers of its own, so that a test can fail calls, let device work lag, and see that nothing is
// left.
#pragma once

#include <memory>
#include <vector>

#include "driver/fault_driver.h"
#include "shared/block_pool.h"
#include "shared/shared_memory_pool.h"
#include "support/dirty_driver.h"
#include "support/drivers.h"
#include "support/lagging_driver.h"
#include "support/memory.h"
#include "support/watching_driver.h"

namespace elastikv::testing {

struct BlockSetup {
    std::uint64_t blocks = 64;
    Bytes block = 0;           // 0: a quarter of a page
    Bytes extent_pages = 1;    // so 4 blocks an extent
    Bytes limit_pages = 4096;  // of the budget
    bool lags = false;         // device work runs when the test says so
    Bytes park_pages = 0;
    Bytes ahead_pages = 0;
};

struct BlockFixture {
    explicit BlockFixture(const BlockSetup& setup = {}) {
        page = host->capabilities().granularity;
        DriverPtr beneath = std::make_shared<DirtyDriver>(watching);
        if (setup.lags) beneath = lagging = std::make_shared<LaggingDriver>(beneath);
        faults = std::make_shared<FaultDriver>(beneath);
        shared = std::make_unique<SharedMemoryPool>(setup.limit_pages * page, faults,
                                                    PoolOptions{.park_limit = setup.park_pages * page});
        model = shared->register_model("paged", 64 * GiB);
        const Bytes block = setup.block == 0 ? page / 4 : setup.block;
        pool = std::make_unique<BlockPool>(
            model, BlockLayout::fit(setup.blocks, block, model->pool().page_size(), setup.extent_pages * page), "",
            setup.ahead_pages * page);
    }

    std::vector<BlockId> take(std::size_t count, std::uintptr_t stream = 0) const {
        std::vector<BlockId> ids(count);
        pool->allocate(ids, {stream});
        return ids;
    }
    void free(const std::vector<BlockId>& ids, std::vector<Stream> streams = {Stream{}}) const {
        pool->free(ids, streams);
    }
    Address at(BlockId id) const { return pool->base() + static_cast<Bytes>(id) * pool->layout().stride; }
    void stamp(BlockId id, std::uint8_t value) const {
        fill(host->capabilities(), at(id), pool->layout().block, value);
    }
    bool holds(BlockId id, std::uint8_t value) const {
        return all_bytes_are(host->capabilities(), at(id), pool->layout().block, value);
    }
    std::uint64_t calls(DriverCall call) const {
        return model->stats().driver_calls[static_cast<std::size_t>(call)].count;
    }

    void require_sound() const {
        model->pool().drain();
        if (const std::string wrong = pool->check(); !wrong.empty()) FAIL(wrong);
        if (const std::string wrong = model->pool().check(); !wrong.empty()) FAIL(wrong);
        const MemoryStats stats = model->stats();
        REQUIRE(shared->global_stats().physical_usage == watching->physical());
        REQUIRE(stats.live == pool->stats().physical);
    }

    void finish() {
        faults->heal();
        pool.reset();
        if (lagging) REQUIRE(lagging->breach().empty());
        model->pool().drain();
        model->pool().trim();
        model.reset();
        shared.reset();
        REQUIRE(watching->physical() == 0);
        require_nothing_left(*host);
        REQUIRE(faults->live_fences() == 0);
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> watching = std::make_shared<WatchingDriver>(host);
    std::shared_ptr<LaggingDriver> lagging;
    std::shared_ptr<FaultDriver> faults;
    Bytes page = 0;
    std::unique_ptr<SharedMemoryPool> shared;
    ModelPtr model;
    std::unique_ptr<BlockPool> pool;
};

}  // namespace elastikv::testing
