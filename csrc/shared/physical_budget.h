// One limit of physical bytes for the pools of several models.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pool/budget.h"
#include "pool/virtual_memory_pool.h"

namespace elastikv {

// Thread safe. Charges are one atomic, so that a charge never waits; the list of pools has a mutex, which is never held
// while a pool is called.
class PhysicalBudget final : public Budget {
  public:
    explicit PhysicalBudget(Bytes limit) : limit_(limit) {}

    bool try_charge(Bytes bytes) noexcept override;
    void refund(Bytes bytes) noexcept override;
    Bytes available() const noexcept override { return limit_ - charged(); }
    // Takes parked memory of one pool after the other, in order of registration, the asking one included; then what
    // others hold idle above the pools.
    Bytes make_room(Bytes wanted, bool wait) override;
    void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) override;
    std::string describe_holders() const override;

    // A pool that draws on this budget; it is forgotten when it dies.
    void add(const std::string& name, const std::shared_ptr<VirtualMemoryPool>& pool);

    Bytes limit() const noexcept { return limit_; }
    Bytes charged() const noexcept { return charged_.load(std::memory_order_acquire); }
    Bytes peak() const noexcept { return peak_.load(std::memory_order_relaxed); }

    // Calls visit(name, pool) for each pool that is alive, without holding a lock.
    template <typename Visit>
    void for_each_pool(Visit visit) const {
        for (const auto& [name, pool] : living()) visit(name, *pool);
    }

  private:
    Bytes reclaim_from_pools(Bytes wanted, bool wait);
    struct Member {
        std::string name;
        std::weak_ptr<VirtualMemoryPool> pool;
    };
    std::vector<std::pair<std::string, std::shared_ptr<VirtualMemoryPool>>> living() const;

    const Bytes limit_;
    std::atomic<Bytes> charged_{0};
    std::atomic<Bytes> peak_{0};
    mutable std::mutex mutex_;
    mutable std::vector<Member> members_;
    std::vector<std::weak_ptr<IdleHolder>> idle_holders_;
};

}  // namespace elastikv
