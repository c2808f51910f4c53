// PhysicalBudget: how room is made.
#include <algorithm>
#include <set>

#include "shared/physical_budget.h"

namespace elastikv {
namespace {

using Accounts = std::vector<AccountPtr>;

// One request for room: what still lacks, and the steps.
class Ladder {
  public:
    Ladder(Ledger& ledger, Account& asker, Bytes wanted) : ledger_(ledger), asker_(asker), wanted_(wanted) {
        const Shortage shortage = ledger_.shortage(asker_.id(), wanted_);
        fits_ = shortage.own == 0 && shortage.common == 0;
    }

    // Where the ledger has room it is the device that lacks it, or a caller wants memory back whatever the ledger says:
    // then what was freed counts.
    Bytes lacking() const {
        if (fits_) return freed_ < wanted_ ? wanted_ - freed_ : 0;
        const Shortage shortage = ledger_.shortage(asker_.id(), wanted_);
        return std::max(shortage.own, shortage.common);
    }
    bool only_own_helps() const { return !fits_ && ledger_.shortage(asker_.id(), wanted_).own > 0; }
    Bytes freed() const { return freed_; }

    void take_parked(Account& of, bool wait) {
        const Bytes most = share(of);
        if (most > 0) freed_ += of.reclaim(most, wait);
    }

    // Pool by pool in turn, each as far as it is the one with the oldest.
    void take_oldest_parked(const Accounts& others) {
        std::set<const Account*> exhausted;
        for (;;) {
            Account* oldest = nullptr;
            IdleTime since = any_time;
            IdleTime next = any_time;
            for (const AccountPtr& each : others) {
                if (exhausted.count(each.get()) > 0) continue;
                const auto idle = each->oldest_parked();
                if (!idle) continue;
                if (*idle < since) {
                    next = since;
                    since = *idle;
                    oldest = each.get();
                } else {
                    next = std::min(next, *idle);
                }
            }
            const Bytes most = oldest != nullptr ? share(*oldest) : 0;
            if (oldest == nullptr || lacking() == 0) return;
            const Bytes got = most > 0 ? oldest->reclaim(most, false, next) : 0;
            freed_ += got;
            if (got == 0) exhausted.insert(oldest);  // at its reserve, or its driver refuses
        }
    }

    void take_idle(const Accounts& accounts) {
        struct Held {
            std::shared_ptr<IdleHolder> holder;
            Account* account;
        };
        std::vector<Held> all;
        for (const AccountPtr& account : accounts) {
            for (auto& holder : account->idle_holders()) all.push_back({std::move(holder), account.get()});
        }
        std::stable_sort(all.begin(), all.end(),
                         [](const Held& a, const Held& b) { return a.holder->idle_order() < b.holder->idle_order(); });
        for (const Held& each : all) {
            const Bytes most = share(*each.account);
            if (most == 0) continue;
            const Bytes released = each.holder->release_idle(most);
            if (released > 0) freed_ += each.account->reclaim(released, false);
        }
    }

  private:
    // What may be taken of an account now.
    Bytes share(const Account& of) const {
        const Bytes needed = lacking();
        return &of == &asker_ ? needed : std::min(needed, of.excess());
    }

    Ledger& ledger_;
    Account& asker_;
    const Bytes wanted_;
    bool fits_;
    Bytes freed_ = 0;
};

}  // namespace

Bytes PhysicalBudget::make_room(Account& asker, Bytes wanted, bool wait, std::chrono::steady_clock::time_point until) {
    Ladder ladder(*ledger_, asker, wanted);
    const Accounts all = accounts();
    Accounts own;
    Accounts others;
    for (const AccountPtr& each : all) (each.get() == &asker ? own : others).push_back(each);

    ladder.take_parked(asker, false);
    if (ladder.only_own_helps()) {
        ladder.take_idle(own);
        if (wait) ladder.take_parked(asker, true);
        return ladder.freed();
    }
    if (ladder.lacking() > 0) ladder.take_oldest_parked(others);
    if (ladder.lacking() > 0) ladder.take_idle(all);
    if (!wait) return ladder.freed();

    ladder.take_parked(asker, true);
    for (const AccountPtr& each : others) ladder.take_parked(*each, true);
    std::stable_sort(others.begin(), others.end(),
                     [](const AccountPtr& a, const AccountPtr& b) { return a->priority() < b->priority(); });
    for (const AccountPtr& each : others) {
        const Bytes lacking = ladder.lacking();
        if (lacking == 0) break;
        if (each->priority() >= asker.priority() || each->excess() == 0) continue;
        each->press({std::min(lacking, each->excess()), until});
        ladder.take_parked(*each, true);
    }
    return ladder.freed();
}

}  // namespace elastikv
