#include "shared/physical_budget.h"

#include <algorithm>
#include <utility>

namespace elastikv {

std::shared_ptr<PhysicalBudget> PhysicalBudget::join(const std::string& name, Bytes limit, const Capabilities& device) {
    const std::shared_ptr<PhysicalBudget> made(new PhysicalBudget);
    // Not a weak pointer: the membership ends, and its thread with it, before anything else of this does.
    made->membership_ = std::make_unique<LedgerMembership>(
        name, limit, device, [self = made.get()](const LedgerRequest& request) { self->serve(request); });
    made->ledger_ = made->membership_->ledger();
    return made;
}

PhysicalBudget::~PhysicalBudget() {
    if (!membership_) return;
    // Extents that the driver never took back stay charged, and so the process's entry stays, until the process ends.
    if (!process_.forked() && ledger_->charged_of(membership_->index()) > 0) (void)membership_.release();
    membership_.reset();
}

AccountPtr PhysicalBudget::open(const std::string& name, const Quota& quota) {
    const Ledger::ClientId id = ledger_->open_client(name, quota, membership_ ? membership_->index() : 0);
    AccountPtr account;
    try {
        account = std::make_shared<Account>(shared_from_this(), id, name);
    } catch (...) {
        ledger_->close_client(id);
        throw;
    }
    const std::lock_guard lock(mutex_);
    accounts_.push_back(account);
    return account;
}

std::vector<AccountPtr> PhysicalBudget::accounts() const {
    std::vector<AccountPtr> alive;
    const std::lock_guard lock(mutex_);
    std::erase_if(accounts_, [](const auto& each) { return each.expired(); });
    for (const auto& each : accounts_) {
        if (auto account = each.lock()) alive.push_back(std::move(account));
    }
    return alive;
}

Bytes PhysicalBudget::trim() {
    Bytes freed = 0;
    for (const AccountPtr& account : accounts()) {
        freed += account->reclaim(~Bytes{0}, false);
        Bytes released = 0;
        for (const auto& holder : account->idle_holders()) released += holder->release_idle(~Bytes{0});
        if (released > 0) freed += account->reclaim(~Bytes{0}, false);
    }
    return freed;
}

std::string PhysicalBudget::describe_holders() const {
    const LedgerTotals totals = ledger_->totals();
    std::string text = format_bytes(totals.charged) + " of the limit of " + format_bytes(totals.limit) + " are held";
    const char* before = ": ";
    for (const AccountPtr& account : accounts()) {
        const auto pool = account->pool();
        const QuotaStats quota = account->quota();
        text += before + ("'" + account->name() + "' " + format_bytes(quota.charged));
        before = "; ";
        if (pool) {
            const MemoryStats stats = pool->stats();
            text += " (used " + format_bytes(stats.used) + ", retiring " + format_bytes(stats.retiring) + ", parked " +
                    format_bytes(stats.parked) + ", stranded " + format_bytes(stats.stranded) + ")";
        }
        if (quota.reserve > 0) text += ", of a reserve of " + format_bytes(quota.reserve);
        if (quota.limit < totals.limit) text += ", with a limit of " + format_bytes(quota.limit);
    }
    if (membership_) {
        for (const Ledger::Pressable& other : ledger_->others_with_excess(membership_->index(), std::nullopt)) {
            text += before + ledger_->describe_member(other.member);
            before = "; ";
        }
    }
    if (totals.waiters > 0) {
        return text + "; " + std::to_string(totals.waiters) +
               " wait for memory, and have it first. With a timeout, this request waits in line, too";
    }
    return text + ". Free or shrink tensors, compact() what is stranded, or raise the limit that is in the way";
}

}  // namespace elastikv
