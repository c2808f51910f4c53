// No byte that one model wrote is readable by another, whatever the device's fresh memory holds.
#include <map>

#include "shared/shared_memory_pool.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

// Each model writes bytes of one value. All fresh memory is dirty, so whatever is handed out unscrubbed shows.
struct TwoModels {
    explicit TwoModels(bool lags) {
        DriverPtr driver = std::make_shared<DirtyDriver>(host);
        if (lags) driver = lagging = std::make_shared<LaggingDriver>(driver);
        page = driver->capabilities().granularity;
        shared = std::make_unique<SharedMemoryPool>(64 * page, driver,
                                                    PoolOptions{.park_limit = 8 * page, .handed_over_from = page});
        models = {shared->register_model("one", 128 * page), shared->register_model("two", 128 * page)};
    }
    void settle() {
        if (lagging) REQUIRE(lagging->synchronize().ok());
    }
    // Whether the pages hold nothing but zeros and bytes that the model itself wrote.
    bool is_own(std::size_t model, Address address, Bytes size) {
        settle();
        const ByteRange pages = align_outward({address, address + size}, page);
        const std::vector<std::uint8_t> bytes = read(host->capabilities(), pages.begin, pages.size());
        return std::all_of(bytes.begin(), bytes.end(), [&](std::uint8_t b) { return b == 0 || b == stamp(model); });
    }
    static std::uint8_t stamp(std::size_t model) { return model == 0 ? 0xa1 : 0xb2; }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<LaggingDriver> lagging;
    Bytes page = 0;
    std::unique_ptr<SharedMemoryPool> shared;
    std::vector<ModelPtr> models;
};

TEST_CASE("invariant 4: memory that changes hands is zeroed", "[shared][scrub]") {
    for (const bool lags : {false, true}) {
        CAPTURE(lags);
        TwoModels at(lags);
        // All of the limit goes from one model to the other, through allocations, regions and prefetches.
        const Address first = at.models[0]->allocate(64 * at.page);
        at.settle();
        fill(at.host->capabilities(), first, 64 * at.page, TwoModels::stamp(0));
        at.models[0]->deallocate(0, 64 * at.page);
        const Address second = at.models[1]->allocate(20 * at.page + 5);
        CHECK(at.is_own(1, second, 20 * at.page + 5));
        const auto region = at.models[1]->reserve(32 * at.page);
        region->claim(0, 10, open_ended(32 * at.page, 32 * at.page));
        CHECK(at.is_own(1, region->base(), 10));
        region->claim(10, at.page, {});
        CHECK(at.is_own(1, region->base(), at.page + 10));
        region->prefetch(8 * at.page, 4 * at.page);
        at.models[1]->pool().drain();
        region->claim(8 * at.page, 4 * at.page, {});
        CHECK(at.is_own(1, region->base() + 8 * at.page, 4 * at.page));
        if (lags) CHECK(at.lagging->breach().empty());
    }
}

TEST_CASE("invariant 4: at random, a model reads zeros and its own bytes only", "[shared][scrub][random]") {
    const std::uint64_t seed = test_seed(20240604);
    for (const bool lags : {false, true}) {
        CAPTURE(seed, lags);
        TwoModels at(lags);
        Random random(seed);
        std::vector<std::map<Bytes, Bytes>> held(2);  // offset -> size, by model
        for (std::uint64_t step = 0; step < test_steps(4'000); ++step) {
            CAPTURE(step);
            const std::size_t who = random.below(2);
            Model& model = *at.models[who];
            if (random.one_in(2) || held[who].empty()) {
                const Bytes size = 1 + random.below(12 * at.page);
                AllocateOptions options;
                options.zero = random.one_in(3);
                try {
                    const Address address = model.allocate(size, options);
                    REQUIRE(at.is_own(who, address, size));
                    if (options.zero) REQUIRE(all_bytes_are(at.host->capabilities(), address, size, 0));
                    fill(at.host->capabilities(), address, size, TwoModels::stamp(who));
                    held[who][address - model.base_address()] = size;
                } catch (const OutOfPhysicalMemory&) {
                    if (random.one_in(4)) model.pool().compact();
                } catch (const OutOfVirtualMemory&) {
                }
            } else {
                auto chosen = held[who].begin();
                std::advance(chosen, random.below(held[who].size()));
                model.deallocate(chosen->first, chosen->second);
                held[who].erase(chosen);
            }
        }
        if (lags) CHECK(at.lagging->breach().empty());
    }
}

}  // namespace
}  // namespace elastikv::testing
