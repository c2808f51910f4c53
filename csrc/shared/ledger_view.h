// A ledger as seen from outside: what `elastikv top` shows and `elastikv limit` changes.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "driver/vmm_driver.h"
#include "shared/ledger.h"

namespace elastikv {

struct LedgerStats {
    Bytes physical_limit = 0;
    Bytes charged = 0;
    Bytes committed = 0;  // sum of max(charged, reserve)
    Bytes reserved = 0;
    Bytes peak = 0;               // of `charged`
    std::uint32_t processes = 0;  // that take part, or pools in them
    std::uint32_t waiters = 0;
};

struct LedgerClientStats {
    std::string model;
    std::uint32_t pid = 0;
    std::uint64_t started = 0;  // of the process, in clock ticks since boot
    QuotaStats quota;
    // As its process told them `age` seconds ago; infinite for never.
    Bytes live = 0;
    Bytes used = 0;
    Bytes parked = 0;
    Bytes retiring = 0;
    Bytes stranded = 0;
    Bytes spilled = 0;  // these three: see MemoryStats
    Bytes paused = 0;
    Bytes backup = 0;
    std::uint64_t driver_calls = 0;
    double age = 0;
};

// Takes no part: charges nothing and keeps no process's ledger from being removed. Every call takes back what dead
// processes held. Thread safe.
class LedgerView {
  public:
    // Throws LedgerError where there is none of that name, or it can't be used; InvalidArgument for a bad name.
    explicit LedgerView(const std::string& name);

    // Of this user's ledgers that any process takes part in, sorted. Removes what killed processes have left.
    static std::vector<std::string> names();

    const std::string& name() const { return name_; }
    // "cpu" or "cuda:N", as the process that made it counts devices.
    std::string device() const;
    LedgerStats stats() const;
    // With `refresh` the processes are asked for fresh statistics, and waited for, a tenth of a second at most.
    std::vector<LedgerClientStats> clients(bool refresh) const;

    // Of the model of that name; `pid` where several processes have one. All of it or nothing. Throws ModelNotFound,
    // InvalidArgument.
    void set_quota(const std::string& model, std::optional<std::uint32_t> pid, const QuotaChange& change) const;
    void set_limit(Bytes limit) const;
    // Asks the process of that model, or all of them, for all that is parked; waits a second at most. Returns by how
    // much their charges fell.
    Bytes trim(const std::optional<std::string>& model, std::optional<std::uint32_t> pid) const;

    // Orders that model to sleep, or to wake, and waits until it has, `at_most` nanoseconds, or until `interrupted`,
    // which is asked ten times a second. Throws ModelNotFound, InvalidArgument (its program takes no orders),
    // WaitCancelled, and LedgerError: it was refused, its process has ended, or it takes longer, and goes on.
    void order(const std::string& model, std::optional<std::uint32_t> pid, LedgerOrderKind kind, std::uint64_t at_most,
               const std::function<bool()>& interrupted) const;

  private:
    struct Found {
        Ledger::ClientId id;
        std::uint32_t member;
        std::string name;
        std::uint32_t pid;
        std::uint64_t started;
    };
    std::vector<Found> all() const;
    Found find(const std::string& model, std::optional<std::uint32_t> pid) const;
    // Returns by how much the charges of those asked fell.
    Bytes ask(std::vector<std::uint32_t> members, std::uint32_t what, std::uint64_t at_most) const;

    const std::string name_;
    const std::shared_ptr<LedgerTable> table_;
    const std::shared_ptr<Ledger> ledger_;
};

}  // namespace elastikv
