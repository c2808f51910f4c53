// One limit of physical bytes for several clients, and how room is made under it.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "shared/account.h"
#include "shared/ledger.h"
#include "shared/ledger_membership.h"

namespace elastikv {

// Thread safe. A mutex guards the list of accounts and is never held while one of them, or a pool, is called.
class PhysicalBudget : public std::enable_shared_from_this<PhysicalBudget> {
  public:
    explicit PhysicalBudget(Bytes limit) : ledger_(Ledger::in_private_memory(limit)) {}
    // The limit of a ledger that other processes draw on too. Errors are LedgerMembership's.
    static std::shared_ptr<PhysicalBudget> join(const std::string& name, Bytes limit, const Capabilities& device);
    ~PhysicalBudget();

    // A new client; the budget knows it while it lives. Throws InvalidArgument: the quota does not fit.
    AccountPtr open(const std::string& name, const Quota& quota = {});

    // Makes room for `wanted` bytes of `asker`, in this order, each step only as far as needed:
    //   1. its own parked memory;
    //   2. parked memory of others beyond their reserves, what has been idle longest first,
    // and, with `wait`:
    //   3. what retires, after waiting for the device's work on it;
    //   4. what IdleHolders keep, by their order, its own and that of others beyond their reserves;
    //   5. parked memory and what IdleHolders keep in other processes, those that hold most beyond their reserves
    //   first;
    //   6. pressure callbacks of others with lower priority, lowest first, and then those in other processes.
    // Where its own limit is in the way, only its own memory helps. Called with no lock held. Parked extents of this
    // process that suit `handed`, which may be null, go there. Returns the bytes freed, those included; `wanted` where
    // memory that came back since the last attempt of this `handed` may do.
    Bytes make_room(Account& asker, Bytes wanted, bool wait, std::chrono::steady_clock::time_point until,
                    HandOver* handed);
    // Gives all parked memory, and what IdleHolders keep, back. Returns the bytes freed.
    Bytes trim();
    std::string describe_holders() const;

    Bytes limit() const noexcept { return ledger_->totals().limit; }
    Bytes charged() const noexcept { return ledger_->totals().charged; }
    Bytes peak() const noexcept { return ledger_->totals().peak; }
    LedgerTotals totals() const noexcept { return ledger_->totals(); }
    const std::shared_ptr<Ledger>& ledger() const noexcept { return ledger_; }

    // Those that are alive, in the order of their opening.
    std::vector<AccountPtr> accounts() const;

  private:
    PhysicalBudget() = default;
    void serve(const LedgerRequest& request) noexcept;
    Bytes ask_others(Account& asker, Bytes wanted, std::uint32_t what, std::chrono::steady_clock::time_point until);

    const ProcessGuard process_;
    std::shared_ptr<Ledger> ledger_;
    mutable std::mutex mutex_;
    mutable std::vector<std::weak_ptr<Account>> accounts_;
    std::unique_ptr<LedgerMembership> membership_;  // null for a ledger of this process alone
};

}  // namespace elastikv
