// Many processes on one ledger, some of which are killed: is the limit ever passed, is a charge lost, does anything
// hang?
//
//   ledger_stress [--operations 10000000] [--processes 8] [--threads 4] [--kill-every-ms 50] [--seed 1] [--seconds 600]
//
// The program starts itself as workers, whose threads charge, refund, wait in line and change quotas at random. Every
// few milliseconds a random one is killed (0: none) and another started in its place. Two watchers look all the while:
// one at the ledger's own sums and entries, under its lock; one at words that each worker keeps beside the ledger,
// which count up after a charge and down before a refund, so that at any moment they sum to less than what is charged.
#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "shared/ledger_segment.h"
#include "shared/physical_budget.h"

extern char** environ;

namespace {

using namespace elastikv;
using Clock = std::chrono::steady_clock;

constexpr Bytes limit = 1 << 20;
constexpr std::size_t most_processes = 64;

// Beside the ledger, in memory that all of them map.
struct Board {
    std::atomic<std::uint64_t> operations{0};
    std::atomic<std::uint64_t> refusals{0};
    std::atomic<std::uint64_t> grants{0};
    std::atomic<std::uint64_t> faults{0};  // exceptions that a worker did not expect
    // Of each worker: bytes in the upper half, the number of changes in the lower. A reading of all of them twice with
    // the same result is what they were at one moment.
    std::array<std::atomic<std::uint64_t>, most_processes> outside{};
    std::array<std::atomic<std::uint32_t>, most_processes> counts{};  // whether its word may be relied on
};

std::uint64_t packed(Bytes bytes) { return bytes << 32; }

struct Options {
    std::map<std::string, std::uint64_t> values{{"operations", 10'000'000}, {"processes", 8}, {"threads", 4},
                                                {"kill-every-ms", 50},      {"seed", 1},      {"seconds", 600}};
    std::uint64_t operator[](const char* name) const { return values.at(name); }
};

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "ledger_stress: %s\n", what.c_str());
    std::_Exit(1);
}

Board& map_board(int fd) {
    void* const at = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("no memory to share");
    return *static_cast<Board*>(at);
}

// --- a worker --------------------------------------------------------------------------------------------------------

class Worklife {
  public:
    Worklife(Board& board, std::size_t index, AccountPtr account, std::uint64_t seed)
        : board_(board), index_(index), account_(std::move(account)), random_(seed) {}

    void live(std::uint64_t operations) {
        while (board_.operations.load(std::memory_order_relaxed) < operations) {
            for (int i = 0; i < 64; ++i) step();
            board_.operations.fetch_add(64, std::memory_order_relaxed);
        }
        while (!held_.empty()) refund();
    }

  private:
    std::uint64_t below(std::uint64_t bound) { return random_() % bound; }

    void step() {
        if (below(2000) == 0) return change_quota();
        if (held_.empty() || (held_.size() < 8 && below(2) == 0)) return charge();
        refund();
    }

    void hold(Bytes bytes) {
        board_.outside[index_].fetch_add(packed(bytes) + 1);
        held_.push_back(bytes);
    }

    void charge() {
        const Bytes bytes = 1 + below(limit / 32);
        if (account_->try_charge(bytes)) return hold(bytes);
        board_.refusals.fetch_add(1, std::memory_order_relaxed);
        if (below(8) != 0) return account_->common()->ledger()->reap();
        const WaitOptions wait{Clock::now() + std::chrono::milliseconds(below(4)), nullptr, {}};
        std::optional<Grant> grant = account_->wait_for_room(bytes, wait);
        if (!grant) return;
        board_.grants.fetch_add(1, std::memory_order_relaxed);
        if (below(4) == 0) return;  // it goes back whole
        (void)grant->take(bytes);
        hold(bytes);
    }

    void refund() {
        const std::size_t which = below(held_.size());
        const Bytes bytes = held_[which];
        held_[which] = held_.back();
        held_.pop_back();
        board_.outside[index_].fetch_add(1 - packed(bytes));
        account_->refund(bytes);
    }

    void change_quota() {
        QuotaChange change;
        change.reserve = below(limit / 16);
        change.priority = static_cast<int>(below(3));
        try {
            account_->set_quota(change);
        } catch (const InvalidArgument&) {
            // More than others leave.
        }
    }

    Board& board_;
    const std::size_t index_;
    const AccountPtr account_;
    std::mt19937_64 random_;
    std::vector<Bytes> held_;
};

int work(const std::string& name, Board& board, std::size_t index, std::uint64_t seed, const Options& options) {
    try {
        const auto budget = PhysicalBudget::join(name, limit, host_driver()->capabilities());
        const std::array<AccountPtr, 2> accounts{budget->open("one"), budget->open("two")};
        std::vector<std::thread> threads;
        for (std::uint64_t t = 0; t < options["threads"]; ++t) {
            threads.emplace_back([&, t] {
                try {
                    Worklife(board, index, accounts[t % 2], seed * 1000 + t).live(options["operations"]);
                } catch (const std::exception& error) {
                    std::fprintf(stderr, "worker: %s\n", error.what());
                    board.faults.fetch_add(1);
                }
            });
        }
        for (std::thread& thread : threads) thread.join();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "worker: %s\n", error.what());
        board.faults.fetch_add(1);
        return 1;
    }
}

// --- the one who starts, kills and watches ---------------------------------------------------------------------------

struct Watched {
    std::uint64_t ledger_looks = 0;
    std::uint64_t board_looks = 0;
    Bytes highest = 0;
    std::string wrong;
};

void watch_ledger(const Ledger& ledger, Watched& seen) {
    const LedgerTotals totals = ledger.totals();
    seen.highest = std::max(seen.highest, totals.charged);
    if (totals.charged > limit) seen.wrong += "charged " + std::to_string(totals.charged) + "; ";
    seen.wrong += ledger.check();
    ++seen.ledger_looks;
}

void watch_board(const Board& board, std::size_t processes, Watched& seen) {
    std::array<std::array<std::uint64_t, most_processes>, 2> read{};
    for (auto& each : read) {
        for (std::size_t i = 0; i < processes; ++i) each[i] = board.counts[i] != 0 ? board.outside[i].load() : 0;
    }
    if (read[0] != read[1]) return;
    Bytes sum = 0;
    for (const std::uint64_t word : read[0]) sum += word >> 32;
    if (sum > limit) seen.wrong += "the workers hold " + std::to_string(sum) + "; ";
    ++seen.board_looks;
}

class Workers {
  public:
    Workers(std::string name, int fd, Board& board, const Options& options)
        : name_(std::move(name)), fd_(fd), board_(board), options_(options), pids_(options["processes"], 0) {
        for (std::size_t i = 0; i < pids_.size(); ++i) start(i);
    }

    void start(std::size_t index) {
        board_.outside[index] = 0;
        board_.counts[index] = 1;
        std::vector<std::string> words{"ledger_stress",
                                       "--worker",
                                       name_,
                                       std::to_string(fd_),
                                       std::to_string(index),
                                       std::to_string(options_["seed"] + ++started_)};
        for (const auto& [key, value] : options_.values) {
            words.push_back("--" + key);
            words.push_back(std::to_string(value));
        }
        std::vector<char*> arguments;
        for (std::string& word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        if (posix_spawn(&pids_[index], "/proc/self/exe", nullptr, nullptr, arguments.data(), environ) != 0) {
            die("no process to start");
        }
    }

    void kill_one(std::size_t index) {
        board_.counts[index] = 0;  // its word will not be taken back
        kill(pids_[index], SIGKILL);
        waitpid(pids_[index], nullptr, 0);
        ++killed_;
        start(index);
    }

    // Whether all have ended; those that failed are counted.
    bool ended() {
        bool all = true;
        for (pid_t& pid : pids_) {
            if (pid == 0) continue;
            int status = 0;
            if (waitpid(pid, &status, WNOHANG) == pid) {
                pid = 0;
                failed_ += status == 0 ? 0 : 1;
            }
            all = all && pid == 0;
        }
        return all;
    }

    void kill_all() {
        for (const pid_t pid : pids_) {
            if (pid != 0) kill(pid, SIGKILL);
        }
    }
    std::uint64_t killed() const { return killed_; }
    std::uint64_t failed() const { return failed_; }

  private:
    const std::string name_;
    const int fd_;
    Board& board_;
    const Options& options_;
    std::vector<pid_t> pids_;
    std::uint64_t started_ = 0;
    std::uint64_t killed_ = 0;
    std::uint64_t failed_ = 0;
};

int run(const Options& options) {
    const std::string name = "stress-" + std::to_string(getpid());
    const int fd = memfd_create("ledger_stress", 0);  // workers inherit it
    if (fd < 0 || ftruncate(fd, sizeof(Board)) != 0) die("no memory to share");
    Board& board = *new (&map_board(fd)) Board;
    // Joined first and left last, so that the segment is there throughout.
    auto budget = PhysicalBudget::join(name, limit, host_driver()->capabilities());
    const std::shared_ptr<Ledger> ledger = budget->ledger();
    Watched seen;
    std::mt19937_64 random(options["seed"]);
    const auto begin = Clock::now();
    Workers workers(name, fd, board, options);
    std::atomic<bool> watching{true};
    std::thread watcher([&] {
        while (watching && seen.wrong.empty()) {
            for (int i = 0; i < 20; ++i) watch_board(board, options["processes"], seen);
            watch_ledger(*ledger, seen);
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });
    bool hangs = false;
    auto next_kill = begin + std::chrono::milliseconds(options["kill-every-ms"]);
    double seconds = 0;
    while (!workers.ended()) {
        const auto now = Clock::now();
        seconds = std::chrono::duration<double>(now - begin).count();
        if (seconds > static_cast<double>(options["seconds"])) {
            hangs = true;
            workers.kill_all();
            break;
        }
        const bool working = board.operations < options["operations"];
        if (working && options["kill-every-ms"] > 0 && now >= next_kill) {
            next_kill = now + std::chrono::milliseconds(options["kill-every-ms"]);
            workers.kill_one(random() % options["processes"]);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    watching = false;
    watcher.join();
    ledger->reap();
    const LedgerTotals end = ledger->totals();
    const std::string wrong = seen.wrong + ledger->check();
    const std::uint32_t members = ledger->members();
    budget.reset();
    bool left = false;
    for (const std::string& each : LedgerSegment::names()) left = left || each == name;
    std::printf(
        "%llu operations of %llu processes x %llu threads in %.1f s, %llu killed; %llu refused, %llu granted\n",
        static_cast<unsigned long long>(board.operations.load()), static_cast<unsigned long long>(options["processes"]),
        static_cast<unsigned long long>(options["threads"]), seconds, static_cast<unsigned long long>(workers.killed()),
        static_cast<unsigned long long>(board.refusals.load()), static_cast<unsigned long long>(board.grants.load()));
    std::printf("highest charge seen %llu of %llu, in %llu looks at the ledger and %llu beside it\n",
                static_cast<unsigned long long>(seen.highest), static_cast<unsigned long long>(limit),
                static_cast<unsigned long long>(seen.ledger_looks), static_cast<unsigned long long>(seen.board_looks));
    const bool zero = end.charged == 0 && end.committed == 0 && end.waiters == 0 && members == 1;
    std::printf("at the end: charged %llu, committed %llu, %u waiters, %u processes, segment %s\n",
                static_cast<unsigned long long>(end.charged), static_cast<unsigned long long>(end.committed),
                end.waiters, members, left ? "left" : "removed");
    const bool fine = wrong.empty() && zero && !hangs && !left && board.faults == 0 && workers.failed() == 0 &&
                      end.peak <= limit && seen.board_looks > 0;
    if (!fine) {
        std::printf("FAILED: %s%s %llu faults, %llu workers failed, peak %llu\n", wrong.c_str(), hangs ? "it hung" : "",
                    static_cast<unsigned long long>(board.faults.load()),
                    static_cast<unsigned long long>(workers.failed()), static_cast<unsigned long long>(end.peak));
    }
    return fine ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
    Options options;
    int at = 1;
    std::vector<std::string> worker;
    if (at < count && std::strcmp(words[at], "--worker") == 0) {
        if (count < 6) die("--worker is for the program itself");
        worker.assign(words + 2, words + 6);
        at = 6;
    }
    for (; at + 1 < count; at += 2) {
        const std::string key = std::string(words[at]).substr(0, 2) == "--" ? std::string(words[at]).substr(2) : "";
        if (options.values.count(key) == 0) die(std::string("unknown option ") + words[at]);
        options.values[key] = std::strtoull(words[at + 1], nullptr, 10);
    }
    if (at != count || options["processes"] == 0 || options["processes"] > 60 || options["threads"] == 0) {
        die("options are --operations, --processes (1 to 60), --threads, --kill-every-ms, --seed and --seconds, each "
            "with a "
            "number");
    }
    if (worker.empty()) return run(options);
    Board& board = map_board(std::atoi(worker[1].c_str()));
    return work(worker[0], board, static_cast<std::size_t>(std::atoi(worker[2].c_str())),
                std::strtoull(worker[3].c_str(), nullptr, 10), options);
}
