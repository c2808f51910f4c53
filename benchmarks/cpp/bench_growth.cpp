// What it costs to make 1 GiB resident, all ways in one run on the same device, so that they can be compared:
//
//   floor          the driver alone: one handle, created, mapped and made accessible
//   page_by_page   a handle a page, three driver calls each, as pools that keep a handle for each page do
//   known_size     VirtualMemoryPool::allocate of the whole
//   open_ended     the same in steps of 2 MiB, each of which might be the last
//   parked         taking up again what was freed and is still mapped
//   plain_mmap     (host only) one anonymous mmap
//
// Times are of the growth alone; giving back is not in them, except in the rows named give_back. `overshoot` is
// physical bytes beyond what was asked, as a share of it; `driver_calls` counts those of the timed part.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <chrono>
#include <string>
#include <vector>

#include "pool/virtual_memory_pool.h"
#include "support.h"

namespace {

using namespace elastikv;

constexpr Bytes total = GiB;
constexpr Bytes page = 2 * MiB;
constexpr int repetitions = 25;

class Timer {
  public:
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

  private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::uint64_t calls_of(const MemoryStats& stats) {
    std::uint64_t calls = 0;
    for (const DriverCallStats& each : stats.driver_calls) calls += each.count;
    return calls;
}

// One handle of `unit` bytes after the other, until `total` is resident.
void by_handles(benchmark::State& state, const DriverPtr& driver, Bytes unit, bool time_giving_back) {
    for (auto _ : state) {
        Address base = 0;
        must(driver->reserve(total, 0, base));
        std::vector<ExtentHandle> handles;
        handles.reserve(total / unit);
        const Timer growth;
        for (Bytes offset = 0; offset < total; offset += unit) {
            ExtentHandle handle;
            must(driver->create(unit, handle));
            must(driver->map(base + offset, unit, handle));
            must(driver->set_access(base + offset, unit));
            handles.push_back(handle);
        }
        const double grown = growth.seconds();
        const Timer giving_back;
        for (std::size_t i = 0; i < handles.size(); ++i) {
            must(driver->unmap(base + i * unit, unit));
            must(driver->release(handles[i]));
        }
        state.SetIterationTime(time_giving_back ? giving_back.seconds() : grown);
        must(driver->free_addresses(base, total));
    }
    state.counters["driver_calls"] = static_cast<double>((time_giving_back ? 2 : 3) * (total / unit));
}

void report(benchmark::State& state, const VirtualMemoryPool& pool, std::uint64_t calls_before) {
    const MemoryStats stats = pool.stats();
    state.counters["driver_calls"] = static_cast<double>(calls_of(stats) - calls_before);
    state.counters["extents"] = static_cast<double>(stats.extents);
    state.counters["overshoot"] =
        static_cast<double>(stats.physical_usage - stats.live) / static_cast<double>(stats.live);
}

PoolOptions options(Bytes park_limit) {
    PoolOptions chosen;
    chosen.page_size = page;
    chosen.park_limit = park_limit;
    return chosen;
}

void known_size(benchmark::State& state, const DriverPtr& driver, bool time_giving_back) {
    for (auto _ : state) {
        VirtualMemoryPool pool(total, driver, options(total));
        const std::uint64_t before = calls_of(pool.stats());
        const Timer growth;
        pool.allocate(0, total);
        const double grown = growth.seconds();
        report(state, pool, before);
        pool.deallocate(0, total);
        pool.drain();
        const Timer giving_back;
        pool.trim();
        state.SetIterationTime(time_giving_back ? giving_back.seconds() : grown);
    }
}

// Calls after_step(bytes asked so far) after each.
template <typename AfterStep>
void grow_in_steps(VirtualMemoryPool& pool, AfterStep after_step) {
    AllocateOptions growth;
    growth.open_ended = true;
    growth.grow_end = pool.capacity();
    for (Bytes held = 0; held < total; held += page) {
        growth.held = held;
        pool.allocate(held, page, growth);
        after_step(held + page);
    }
}

void open_ended(benchmark::State& state, const DriverPtr& driver) {
    for (auto _ : state) {
        VirtualMemoryPool pool(2 * total, driver, options(0));
        const std::uint64_t before = calls_of(pool.stats());
        const Timer growth;
        grow_in_steps(pool, [](Bytes) {});
        state.SetIterationTime(growth.seconds());
        report(state, pool, before);

        // The largest overshoot on the way, not the last: watched on a pool of its own, as looking takes time.
        VirtualMemoryPool watched(2 * total, driver, options(0));
        double worst = 0;
        grow_in_steps(watched, [&](Bytes asked) {
            worst =
                std::max(worst, static_cast<double>(watched.physical_memory_usage()) / static_cast<double>(asked) - 1);
        });
        state.counters["overshoot"] = worst;
    }
}

void parked(benchmark::State& state, const DriverPtr& driver) {
    for (auto _ : state) {
        VirtualMemoryPool pool(total, driver, options(total));
        pool.allocate(0, total);
        pool.deallocate(0, total);
        pool.drain();
        const std::uint64_t before = calls_of(pool.stats());
        const Timer growth;
        pool.allocate(0, total);
        state.SetIterationTime(growth.seconds());
        report(state, pool, before);
    }
}

void plain_mmap(benchmark::State& state) {
    for (auto _ : state) {
        const Timer growth;
        void* const memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        state.SetIterationTime(growth.seconds());
        if (memory == MAP_FAILED) std::abort();
        munmap(memory, total);
    }
}

// A driver that was idle for a moment answers its next calls more slowly, whichever row they fall into: so every
// repetition of every row comes right behind the same calls, untimed.
void warm_up(VmmDriver& driver) {
    Address base = 0;
    must(driver.reserve(total, 0, base));
    for (int round = 0; round < 5; ++round) {
        ExtentHandle handle;
        must(driver.create(total, handle));
        must(driver.map(base, total, handle));
        must(driver.set_access(base, total));
        must(driver.unmap(base, total));
        must(driver.release(handle));
    }
    must(driver.free_addresses(base, total));
}

template <typename Run>
void add(const std::string& device, const char* name, Run run) {
    benchmark::RegisterBenchmark((device + "/" + name).c_str(), run)
        ->UseManualTime()
        ->Iterations(1)
        ->Repetitions(repetitions)
        ->ReportAggregatesOnly()
        ->Unit(benchmark::kMicrosecond);
}

void add_all(const std::string& device, const DriverPtr& driver) {
    const auto row = [&](const char* name, auto run) {
        add(device, name, [=](benchmark::State& state) {
            warm_up(*driver);
            run(state, driver);
        });
    };
    using benchmark::State;
    row("floor", [](State& s, const DriverPtr& d) { by_handles(s, d, total, false); });
    row("page_by_page", [](State& s, const DriverPtr& d) { by_handles(s, d, page, false); });
    row("known_size", [](State& s, const DriverPtr& d) { known_size(s, d, false); });
    row("open_ended", [](State& s, const DriverPtr& d) { open_ended(s, d); });
    row("parked", [](State& s, const DriverPtr& d) { parked(s, d); });
    row("give_back/floor", [](State& s, const DriverPtr& d) { by_handles(s, d, total, true); });
    row("give_back/page_by_page", [](State& s, const DriverPtr& d) { by_handles(s, d, page, true); });
    row("give_back/known_size", [](State& s, const DriverPtr& d) { known_size(s, d, true); });
}

}  // namespace

int main(int argc, char** argv) {
    add("cpu", "plain_mmap", [](benchmark::State& s) { plain_mmap(s); });
    add_all("cpu", host_driver());
    std::string why;
    if (cuda_device_count(why) > 0) {
        add_all("cuda:0", cuda_driver(0));
        benchmark::AddCustomContext("cuda_device", cuda_driver(0)->capabilities().name);
        benchmark::AddCustomContext("cuda_driver", std::to_string(cuda_driver_version()));
    }
    // Repetitions of all rows in random order: a machine whose clocks change over seconds would else favour some rows.
    std::string interleaving = "--benchmark_enable_random_interleaving=true";
    std::vector<char*> arguments(argv, argv + argc);
    arguments.insert(arguments.begin() + 1, interleaving.data());
    arguments.push_back(nullptr);
    int count = argc + 1;
    benchmark::Initialize(&count, arguments.data());
    if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
