#include "pool/hand_over.h"

#include <algorithm>
#include <new>
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

HandOver::HandOver(MeteredDriverPtr driver, std::shared_ptr<Budget> budget, Bytes page, Bytes smallest)
    : driver_(std::move(driver)), budget_(std::move(budget)), page_(page), smallest_(smallest) {}

// Where the system hands out zeros, the way through it is the cheaper one: it zeroes what is touched, and only that.
void HandOver::want(Bytes total, Bytes largest, bool exact) noexcept {
    wanted_ = driver_->capabilities().fresh_is_zero ? 0 : total;
    largest_ = largest;
    exact_ = exact;
}

bool HandOver::suits(Bytes size) const noexcept {
    if (size < smallest_ || size % page_ != 0 || size > wanted_ || total_ > wanted_ - size) return false;
    return exact_ ? size == largest_ : size <= largest_;
}

bool HandOver::try_take(Budget* giver, const MeteredDriver& driver,
                        const std::shared_ptr<PhysicalExtent>& extent) noexcept {
    const Bytes size = extent->size();
    if (!suits(size) || !driver_->is_over_the_same(driver)) return false;
    if ((giver == nullptr) != (budget_ == nullptr)) return false;
    try {
        extents_.reserve(extents_.size() + 1);
    } catch (const std::bad_alloc&) {
        return false;
    }
    if (giver != nullptr && !giver->try_pass_on(size, *budget_)) return false;
    extent->pass_to(driver_);
    const auto smaller =
        std::find_if(extents_.begin(), extents_.end(), [size](const auto& each) { return each->size() < size; });
    extents_.insert(smaller, extent);
    total_ += size;
    return true;
}

Bytes HandOver::fitting(Bytes gap) const noexcept {
    Bytes filled = 0;
    for (const auto& each : extents_) {
        const bool fits = exact_ ? each->size() == gap : each->size() <= gap - filled;
        if (fits) filled += each->size();
        if (fits && exact_) break;
    }
    return filled;
}

std::shared_ptr<PhysicalExtent> HandOver::next(Bytes left) noexcept {
    const auto fits =
        std::find_if(extents_.begin(), extents_.end(), [left](const auto& each) { return each->size() <= left; });
    std::shared_ptr<PhysicalExtent> taken = std::move(*fits);
    extents_.erase(fits);
    total_ -= taken->size();
    return taken;
}

Bytes HandOver::give_back() noexcept {
    Bytes freed = 0;
    for (const auto& each : extents_) {
        if (each->try_release().ok() || each->try_release().ok()) {
            if (budget_) budget_->refund(each->size());
            freed += each->size();
        } else {
            each->abandon();
        }
    }
    extents_.clear();
    total_ = 0;
    return freed;
}

// ---- for VirtualMemoryPool

// Of an idle extent, which leaves a former place behind. What other processes may have mapped, or what may still be
// mapped at a place that the driver would not unmap, must not become anyone else's.
bool VirtualMemoryPool::try_hand_over(Extent& extent, HandOver& to) noexcept {
    const bool elsewhere = extent.places && (extent.places->count > 1 || extent.places->lost);
    if (extent.exported || extent.spilled || elsewhere || !to.suits(extent.range.size())) return false;
    if (!extent.mapping->extent().try_end_former_place().ok()) return false;
    try {
        auto place = extent.mapping->make_former_place();
        if (!to.try_take(budget_.get(), *driver_, extent.mapping->shared_extent())) return false;
        extent.mapping->leave(std::move(place));
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

// Where extents that changed hands and came here are still mapped, too. Lets the lock go around each, which stays
// listed until it has ended: who comes meanwhile waits for it. What the driver refuses is tried again with the worker's
// next turn.
void VirtualMemoryPool::end_former_places(std::unique_lock<std::mutex>& lock) {
    std::vector<std::shared_ptr<FormerPlace>> refused;
    while (!former_places_.empty()) {
        const std::shared_ptr<FormerPlace> place = former_places_.back();
        lock.unlock();
        const bool ended = place->try_end().ok();
        lock.lock();
        const auto listed = std::find(former_places_.rbegin(), former_places_.rend(), place);  // the last one, mostly
        if (listed == former_places_.rend()) continue;
        former_places_.erase(std::next(listed).base());
        if (!ended) refused.push_back(place);
    }
    reclaims_refused_ += refused.size();
    former_places_.insert(former_places_.end(), refused.begin(), refused.end());
}

}  // namespace elastikv
