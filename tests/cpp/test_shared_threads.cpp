// Eight threads on one shared pool.
#include <atomic>
#include <thread>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"
#include "support/random.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

constexpr std::size_t thread_count = 8;
constexpr std::size_t model_count = 3;

struct Workbench {
    explicit Workbench(bool asynchronous) {
        const auto faults = std::make_shared<FaultDriver>(std::make_shared<DirtyDriver>(watching));
        if (asynchronous) {
            faults->hold_fences();
            faults->let_pass();
        }
        page = host->capabilities().granularity;
        // Tight: eight threads that each hold a few pages pass it now and then.
        shared = std::make_unique<SharedMemoryPool>(32 * page, faults,
                                                    PoolOptions{.park_limit = 8 * page, .handed_over_from = page});
        for (std::size_t i = 0; i < model_count; ++i) {
            models.push_back(shared->register_model("model " + std::to_string(i), 512 * page));
        }
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> watching = std::make_shared<WatchingDriver>(host);
    Bytes page = 0;
    std::unique_ptr<SharedMemoryPool> shared;
    std::vector<ModelPtr> models;
    std::atomic<std::uint64_t> faults_seen{0};
    std::atomic<std::uint64_t> refusals{0};
};

// One thread's life: allocations and a region of its own, in models that it shares with the others. Catch2's assertions
// are not thread safe, so what goes wrong is counted.
class Worklife {
  public:
    Worklife(Workbench& bench, std::uint64_t seed, std::uint8_t stamp) : at_(bench), random_(seed), stamp_(stamp) {}

    void live(std::uint64_t steps) {
        for (std::uint64_t i = 0; i < steps; ++i) {
            try {
                if (i == steps / 2) press();
                step();
            } catch (const OutOfPhysicalMemory&) {
                ++at_.refusals;
            } catch (const std::exception&) {
                ++at_.faults_seen;
            }
        }
        while (!held_.empty()) free_one();
        region_.reset();
    }

  private:
    struct Held {
        std::size_t model;
        Address address;
        Bytes size;
    };

    void step() {
        switch (random_.below(10)) {
            case 0:
            case 1:
            case 2: allocate(); break;
            case 3:
            case 4:
            case 5:
                if (!held_.empty()) free_one();
                break;
            case 6: grow_region(); break;
            case 7: region_.reset(); break;
            case 8: look(); break;
            default:
                if (random_.one_in(4)) {
                    at_.shared->trim();
                } else {
                    at_.models[random_.below(model_count)]->pool().prefetch(random_.below(500) * at_.page, at_.page);
                }
        }
    }

    // Takes all that there is, so that each thread feels the limit, however they are scheduled. What it took goes back
    // step by step.
    void press() {
        for (;;) take();
    }

    void allocate() {
        if (held_.size() < 4) take();
    }

    void take() {
        const std::size_t which = random_.below(model_count);
        const Bytes size = 1 + random_.below(3 * at_.page);
        const Address address = at_.shared->allocate_for_model("model " + std::to_string(which), size,
                                                               random_.one_in(2) ? zeroed() : AllocateOptions{});
        fill(at_.host->capabilities(), address, size, stamp_);
        held_.push_back({which, address, size});
    }

    void free_one() {
        const std::size_t which = random_.below(held_.size());
        const Held gone = held_[which];
        held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(which));
        if (!all_bytes_are(at_.host->capabilities(), gone.address, gone.size, stamp_)) ++at_.faults_seen;
        Model& model = *at_.models[gone.model];
        model.deallocate(gone.address - model.base_address(), gone.size);
    }

    void grow_region() {
        if (!region_) {
            region_ = at_.models[random_.below(model_count)]->reserve(16 * at_.page);
            length_ = 0;
        }
        const Bytes size = std::min(1 + random_.below(2 * at_.page), 8 * at_.page - length_);
        if (size == 0) return;
        region_->claim(length_, size, open_ended(length_, 16 * at_.page));
        fill(at_.host->capabilities(), region_->base() + length_, size, stamp_);
        length_ += size;
        if (!all_bytes_are(at_.host->capabilities(), region_->base(), length_, stamp_)) ++at_.faults_seen;
    }

    void look() {
        const GlobalMemoryStats stats = at_.shared->global_stats();
        if (stats.physical_usage > stats.physical_limit) ++at_.faults_seen;
        const MemoryStats model = at_.models[random_.below(model_count)]->stats();
        const Bytes sum = model.used + model.retiring + model.parked + model.stranded;
        if (model.physical_usage != sum) ++at_.faults_seen;
    }

    Workbench& at_;
    Random random_;
    const std::uint8_t stamp_;
    std::vector<Held> held_;
    std::unique_ptr<Region> region_;
    Bytes length_ = 0;
};

TEST_CASE("eight threads on one shared pool agree", "[shared][threads]") {
    const std::uint64_t seed = test_seed(20240605);
    for (const bool asynchronous : {false, true}) {
        CAPTURE(seed, asynchronous);
        Workbench bench(asynchronous);
        std::vector<std::thread> threads;
        for (std::size_t t = 0; t < thread_count; ++t) {
            threads.emplace_back(
                [&, t] { Worklife(bench, seed + t, static_cast<std::uint8_t>(t + 1)).live(test_steps(2'000)); });
        }
        for (std::thread& thread : threads) thread.join();
        CHECK(bench.faults_seen == 0);
        CHECK(bench.refusals > 0);  // or the limit was never felt
        const Bytes limit = bench.shared->global_stats().physical_limit;
        CHECK(bench.watching->peak() <= limit);
        CHECK(bench.shared->global_stats().peak_physical <= limit);
        for (const ModelPtr& model : bench.models) {
            model->pool().drain();
            CHECK(model->stats().live == 0);
            CHECK(model->pool().check().empty());
        }
        bench.shared->trim();
        CHECK(bench.shared->global_stats().physical_usage == 0);
        CHECK(bench.watching->physical() == 0);
        bench.models.clear();
        bench.shared.reset();
        require_nothing_left(*bench.host);
    }
}

TEST_CASE("models come and go while others work", "[shared][threads][unregister]") {
    Workbench bench(true);
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < thread_count; ++t) {
        threads.emplace_back([&, t] {
            const std::string id = "guest " + std::to_string(t % 4);  // two threads a name
            for (std::uint64_t i = 0; i < test_steps(300); ++i) {
                try {
                    const ModelPtr model = bench.shared->register_model(id, 64 * bench.page);
                    const auto region = model->reserve(4 * bench.page);
                    region->claim(0, 100, {});
                    model->allocate(2 * bench.page);
                    bench.shared->unregister_model(id);
                } catch (const ModelAlreadyExists&) {
                    try {
                        bench.shared->allocate_for_model(id, 100);
                    } catch (const ModelNotFound&) {
                        ++bench.refusals;
                    } catch (const OutOfPhysicalMemory&) {
                        ++bench.refusals;
                    }
                } catch (const OutOfPhysicalMemory&) {
                    bench.shared->unregister_model(id);
                }
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(bench.shared->models().size() == model_count);
    CHECK(bench.shared->global_stats().physical_usage == 0);
    CHECK(bench.watching->physical() == 0);
    CHECK(bench.watching->peak() <= bench.shared->global_stats().physical_limit);
}

TEST_CASE("closing while others work leaves nothing behind", "[shared][threads]") {
    for (std::uint64_t round = 0; round < test_steps(20); ++round) {
        Workbench bench(round % 2 == 0);
        std::vector<std::thread> threads;
        for (std::size_t t = 0; t < 4; ++t) {
            threads.emplace_back([&] {
                for (;;) {
                    try {
                        bench.shared->allocate_for_model("model 1", bench.page);
                        bench.models[1]->pool().prefetch(256 * bench.page, bench.page);
                    } catch (const OutOfPhysicalMemory&) {
                        std::this_thread::yield();
                    } catch (const PoolClosed&) {
                        return;
                    } catch (const ModelNotFound&) {
                        return;
                    }
                }
            });
        }
        std::this_thread::yield();
        bench.shared->close();
        for (std::thread& thread : threads) thread.join();
        for (const ModelPtr& model : bench.models) CHECK(model->stats().live == 0);
        bench.models.clear();
        bench.shared.reset();
        CHECK(bench.watching->physical() == 0);
        require_nothing_left(*bench.host);
    }
}

}  // namespace
}  // namespace elastikv::testing
