// One client of a physical budget: its charges, its quota, and what it can give up for others.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pool/budget.h"
#include "pool/virtual_memory_pool.h"
#include "shared/ledger.h"
#include "shared/order.h"

namespace elastikv {

class PhysicalBudget;

// What a client with a higher priority asks of one with a lower.
struct PressureRequest {
    Bytes wanted = 0;
    std::chrono::steady_clock::time_point until{};  // later it does not help the one who asks
};
// Frees, pauses, spills, or declines by doing nothing. Called with no lock held, from any thread, and never while the
// same thread is in one already. What it throws is ignored.
using PressureCallback = std::function<void(const PressureRequest&)>;

// Thread safe: a mutex guards the lists, and is not held while anything of them is called.
class Account final : public Budget {
  public:
    // Made by PhysicalBudget::open.
    Account(std::shared_ptr<PhysicalBudget> common, Ledger::ClientId id, std::string name);
    // Ends the reserve. What is still charged, as the driver would not take it back, stays charged.
    ~Account() override;
    Account(const Account&) = delete;
    Account& operator=(const Account&) = delete;

    const std::string& name() const { return name_; }
    const std::shared_ptr<PhysicalBudget>& common() const { return common_; }

    // --- as the budget of its pool; the rest of the ladder is PhysicalBudget's ---
    bool try_charge(Bytes bytes) noexcept override;
    void refund(Bytes bytes) noexcept override;
    bool try_pass_on(Bytes bytes, Budget& to) noexcept override;
    Bytes available() const noexcept override;
    bool in_demand() const noexcept override;
    bool over_limit() const noexcept override;
    Bytes make_room(Bytes wanted, bool wait, HandOver* handed) override;
    std::optional<Grant> wait_for_room(Bytes bytes, const WaitOptions& wait) override;
    void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) override;
    std::string describe_holders() const override;
    void note_refusal() noexcept override;

    // The pool that draws on it, whose idle memory is taken when room is made.
    void attach(const std::shared_ptr<VirtualMemoryPool>& pool);

    // All of it or nothing; what is above a lowered limit goes as memory is freed. Throws InvalidArgument.
    void set_quota(const QuotaChange& change);
    QuotaStats quota() const noexcept;
    int priority() const noexcept;
    // Bytes that others may ask for: what is charged beyond the reserve.
    Bytes excess() const noexcept;

    // The callback is asked until remove_pressure_callback() with the number that this returns; it may be under way
    // then, and end later.
    std::uint64_t add_pressure_callback(PressureCallback callback);
    void remove_pressure_callback(std::uint64_t number) noexcept;

    // Who is told of orders from outside, in place of who was before; null for nobody, and then they are refused at
    // once. One may be told once more after it was replaced. What it throws is the order's refusal.
    void set_order_callback(OrderCallback callback);

    // --- what the ladder does with it ---
    std::shared_ptr<VirtualMemoryPool> pool() const;
    std::vector<std::shared_ptr<IdleHolder>> idle_holders() const;
    // Gives parked memory back, or to `to` what suits it; with `wait` what retires as well. 0 where the pool is closed
    // or gone.
    Bytes reclaim(Bytes wanted, bool wait, IdleTime idle_until = any_time, HandOver* to = nullptr) noexcept;
    std::optional<IdleTime> oldest_parked() const noexcept;
    void press(const PressureRequest& request) noexcept;
    // Its pool's statistics to the ledger.
    void tell() noexcept;
    // Passes on an order that was given and not passed on yet.
    void take_order() noexcept;
    Ledger::ClientId id() const noexcept { return id_; }

  private:
    const ProcessGuard process_;
    const std::shared_ptr<PhysicalBudget> common_;
    const std::shared_ptr<Ledger> ledger_;
    const Ledger::ClientId id_;
    const std::string name_;
    mutable std::mutex mutex_;  // guards everything below
    std::weak_ptr<VirtualMemoryPool> pool_;
    std::vector<std::weak_ptr<IdleHolder>> idle_holders_;
    std::map<std::uint64_t, std::shared_ptr<const PressureCallback>> callbacks_;
    std::uint64_t last_callback_ = 0;
    std::shared_ptr<const OrderCallback> order_callback_;
    std::uint32_t last_order_ = 0;
};

using AccountPtr = std::shared_ptr<Account>;

}  // namespace elastikv
