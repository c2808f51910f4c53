// Blocks for paged attention: how fast they come and go, and how much memory they hold.
//
//   warm/N          batches of N blocks, allocated and freed on extents that stay mapped; items are blocks
//   mutex/N         the floor: as many locks and unlocks of a std::mutex as warm/N takes, and a list of ids in a vector
//   cold/N          the same where each batch maps an extent and gives it back to a pool that parks it
//   sequences/B     60,000 steps of arrivals, growth and ends of sequences over extents of B blocks; `over_held` is
//                   physical bytes over held bytes, summed over time, `worst` the largest at any step, `end` the last
//
// On the host, and on CUDA device 0 where there is one.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "shared/block_pool.h"
#include "shared/shared_memory_pool.h"
#include "support.h"

namespace {

using namespace elastikv;

struct Paged {
    Paged(const DriverPtr& driver, std::uint64_t blocks, Bytes block, Bytes extent, Bytes page = 2 * MiB) {
        PoolOptions options;
        options.page_size = page;
        options.park_limit = 256 * MiB;
        shared = std::make_unique<SharedMemoryPool>(Bytes{1} << 36, driver, options);
        model = shared->register_model("paged", Bytes{1} << 42);
        pool = std::make_unique<BlockPool>(model, BlockLayout::fit(blocks, block, options.page_size, extent));
    }

    std::unique_ptr<SharedMemoryPool> shared;
    ModelPtr model;
    std::unique_ptr<BlockPool> pool;
};

void count_blocks(benchmark::State& state) {
    state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()) * state.range(0));
}

void warm(benchmark::State& state, const DriverPtr& driver) {
    const Paged at(driver, 4096, 512 * KiB, 16 * MiB);
    std::vector<BlockId> all(4096);
    at.pool->allocate(all);
    std::vector<BlockId> others;  // every second block of the first half is free, and no extent empties
    for (std::size_t i = 0; i < 2048; i += 2) others.push_back(all[i]);
    at.pool->free(others);
    std::vector<BlockId> ids(static_cast<std::size_t>(state.range(0)));
    for (auto _ : state) {
        at.pool->allocate(ids);
        at.pool->free(ids);
    }
    count_blocks(state);
}

void floor_of_mutex(benchmark::State& state) {
    std::mutex mutex;
    std::vector<BlockId> free(4096);
    std::vector<BlockId> ids(static_cast<std::size_t>(state.range(0)));
    for (auto _ : state) {
        {
            const std::lock_guard lock(mutex);
            for (BlockId& id : ids) {
                id = free.back();
                free.pop_back();
            }
        }
        benchmark::ClobberMemory();
        const std::lock_guard lock(mutex);
        for (const BlockId id : ids) free.push_back(id);
    }
    count_blocks(state);
}

void cold(benchmark::State& state, const DriverPtr& driver) {
    const Paged at(driver, 4096, 512 * KiB, 16 * MiB);
    std::vector<BlockId> ids(static_cast<std::size_t>(state.range(0)));
    for (auto _ : state) {
        at.pool->allocate(ids);
        at.pool->free(ids);
    }
    count_blocks(state);
}

struct Sequence {
    std::vector<BlockId> ids;
    int tokens = 0;
    int end = 0;
};

void sequences(benchmark::State& state, const DriverPtr& driver) {
    constexpr int block_tokens = 16, steps = 60'000;
    for (auto _ : state) {
        const Bytes block = 64 * KiB;
        const Paged at(driver, 1 << 15, block, static_cast<Bytes>(state.range(0)) * block, block);
        std::mt19937_64 random(7);
        std::lognormal_distribution<double> prompts(6.0, 1.0), answers(5.5, 0.9);
        std::poisson_distribution<int> arrivals(0.1);
        std::vector<Sequence> alive;
        double physical = 0, held = 0, worst = 0, now = 0;
        for (int step = 0; step < steps; ++step) {
            for (int i = arrivals(random); i > 0; --i) {
                Sequence s;
                s.tokens = 1 + std::min(8000, static_cast<int>(prompts(random)));
                s.end = s.tokens + 1 + std::min(4000, static_cast<int>(answers(random)));
                s.ids.resize(static_cast<std::size_t>((s.tokens + block_tokens - 1) / block_tokens));
                at.pool->allocate(s.ids);
                alive.push_back(std::move(s));
            }
            for (std::size_t i = 0; i < alive.size();) {
                Sequence& s = alive[i];
                if (s.tokens == s.end) {
                    at.pool->free(s.ids);
                    std::swap(s, alive.back());
                    alive.pop_back();
                    continue;
                }
                if (s.tokens++ % block_tokens == 0) {
                    s.ids.emplace_back();
                    at.pool->allocate({&s.ids.back(), 1});
                }
                ++i;
            }
            const BlockStats stats = at.pool->stats();
            if (step < steps / 10 || stats.held == 0) continue;
            physical += static_cast<double>(stats.physical);
            held += static_cast<double>(stats.held * block);
            now = static_cast<double>(stats.physical) / static_cast<double>(stats.held * block);
            worst = std::max(worst, now);
        }
        state.counters["over_held"] = physical / held;
        state.counters["worst"] = worst;
        state.counters["end"] = now;
    }
}

void add_all(const std::string& device, const DriverPtr& driver) {
    benchmark::RegisterBenchmark((device + "/warm").c_str(), warm, driver)->Arg(1)->Arg(8)->Arg(64)->Arg(512);
    benchmark::RegisterBenchmark((device + "/cold").c_str(), cold, driver)->Arg(1)->Arg(32);
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::RegisterBenchmark("mutex", floor_of_mutex)->Arg(1)->Arg(8)->Arg(64)->Arg(512);
    for_each_driver(add_all);
    benchmark::RegisterBenchmark("host/sequences", sequences, host_driver())
        ->Arg(4)
        ->Arg(8)
        ->Arg(16)
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
}
