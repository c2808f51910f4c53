// A fork of a long prefix: the same memory mapped once more, beside a copy of it.
//
//   alias/M    extents of M MiB are shared, the last page is copied; `eight_forks` is physical bytes with eight forks
//   alive
//              over those of the prefix alone
//   copy/M     the same with nothing shared: every fork has memory of its own
//
// Prefixes of 2 GiB on CUDA (32k tokens of 64 KiB) and of 256 MiB on the host. Time is of one fork, without giving it
// back; on CUDA with the device's work.
#include <benchmark/benchmark.h>

#include <chrono>
#include <string>

#include "pool/virtual_memory_pool.h"
#include "support.h"

namespace {

using namespace elastikv;

constexpr Bytes page = 2 * MiB;

PoolOptions options_of(Bytes park) {
    PoolOptions options;
    options.page_size = page;
    options.park_limit = park;
    return options;
}

void fork(benchmark::State& state, const DriverPtr& driver, bool shares) {
    const Bytes prefix = driver->capabilities().kind == DeviceKind::cuda ? 2 * GiB : 256 * MiB;
    VirtualMemoryPool pool(16 * prefix, driver, options_of(0));
    AllocateOptions options;
    options.extents.largest = static_cast<Bytes>(state.range(0)) * MiB;
    pool.allocate(0, prefix, options);
    const Bytes tokens = prefix - page / 2;  // ends in the middle of the last page
    for (auto _ : state) {
        const auto start = std::chrono::steady_clock::now();
        pool.alias(prefix, 0, tokens, shares ? tokens : 0, options);
        pool.synchronize();
        state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        pool.deallocate(prefix, tokens);
        pool.drain();
    }
    if (!shares) return;
    for (Bytes i = 1; i <= 8; ++i) pool.alias(i * prefix, 0, tokens, tokens, options);
    state.counters["eight_forks"] = static_cast<double>(pool.physical_memory_usage()) / static_cast<double>(prefix);
}

void add_all(const std::string& device, const DriverPtr& driver) {
    for (const bool shares : {true, false}) {
        benchmark::RegisterBenchmark((device + (shares ? "/alias" : "/copy")).c_str(), fork, driver, shares)
            ->Arg(16)
            ->Arg(64)
            ->UseManualTime()
            ->Unit(benchmark::kMicrosecond);
    }
}

}  // namespace

int main(int argc, char** argv) {
    for_each_driver(add_all);
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
}
