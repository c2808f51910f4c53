// A charge and its release under one limit: what it costs, alone and with others.
//
//   private/alone       a ledger of this process
//   shared/alone        a ledger in shared memory
//   shared/threads:N    N threads of this process on it, each with a client of its own
//   shared/processes/N  this process, and N - 1 others that do nothing else
//   file/alone, file/threads:N    kvcached's way of keeping account: at each update open the file, lock it, map it,
//                       change a number, unmap and unlock it
//
// time is of a charge and its release, wall clock; Google Benchmark divides it by the number of threads.
// benchmarks/ledger_report.py prints the ratios.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "shared/physical_budget.h"

namespace {

using namespace elastikv;

constexpr Bytes limit = Bytes{64} << 30;
constexpr Bytes page = 2 * MiB;

std::string name_here() { return "bench-" + std::to_string(getpid()); }

void charge_and_refund(benchmark::State& state, Account& account) {
    for (auto _ : state) {
        if (!account.try_charge(page)) state.SkipWithError("the charge did not fit");
        account.refund(page);
    }
}

void in_private_memory(benchmark::State& state) {
    const auto budget = std::make_shared<PhysicalBudget>(limit);
    charge_and_refund(state, *budget->open("bench"));
}

void in_shared_memory(benchmark::State& state) {
    static std::shared_ptr<PhysicalBudget> budget;
    if (state.thread_index() == 0) budget = PhysicalBudget::join(name_here(), limit, host_driver()->capabilities());
    AccountPtr account;
    for (auto _ : state) {  // the threads start together here
        if (!account) account = budget->open("bench");
        if (!account->try_charge(page)) state.SkipWithError("the charge did not fit");
        account->refund(page);
    }
    account.reset();
    if (state.thread_index() == 0) budget.reset();
}

void among_processes(benchmark::State& state) {
    const std::string name = name_here();
    const pid_t parent = getpid();
    std::vector<pid_t> others;
    for (int i = 1; i < state.range(0); ++i) {
        const pid_t child = fork();
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent) _exit(1);
            const auto budget = PhysicalBudget::join(name, limit, host_driver()->capabilities());
            const AccountPtr account = budget->open("other");
            for (;;) {
                if (account->try_charge(page)) account->refund(page);
            }
        }
        others.push_back(child);
    }
    {
        const auto budget = PhysicalBudget::join(name, limit, host_driver()->capabilities());
        while (budget->ledger()->members() < static_cast<std::uint32_t>(state.range(0))) usleep(1000);
        charge_and_refund(state, *budget->open("bench"));
        for (const pid_t child : others) {
            kill(child, SIGKILL);
            waitpid(child, nullptr, 0);
        }
    }
}

// What others do: the file is the only truth, so each update begins and ends with it.
void update_file(const char* path, std::int64_t by) {
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0 || flock(fd, LOCK_EX) != 0) std::abort();
    void* const at = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) std::abort();
    auto* const used = static_cast<std::int64_t*>(at);
    benchmark::DoNotOptimize(*used += by);
    munmap(at, 4096);
    flock(fd, LOCK_UN);
    close(fd);
}

void in_a_file(benchmark::State& state) {
    static std::string path;
    if (state.thread_index() == 0) {
        path = "/dev/shm/" + name_here();
        const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || ftruncate(fd, 4096) != 0) std::abort();
        close(fd);
    }
    for (auto _ : state) {
        update_file(path.c_str(), static_cast<std::int64_t>(page));
        update_file(path.c_str(), -static_cast<std::int64_t>(page));
    }
    if (state.thread_index() == 0) unlink(path.c_str());
}

BENCHMARK(in_private_memory)->Name("private/alone")->UseRealTime();
// Before any thread is made, so that a fork is of a process with one.
BENCHMARK(among_processes)->Name("shared/processes")->Arg(2)->Arg(8)->UseRealTime();
BENCHMARK(in_shared_memory)->Name("shared/alone")->UseRealTime();
BENCHMARK(in_a_file)->Name("file/alone")->UseRealTime();
BENCHMARK(in_shared_memory)->Name("shared")->Threads(2)->Threads(8)->UseRealTime();
BENCHMARK(in_a_file)->Name("file")->Threads(2)->Threads(8)->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
