#include "shared/account.h"

#include <algorithm>
#include <utility>

#include "shared/physical_budget.h"

namespace elastikv {
namespace {

using Clock = std::chrono::steady_clock;

// A grant wakes the waiter. What wakes nobody is memory that falls idle without going back, and the death of another
// process: it looks for these ten times a second.
constexpr std::chrono::milliseconds look_again{100};

thread_local bool in_callback = false;

}  // namespace

Account::Account(std::shared_ptr<PhysicalBudget> common, Ledger::ClientId id, std::string name)
    : common_(std::move(common)), ledger_(common_->ledger()), id_(id), name_(std::move(name)) {}

Account::~Account() {
    if (!process_.forked()) ledger_->close_client(id_);
}

bool Account::try_charge(Bytes bytes) noexcept { return ledger_->try_charge(id_, bytes); }
void Account::refund(Bytes bytes) noexcept { ledger_->refund(id_, bytes); }
bool Account::try_pass_on(Bytes bytes, Budget& to) noexcept {
    const auto* const other = dynamic_cast<const Account*>(&to);
    return other != nullptr && other->ledger_ == ledger_ && ledger_->try_pass_on(id_, other->id_, bytes);
}
Bytes Account::available() const noexcept { return ledger_->available(id_); }
bool Account::in_demand() const noexcept { return ledger_->in_demand(); }
bool Account::over_limit() const noexcept { return ledger_->over_limit(id_); }
void Account::note_refusal() noexcept { ledger_->note_refusal(id_); }
std::string Account::describe_holders() const { return common_->describe_holders(); }
int Account::priority() const noexcept { return ledger_->priority(id_); }
Bytes Account::excess() const noexcept { return ledger_->excess(id_); }

Bytes Account::make_room(Bytes wanted, bool wait, HandOver* handed) {
    return common_->make_room(*this, wanted, wait, Clock::now() + look_again, handed);
}

std::optional<Grant> Account::wait_for_room(Bytes bytes, const WaitOptions& wait) {
    if (!ledger_->can_ever_fit(id_, bytes)) return std::nullopt;
    struct Place {
        Ledger& ledger;
        const Ledger::WaitId id;
        bool left = false;
        bool leave() noexcept {
            left = true;
            return ledger.leave_wait(id);
        }
    };
    Place place{*ledger_, ledger_->enter_wait(id_, bytes)};
    const auto wake = [&] { ledger_->wake_waiter(place.id); };
    std::optional<Grant> grant;
    bool called_off = false;
    try {
        const Cancellation::Watch watch(wait.cancel, wake);
        for (bool granted = false; !granted;) {
            const auto left = wait.deadline - Clock::now();
            called_off = (wait.cancel && wait.cancel->cancelled()) || (wait.interrupted && wait.interrupted());
            if (called_off || left <= Clock::duration::zero()) break;
            const auto pause = std::min<Clock::duration>(left, look_again);
            granted = ledger_->sleep(place.id, static_cast<std::uint64_t>(std::chrono::nanoseconds(pause).count()));
            if (granted) break;
            common_->make_room(*this, bytes, false, wait.deadline, nullptr);  // what is freed goes by turns
            ledger_->serve_waiters();
        }
    } catch (...) {
        if (place.leave()) refund(bytes);
        throw;
    }
    if (place.leave()) grant.emplace(*this, bytes);
    if (called_off && grant) grant.reset();
    if (called_off) throw WaitCancelled("the wait of '" + name_ + "' for " + format_bytes(bytes) + " was called off");
    return grant;
}

void Account::add_idle_holder(const std::weak_ptr<IdleHolder>& holder) {
    const std::lock_guard lock(mutex_);
    std::erase_if(idle_holders_, [](const auto& each) { return each.expired(); });
    idle_holders_.push_back(holder);
}

void Account::attach(const std::shared_ptr<VirtualMemoryPool>& pool) {
    const std::lock_guard lock(mutex_);
    pool_ = pool;
}

void Account::set_quota(const QuotaChange& change) {
    ledger_->set_quota(id_, change);
    if (const Bytes over = quota().overage; over > 0) reclaim(over, false);
}

QuotaStats Account::quota() const noexcept { return ledger_->stats(id_); }

std::uint64_t Account::add_pressure_callback(PressureCallback callback) {
    const std::lock_guard lock(mutex_);
    callbacks_.emplace(++last_callback_, std::make_shared<const PressureCallback>(std::move(callback)));
    return last_callback_;
}

void Account::remove_pressure_callback(std::uint64_t number) noexcept {
    std::shared_ptr<const PressureCallback> gone;  // destroyed without the lock
    const std::lock_guard lock(mutex_);
    const auto it = callbacks_.find(number);
    if (it == callbacks_.end()) return;
    gone = std::move(it->second);
    callbacks_.erase(it);
}

std::shared_ptr<VirtualMemoryPool> Account::pool() const {
    const std::lock_guard lock(mutex_);
    return pool_.lock();
}

std::vector<std::shared_ptr<IdleHolder>> Account::idle_holders() const {
    std::vector<std::shared_ptr<IdleHolder>> alive;
    const std::lock_guard lock(mutex_);
    for (const auto& each : idle_holders_) {
        if (auto holder = each.lock()) alive.push_back(std::move(holder));
    }
    return alive;
}

Bytes Account::reclaim(Bytes wanted, bool wait, IdleTime idle_until, HandOver* to) noexcept {
    try {
        const auto of = pool();
        return of ? of->reclaim(wanted, wait, idle_until, to) : 0;
    } catch (const VmmError&) {
        return 0;  // closed since it was looked up: its memory is on its way back
    }
}

std::optional<IdleTime> Account::oldest_parked() const noexcept {
    try {
        const auto of = pool();
        return of ? of->oldest_parked() : std::nullopt;
    } catch (const VmmError&) {
        return std::nullopt;
    }
}

void Account::tell() noexcept {
    try {
        if (const auto of = pool()) ledger_->tell(id_, of->stats());
    } catch (const VmmError&) {
        // Of a process that this one was forked from.
    }
}

void Account::set_order_callback(OrderCallback callback) {
    std::shared_ptr<const OrderCallback> kept;
    if (callback) kept = std::make_shared<const OrderCallback>(std::move(callback));
    const bool taken = kept != nullptr;
    {
        const std::lock_guard lock(mutex_);
        order_callback_.swap(kept);  // the one before is destroyed without the lock
    }
    ledger_->take_orders(id_, taken);
    if (!taken) take_order();  // what came before that and was not passed on
}

void Account::take_order() noexcept {
    std::shared_ptr<Order> order;
    std::shared_ptr<const OrderCallback> callback;
    {
        const std::lock_guard lock(mutex_);
        const auto next = ledger_->next_order(id_, last_order_);
        if (!next) return;
        last_order_ = next->number;
        callback = order_callback_;
        order = std::make_shared<Order>(ledger_, id_, *next);
    }
    if (!callback) {
        order->refuse("it takes no orders any more");
        return;
    }
    try {
        (*callback)(order);
    } catch (const std::exception& error) {
        order->refuse(error.what());
    }
}

void Account::press(const PressureRequest& request) noexcept {
    if (in_callback) return;
    std::vector<std::shared_ptr<const PressureCallback>> asked;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& [number, callback] : callbacks_) asked.push_back(callback);
    }
    in_callback = true;
    for (const auto& callback : asked) {
        try {
            (*callback)(request);
        } catch (...) {
            // It has declined.
        }
    }
    in_callback = false;
}

}  // namespace elastikv
