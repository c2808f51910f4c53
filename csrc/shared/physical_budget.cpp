#include "shared/physical_budget.h"

#include <utility>

namespace elastikv {

bool PhysicalBudget::try_charge(Bytes bytes) noexcept {
    Bytes charged = charged_.load(std::memory_order_relaxed);
    do {
        if (bytes > limit_ - charged) return false;
    } while (!charged_.compare_exchange_weak(charged, charged + bytes, std::memory_order_acq_rel));
    Bytes peak = peak_.load(std::memory_order_relaxed);
    while (peak < charged + bytes && !peak_.compare_exchange_weak(peak, charged + bytes, std::memory_order_relaxed)) {
    }
    return true;
}

void PhysicalBudget::refund(Bytes bytes) noexcept { charged_.fetch_sub(bytes, std::memory_order_acq_rel); }

Bytes PhysicalBudget::make_room(Bytes wanted, bool wait) {
    Bytes freed = reclaim_from_pools(wanted, wait);
    if (freed >= wanted) return freed;
    std::vector<std::shared_ptr<IdleHolder>> holders;
    {
        const std::lock_guard lock(mutex_);
        std::erase_if(idle_holders_, [](const auto& holder) { return holder.expired(); });
        for (const auto& held : idle_holders_) {
            if (auto holder = held.lock()) holders.push_back(std::move(holder));
        }
    }
    Bytes released = 0;
    for (const auto& holder : holders) {
        if (freed + released >= wanted) break;
        released += holder->release_idle(wanted - freed - released);
    }
    if (released > 0) freed += reclaim_from_pools(wanted - freed, wait);
    return freed;
}

void PhysicalBudget::add_idle_holder(const std::weak_ptr<IdleHolder>& holder) {
    const std::lock_guard lock(mutex_);
    idle_holders_.push_back(holder);
}

Bytes PhysicalBudget::reclaim_from_pools(Bytes wanted, bool wait) {
    Bytes freed = 0;
    for (const auto& [name, pool] : living()) {
        if (freed >= wanted) break;
        try {
            freed += pool->reclaim(wanted - freed, wait);
        } catch (const PoolClosed&) {
            // Closed since it was looked up: its memory is on its way back.
        }
    }
    return freed;
}

std::string PhysicalBudget::describe_holders() const {
    std::string text = format_bytes(charged()) + " of the limit of " + format_bytes(limit_) + " are held";
    const char* before = ": ";
    for_each_pool([&](const std::string& name, const VirtualMemoryPool& pool) {
        const MemoryStats stats = pool.stats();
        text += before + ("'" + name + "' " + format_bytes(stats.physical_usage)) + " (used " +
                format_bytes(stats.used) + ", retiring " + format_bytes(stats.retiring) + ", parked " +
                format_bytes(stats.parked) + ", stranded " + format_bytes(stats.stranded) + ")";
        before = "; ";
    });
    return text + ". Free or shrink tensors, compact() what is stranded, or raise physical_limit";
}

void PhysicalBudget::add(const std::string& name, const std::shared_ptr<VirtualMemoryPool>& pool) {
    const std::lock_guard lock(mutex_);
    members_.push_back({name, pool});
}

std::vector<std::pair<std::string, std::shared_ptr<VirtualMemoryPool>>> PhysicalBudget::living() const {
    std::vector<std::pair<std::string, std::shared_ptr<VirtualMemoryPool>>> alive;
    const std::lock_guard lock(mutex_);
    std::erase_if(members_, [](const Member& member) { return member.pool.expired(); });
    for (const Member& member : members_) {
        if (auto pool = member.pool.lock()) alive.emplace_back(member.name, std::move(pool));
    }
    return alive;
}

}  // namespace elastikv
