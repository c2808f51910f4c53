// What idle memory costs on its way to another owner, call by call, for the same bytes in handles of several sizes:
//
//   unmap, unmap_once        each handle by itself; all of them by one call
//   map                      each handle elsewhere
//   access, access_once      likewise
//   release, release_by_4    by one thread, by four
//   create                   as one handle of all bytes, once everything is released
//   create_beside            the same bytes as many handles, while another thread releases as many
//   export, import           each handle to a file descriptor, and from it
//   release_imported         the exporter's handles, while the importer keeps the memory
//
// So a hand-over within a process is unmap + map + access; through the device it is unmap + release + create + access;
// to another process by descriptors unmap + export + import + map + access + release_imported. The time of a row is the
// first of these. Counters are milliseconds of all handles. The memory was written before, 8 GiB on CUDA and 256 MiB on
// the host.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "driver/vmm_driver.h"
#include "support.h"

namespace {

using namespace elastikv;

template <typename Body>
double milliseconds(Body body) {
    const auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

// As many handles as `total` has units, and two ranges for them.
class Handles {
  public:
    Handles(VmmDriver& driver, Bytes total, Bytes unit) : driver_(driver), total_(total), unit_(unit) {
        must(driver_.reserve(total_, 0, first_));
        must(driver_.reserve(total_, 0, second_));
    }
    ~Handles() {
        must(driver_.free_addresses(first_, total_));
        must(driver_.free_addresses(second_, total_));
    }
    Handles(const Handles&) = delete;
    Handles& operator=(const Handles&) = delete;

    void create() {
        handles_.resize(total_ / unit_);
        for (ExtentHandle& each : handles_) must(driver_.create(unit_, each));
    }
    void map(Address base) const {
        each([&](Bytes offset, ExtentHandle handle) { must(driver_.map(base + offset, unit_, handle)); });
    }
    void allow_each(Address base) const {
        each([&](Bytes offset, ExtentHandle) { must(driver_.set_access(base + offset, unit_)); });
    }
    void allow_once(Address base) const { must(driver_.set_access(base, total_)); }
    void unmap_each(Address base) const {
        each([&](Bytes offset, ExtentHandle) { must(driver_.unmap(base + offset, unit_)); });
    }
    void unmap_once(Address base) const { must(driver_.unmap(base, total_)); }
    void write(Address base) const {
        must(driver_.zero(base, total_));
        must(driver_.synchronize());
    }
    void release(std::size_t threads) const {
        std::vector<std::thread> others;
        const auto share = [this, threads](std::size_t of) {
            for (std::size_t i = of; i < handles_.size(); i += threads) must(driver_.release(handles_[i]));
        };
        for (std::size_t of = 1; of < threads; ++of) others.emplace_back(share, of);
        share(0);
        for (std::thread& other : others) other.join();
    }
    std::vector<UniqueFd> exported() const {
        std::vector<UniqueFd> fds;
        each([&](Bytes, ExtentHandle handle) {
            int fd = -1;
            must(driver_.export_fd(handle, fd));
            fds.emplace_back(fd);
        });
        return fds;
    }
    void import(const std::vector<UniqueFd>& fds) {
        handles_.resize(fds.size());
        for (std::size_t i = 0; i < fds.size(); ++i) must(driver_.import_fd(fds[i].get(), unit_, handles_[i]));
    }
    Address first() const { return first_; }
    Address second() const { return second_; }

  private:
    template <typename Body>
    void each(Body body) const {
        for (std::size_t i = 0; i < handles_.size(); ++i) body(i * unit_, handles_[i]);
    }

    VmmDriver& driver_;
    const Bytes total_;
    const Bytes unit_;
    Address first_ = 0;
    Address second_ = 0;
    std::vector<ExtentHandle> handles_;
};

void hand_over(benchmark::State& state, const DriverPtr& driver) {
    const Bytes total = driver->capabilities().kind == DeviceKind::cuda ? 8 * GiB : 256 * MiB;
    const Bytes unit = state.range(0) == 0 ? total : static_cast<Bytes>(state.range(0)) * MiB;
    Handles mine(*driver, total, unit);
    Handles whole(*driver, total, total);
    Handles others(*driver, total / 2, std::min(unit, total / 2));
    Handles half(*driver, total / 2, std::min(unit, total / 2));
    std::map<std::string, double> sums;
    const auto timed = [&](const char* name, auto body) { sums[name] += milliseconds(body); };
    for (auto _ : state) {
        mine.create();
        mine.map(mine.first());
        mine.allow_each(mine.first());
        mine.write(mine.first());
        const double before = sums["unmap"] + sums["map"] + sums["access"];
        timed("unmap", [&] { mine.unmap_each(mine.first()); });
        timed("map", [&] { mine.map(mine.second()); });
        timed("access", [&] { mine.allow_each(mine.second()); });
        state.SetIterationTime((sums["unmap"] + sums["map"] + sums["access"] - before) / 1e3);
        timed("unmap_once", [&] { mine.unmap_once(mine.second()); });
        mine.map(mine.first());
        timed("access_once", [&] { mine.allow_once(mine.first()); });
        mine.unmap_once(mine.first());
        timed("release", [&] { mine.release(1); });
        timed("create", [&] { whole.create(); });
        whole.release(1);

        mine.create();
        mine.map(mine.first());
        mine.allow_once(mine.first());
        mine.write(mine.first());
        mine.unmap_once(mine.first());
        timed("release_by_4", [&] { mine.release(4); });

        half.create();
        half.map(half.first());
        half.allow_once(half.first());
        half.write(half.first());
        half.unmap_once(half.first());
        timed("create_beside", [&] {
            std::thread releasing([&] { half.release(1); });
            others.create();
            releasing.join();
        });
        others.release(1);

        if (!driver->capabilities().fd_export) continue;
        mine.create();
        mine.map(mine.first());
        mine.allow_once(mine.first());
        mine.write(mine.first());
        mine.unmap_once(mine.first());
        std::vector<UniqueFd> fds;
        Handles theirs(*driver, total, unit);
        timed("export", [&] { fds = mine.exported(); });
        timed("import", [&] { theirs.import(fds); });
        timed("release_imported", [&] {
            fds.clear();
            mine.release(1);
        });
        theirs.release(1);
    }
    for (const auto& [name, sum] : sums) {
        state.counters[name] = benchmark::Counter(sum, benchmark::Counter::kAvgIterations);
    }
}

void add_all(const std::string& device, const DriverPtr& driver) {
    benchmark::RegisterBenchmark((device + "/hand_over").c_str(), hand_over, driver)
        ->ArgName("MiB")
        ->Arg(2)
        ->Arg(8)
        ->Arg(16)
        ->Arg(32)
        ->Arg(128)
        ->Arg(0)  // all in one
        ->Iterations(5)
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
    for_each_driver(add_all);
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
}
