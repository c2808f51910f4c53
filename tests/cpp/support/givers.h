// Models that give idle memory to each other.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "shared/shared_memory_pool.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/watching_driver.h"

namespace elastikv::testing {

// Models on a device whose memory is never clean, as a GPU's. Each writes bytes of one value.
struct Givers {
    explicit Givers(Bytes limit_pages = 16, bool lags = false, Bytes from_pages = 1) {
        DriverPtr beneath = std::make_shared<DirtyDriver>(watching);
        if (lags) beneath = lagging = std::make_shared<LaggingDriver>(beneath);
        faults = std::make_shared<FaultDriver>(beneath);
        page = host->capabilities().granularity;
        shared = std::make_unique<SharedMemoryPool>(
            limit_pages * page, faults,
            PoolOptions{.park_limit = limit_pages * page, .handed_over_from = from_pages * page});
        for (const char* const name : {"one", "two", "three"}) models.push_back(shared->register_model(name, 64 * MiB));
    }

    static std::uint8_t stamp(std::size_t model) { return static_cast<std::uint8_t>(0xa1 + model); }
    void settle() const {
        if (lagging) REQUIRE(lagging->synchronize().ok());
    }
    void fill_with(std::size_t model, Address address, Bytes size) const {
        settle();
        fill(host->capabilities(), address, size, stamp(model));
    }
    bool is_zero(Address address, Bytes size) const {
        settle();
        return all_bytes_are(host->capabilities(), address, size, 0);
    }
    // Model `who` leaves extents of these many pages idle, the first for the longest, full of its bytes.
    void leave_idle(std::size_t who, const std::vector<Bytes>& pages) const {
        std::vector<Bytes> offsets;
        for (const Bytes each : pages) {
            const Address address = models[who]->allocate(each * page);
            offsets.push_back(address - models[who]->base_address());
            fill_with(who, address, each * page);
        }
        for (std::size_t i = 0; i < pages.size(); ++i) models[who]->deallocate(offsets[i], pages[i] * page);
        models[who]->pool().drain();
    }
    std::uint64_t calls(std::size_t who, DriverCall call) const {
        return models[who]->stats().driver_calls[static_cast<std::size_t>(call)].count;
    }
    Bytes received(std::size_t who) const { return models[who]->stats().received / page; }
    void require_sound() const {
        Bytes held = 0;
        for (const ModelPtr& model : models) {
            model->pool().drain();
            if (const std::string wrong = model->pool().check(); !wrong.empty()) FAIL(wrong);
            const MemoryStats stats = model->stats();
            REQUIRE(stats.created - stats.released == stats.physical_usage);
            REQUIRE(stats.physical_usage == model->quota().charged);
            held += stats.physical_usage;
        }
        REQUIRE(held == shared->global_stats().physical_usage);
        REQUIRE(held == watching->physical());
        REQUIRE(watching->peak() <= shared->global_stats().physical_limit);
        if (lagging && !lagging->breach().empty()) FAIL(lagging->breach());
    }
    // `refused`: the driver would not take all back, which may have cost it a fence.
    void finish(bool refused = false) {
        faults->heal();
        require_sound();
        models.clear();
        shared.reset();
        REQUIRE(watching->physical() == 0);
        require_nothing_left(*host);
        REQUIRE((refused || faults->live_fences() == 0));
        if (lagging) REQUIRE(lagging->breach().empty());
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> watching = std::make_shared<WatchingDriver>(host);
    std::shared_ptr<LaggingDriver> lagging;
    std::shared_ptr<FaultDriver> faults;
    Bytes page = 0;
    std::unique_ptr<SharedMemoryPool> shared;
    std::vector<ModelPtr> models;
};

}  // namespace elastikv::testing
