// PhysicalBudget: how room is made.
#include <algorithm>
#include <set>

#include "pool/hand_over.h"
#include "shared/physical_budget.h"

namespace elastikv {
namespace {

using Accounts = std::vector<AccountPtr>;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds answer_time{100};

std::uint64_t nanoseconds_of(Clock::time_point time) {
    return static_cast<std::uint64_t>(std::chrono::nanoseconds(time.time_since_epoch()).count());
}

// One request for room: what still lacks, and the steps.
class Ladder {
  public:
    Ladder(Ledger& ledger, const Account& asker, Bytes wanted, HandOver* handed)
        : ledger_(ledger), asker_(&asker), wanted_(wanted), handed_(handed) {
        const Shortage shortage = ledger_.shortage(asker_->id(), uncharged());
        by_count_ = shortage.own == 0 && shortage.common == 0;
    }
    // For another process, of whose charge nothing is known here.
    Ladder(Ledger& ledger, Bytes wanted) : ledger_(ledger), wanted_(wanted), by_count_(true) {}

    bool has_room() const { return by_count_; }
    // Where the ledger has room it is the device that lacks it, or a caller wants memory back whatever the ledger says:
    // then what was freed counts.
    Bytes lacking() const {
        if (by_count_) return freed_ < wanted_ ? wanted_ - freed_ : 0;
        const Shortage shortage = ledger_.shortage(asker_->id(), uncharged());
        return std::max(shortage.own, shortage.common);
    }
    bool only_own_helps() const { return !by_count_ && ledger_.shortage(asker_->id(), uncharged()).own > 0; }
    // What was handed over is charged to the asker already.
    Bytes uncharged() const {
        const Bytes charged = handed_ == nullptr ? 0 : handed_->total();
        return wanted_ > charged ? wanted_ - charged : 0;
    }
    Bytes freed() const { return freed_; }
    void count(Bytes freed) { freed_ += freed; }

    void take_parked(Account& of, bool wait) {
        const Bytes most = share(of);
        if (most > 0) freed_ += of.reclaim(most, wait, any_time, handed_);
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
            const Bytes got = most > 0 ? oldest->reclaim(most, false, next, handed_) : 0;
            freed_ += got;
            if (got == 0) exhausted.insert(oldest);  // at its reserve, or its driver refuses
        }
    }

    // What they let go is waited for, or they would be asked again for what is on its way.
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
            // It may give a piece at a time.
            while (const Bytes most = share(*each.account)) {
                const Bytes freed = let_go(*each.holder, *each.account, most);
                if (freed == 0) break;
                freed_ += freed;
            }
        }
    }

    // Whoever has a priority below `priority` is asked to give up what is in use.
    void press(Accounts accounts, int priority, Clock::time_point until) {
        std::stable_sort(accounts.begin(), accounts.end(),
                         [](const AccountPtr& a, const AccountPtr& b) { return a->priority() < b->priority(); });
        for (const AccountPtr& each : accounts) {
            const Bytes most = share(*each);
            if (each->priority() >= priority || most == 0) continue;
            const Bytes before = each->excess();
            each->press({most, until});
            const Bytes after = each->excess();
            freed_ += before > after ? before - after : 0;
            take_parked(*each, true);
        }
    }

  private:
    Bytes let_go(IdleHolder& holder, Account& of, Bytes most) {
        const Bytes before = of.quota().charged;
        const Bytes released = holder.release_idle(most);
        if (released == 0) return 0;
        // It may be parked now, or, in a pool that parks little, be gone already.
        const Bytes reclaimed = of.reclaim(released, true, any_time, handed_);
        const Bytes after = of.quota().charged;
        return std::max(reclaimed, before > after ? before - after : 0);
    }
    // What may be taken of an account now.
    Bytes share(const Account& of) const {
        const Bytes needed = lacking();
        return &of == asker_ ? needed : std::min(needed, of.excess());
    }

    Ledger& ledger_;
    const Account* const asker_ = nullptr;
    const Bytes wanted_;
    HandOver* const handed_ = nullptr;
    bool by_count_;
    Bytes freed_ = 0;
};

// Set while this thread serves another process, which asks nobody in turn.
thread_local bool serving = false;

}  // namespace

Bytes PhysicalBudget::make_room(Account& asker, Bytes wanted, bool wait, Clock::time_point until, HandOver* handed) {
    if (membership_) ledger_->reap();
    Ladder ladder(*ledger_, asker, wanted, handed);
    // What came back since the attempt is worth another one before anybody is asked for anything.
    if (handed != nullptr && handed->note_room(ladder.has_room())) return wanted;
    const Accounts all = accounts();
    Accounts own;
    Accounts others;
    for (const AccountPtr& each : all) (each.get() == &asker ? own : others).push_back(each);

    ladder.take_parked(asker, false);
    const bool alone = ladder.only_own_helps();
    if (!alone && ladder.lacking() > 0) ladder.take_oldest_parked(others);
    if (!wait) return ladder.freed();

    // What is on its way comes before anything is given up for it.
    ladder.take_parked(asker, true);
    if (!alone) {
        for (const AccountPtr& each : others) ladder.take_parked(*each, true);
    }
    if (ladder.lacking() > 0) ladder.take_idle(alone ? own : all);
    if (alone) return ladder.freed();
    if (ladder.lacking() > 0) ladder.count(ask_others(asker, ladder.uncharged(), ask_idle, until));
    if (ladder.lacking() > 0) ladder.press(others, asker.priority(), until);
    if (ladder.lacking() > 0) ladder.count(ask_others(asker, ladder.uncharged(), ask_all, until));
    return ladder.freed();
}

// Process by process, so that none gives up what is not needed. One that does not answer, being stopped or busy, holds
// up the others for a moment only. Returns what they gave up.
Bytes PhysicalBudget::ask_others(Account& asker, Bytes wanted, std::uint32_t what, Clock::time_point until) {
    if (!membership_ || serving) return 0;
    Bytes freed = 0;
    for (const Ledger::Pressable& other : ledger_->others_with_excess(membership_->index(), std::nullopt)) {
        const Shortage shortage = ledger_->shortage(asker.id(), wanted);
        if (shortage.own > 0 || shortage.common == 0) break;
        const Bytes before = ledger_->charged_of(other.member);
        const LedgerRequest request{what, std::min(shortage.common, other.excess), asker.priority(),
                                    nanoseconds_of(until), 0};
        const std::uint32_t number = ledger_->ask(other.member, request);
        (void)ledger_->await_answer(other.member, number, nanoseconds_of(Clock::now() + answer_time));
        const Bytes after = ledger_->charged_of(other.member);
        freed += before > after ? before - after : 0;
    }
    return freed;
}

// On the listener's thread. The accounts are declared first, so that they go last: with them this object may go.
void PhysicalBudget::serve(const LedgerRequest& request) noexcept {
    Accounts all;
    try {
        all = accounts();
        serving = true;
        // First, as what follows may take long, and fail where an IdleHolder does.
        if ((request.what & ask_orders) != 0) {
            for (const AccountPtr& each : all) each->take_order();
        }
        for (const AccountPtr& each : all) {
            if (const Bytes over = each->quota().overage; over > 0) each->reclaim(over, false);
        }
        if ((request.what & ask_trim) != 0) (void)trim();
        if ((request.what & (ask_idle | ask_all)) != 0) {
            Ladder ladder(*ledger_, request.wanted);
            ladder.take_oldest_parked(all);
            if (ladder.lacking() > 0) ladder.take_idle(all);
            if ((request.what & ask_all) != 0) {
                for (const AccountPtr& each : all) ladder.take_parked(*each, true);
                const Clock::time_point until{std::chrono::nanoseconds(request.until)};
                if (ladder.lacking() > 0) ladder.press(all, request.priority, until);
            }
        }
        if ((request.what & ask_stats) != 0) {
            for (const AccountPtr& each : all) each->tell();
        }
    } catch (const std::exception&) {
        // Out of memory, or a pool that was closed meanwhile: what was done so far counts.
    }
    serving = false;
}

}  // namespace elastikv
