// VirtualMemoryPool: releasing memory, reclaiming it, and what the worker does.
#include <algorithm>
#include <new>
#include <utility>

#include "base/events.h"
#include "pool/virtual_memory_pool.h"

namespace elastikv {
namespace {

constexpr Bytes used_for_spare = 8;  // times as much must be in use

}  // namespace

void VirtualMemoryPool::retire(std::vector<ByteRange> parts, std::span<const Stream> streams,
                               std::shared_ptr<ReleaseGate> gate) {
    auto prepared = retiring_.try_prepare(std::move(parts), streams, std::move(gate));
    if (!prepared.ok()) throw CudaError(prepared.status(), "recording a fence for released memory");
    retire(std::move(prepared.value()));
}

void VirtualMemoryPool::retire(RetireBatch batch) {
    retiring_.inherit(batch);
    for (const ByteRange& part : batch.parts) {
        table_.for_each_extent(part, [&](const Extent& extent) {
            if (extent.zeroing) batch.fences.push_back(extent.zeroing);
        });
        table_.release(part, batch.id);
    }
    retiring_.push(std::move(batch));
    settle_passed();
    if (!retiring_.empty()) worker_.wake();
}

// Carries what the device has finished into the books. Gives memory back on the host, where no one waits for a device;
// elsewhere the worker does, as unmapping costs tens of microseconds a handle.
void VirtualMemoryPool::settle_passed(bool on_worker) {
    std::erase_if(scrubbing_, [this](const auto& pending) {
        Extent* const extent = table_.find(pending.first);
        if (extent == nullptr || extent->zeroing != pending.second) return true;
        if (!pending.second->has_passed()) return false;
        extent->zeroing.reset();
        return true;
    });
    if (retiring_.empty() && !on_worker) return;  // the worker may be called for what another thread has settled
    for (const RetireBatch& batch : retiring_.take_passed()) {
        for (const ByteRange& part : batch.parts) table_.settle(part, batch.id);
    }
    give_back_unparkable(on_worker);
    if (!over_park_limit()) return;
    if (!driver_->capabilities().asynchronous) {
        give_back_excess();
    } else if (!on_worker) {  // who would else call itself without a pause while the driver refuses
        worker_.wake();
    }
}

// While someone waits for memory, or the model has more than it may, nothing is parked. What is spare goes with what is
// in use.
Bytes VirtualMemoryPool::park_limit() const {
    if (budget_ && (budget_->in_demand() || budget_->over_limit())) return 0;
    return std::max({park_limit_, expected_, std::min(spare_, table_.totals().used / used_for_spare)});
}

void VirtualMemoryPool::add_spare(Bytes bytes) {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_open();
    spare_ += bytes;
}

void VirtualMemoryPool::remove_spare(Bytes bytes) noexcept {
    const std::lock_guard lock(mutex_);
    spare_ -= std::min(spare_, bytes);
    shed_excess();
}

void VirtualMemoryPool::expect(Bytes before, Bytes now) noexcept {
    const std::lock_guard lock(mutex_);
    expected_ = expected_ - std::min(expected_, before) + now;
    if (now < before) shed_excess();
}

// On the worker where it takes long.
void VirtualMemoryPool::shed_excess() noexcept {
    if (closed_ || !over_park_limit()) return;
    if (driver_->capabilities().asynchronous) {
        worker_.wake();
    } else {
        give_back_excess();
    }
}

// An idle place of memory that is in use elsewhere can't be handed out again, and host memory is not to be: neither is
// parked.
void VirtualMemoryPool::give_back_unparkable(bool on_worker) {
    if (table_.totals().aliased == 0 && table_.totals().spilled == 0) return;
    std::vector<Bytes> idle;
    for (const auto& [since, begin] : table_.parked()) {
        if (table_.find(begin)->unparkable()) idle.push_back(begin);
    }
    if (idle.empty()) return;
    if (driver_->capabilities().asynchronous && !on_worker) {
        worker_.wake();
        return;
    }
    for (const Bytes begin : idle) {
        Extent& extent = *table_.find(begin);
        if (extent.unparkable()) (void)try_give_back(extent);  // of several idle places the last one may be parked
    }
}

bool VirtualMemoryPool::over_park_limit() const {
    return table_.totals().parked - table_.totals().ahead > park_limit();
}

Bytes VirtualMemoryPool::give_back_parked(Bytes wanted, IdleTime idle_until, HandOver* to) {
    Bytes freed = 0;
    std::vector<Bytes> oldest_first;
    for (const bool ahead : {false, true}) {  // what was mapped ahead is about to be wanted, so it goes last
        for (const auto& [since, begin] : table_.parked()) {
            if (since > idle_until) break;
            if (table_.find(begin)->ahead == ahead) oldest_first.push_back(begin);
        }
    }
    for (const Bytes begin : oldest_first) {
        if (freed >= wanted) break;
        freed += try_give_back(*table_.find(begin), to).value_or(0);
    }
    return freed;
}

Bytes VirtualMemoryPool::give_back_excess() {
    Bytes freed = 0;
    for (auto it = table_.parked().begin(); it != table_.parked().end() && over_park_limit();) {
        Extent& extent = *table_.find(it->second);
        ++it;  // before the extent leaves the list
        if (!extent.ahead) freed += try_give_back(extent).value_or(0);
    }
    return freed;
}

// Returns the bytes freed: all of the extent, and 0 where its memory lives on at another place or was the host's;
// nothing where the driver refused or something is being written to it, and then it stays in the books.
std::optional<Bytes> VirtualMemoryPool::try_give_back(Extent& extent, HandOver* to) noexcept {
    if (extent.waking) return std::nullopt;
    if (extent.zeroing && !extent.zeroing->has_passed()) return std::nullopt;
    const Bytes size = extent.cost();
    const bool releases = !extent.shared();
    Observed observed(EventKind::reclaim, options_.name);
    const bool handed = to != nullptr && try_hand_over(extent, *to);
    Status status;
    if (!handed) status = extent.mapping->try_unmap();
    if (status.ok() && releases && !handed) status = extent.mapping->extent().try_release();
    if (!status.ok()) {
        ++reclaims_refused_;
        return std::nullopt;
    }
    table_.take(extent.range.begin);
    if (budget_ && size > 0 && !handed) budget_->refund(size);
    observed.done(size, table_.totals().physical());
    return size;
}

// For an extent that has no place in the books any more. What the driver refuses twice is never tried again and stays
// charged, as it is still there.
bool VirtualMemoryPool::try_give_up(Extent extent) noexcept {
    Mapping& mapping = *extent.mapping;
    PhysicalExtent& physical = mapping.extent();
    const bool unmapped = mapping.try_unmap().ok() || mapping.try_unmap().ok();
    if (extent.places && extent.places->count > 0) {
        extent.places->lost |= !unmapped;
        return unmapped;
    }
    const bool lost = extent.places && extent.places->lost;
    const bool released = unmapped && !lost && (physical.try_release().ok() || physical.try_release().ok());
    if (!released) {
        physical.abandon();
    } else if (budget_ && !extent.spilled) {
        budget_->refund(extent.range.size());
    }
    return released;
}

// For an extent that is not in the books: gives it back, or puts it there as a parked one if the driver refuses.
void VirtualMemoryPool::discard(Extent extent) noexcept {
    extent.clean = {};
    extent.zeroing.reset();
    Observed observed(EventKind::reclaim, options_.name);
    const bool alias = extent.places != nullptr;  // its memory is another extent's, too
    Status status = extent.mapping->try_unmap();
    if (status.ok() && !alias) status = extent.mapping->extent().try_release();
    if (status.ok()) {
        if (alias) return;
        if (budget_) budget_->refund(extent.range.size());
        observed.done(extent.range.size(), table_.totals().physical());
        return;
    }
    ++reclaims_refused_;
    table_.insert(std::move(extent));
    note_peaks();
}

Bytes VirtualMemoryPool::trim(Bytes wanted) { return reclaim(wanted, false); }

Bytes VirtualMemoryPool::reclaim(Bytes wanted, bool wait, IdleTime idle_until, HandOver* to) {
    process_.require_same_process();
    std::unique_lock lock(mutex_);
    require_open();
    if (wait) {
        std::vector<FencePtr> fences = retiring_.pending_fences();
        for (const auto& [begin, fence] : scrubbing_) fences.push_back(fence);
        lock.unlock();
        for (const FencePtr& fence : fences) (void)fence->try_wait();
        lock.lock();
        require_open();
    }
    const Bytes before = table_.totals().physical();
    settle_passed();
    const Bytes settled = before - table_.totals().physical();  // the host gives back as it settles
    return settled >= wanted ? settled : settled + give_back_parked(wanted - settled, idle_until, to);
}

std::optional<IdleTime> VirtualMemoryPool::oldest_parked() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    if (table_.parked().empty()) return std::nullopt;
    return table_.parked().begin()->first;
}

void VirtualMemoryPool::drain() {
    process_.require_same_process();
    std::unique_lock lock(mutex_);
    require_open();
    prefetched_.wait(lock, [this] { return closed_ || prefetches_.empty(); });
    for (;;) {
        settle_passed();
        const std::vector<FencePtr> fences = retiring_.pending_fences();
        if (fences.empty()) break;
        lock.unlock();
        for (const FencePtr& fence : fences) (void)fence->try_wait();
        lock.lock();
    }
    end_former_places(lock);
    give_back_excess();
}

void VirtualMemoryPool::stop_parking() {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    park_limit_ = spare_ = expected_ = 0;
    settle_passed();
    if (!closed_) give_back_excess();
}

Result<FencePtr> VirtualMemoryPool::try_record_fence(Stream stream) {
    return RecordedFence::try_record(driver_, stream);
}

void VirtualMemoryPool::synchronize() {
    process_.require_same_process();
    if (!driver_->capabilities().asynchronous) return;
    const Status status = driver_->synchronize();
    if (!status.ok()) throw CudaError(status, "waiting for the device");
}

// The worker's turn. True: call again soon, as device work is pending.
bool VirtualMemoryPool::work_step() {
    std::unique_lock lock(mutex_);
    while (!prefetches_.empty() && !closed_) {
        const Prefetch wanted = prefetches_.front();
        prefetches_.pop_front();
        run_prefetch(wanted);
        prefetched_.notify_all();
        lock.unlock();  // between extents, so that a caller who wants to grow waits for one driver call at most
        lock.lock();
    }
    settle_passed(/*on_worker=*/true);
    while (over_park_limit() && !closed_) {
        Extent* victim = nullptr;
        for (const auto& [since, begin] : table_.parked()) {
            victim = table_.find(begin);
            if (!victim->ahead) break;
        }
        if (victim == nullptr || !try_give_back(*victim)) break;
        lock.unlock();
        lock.lock();
    }
    end_former_places(lock);
    return !retiring_.empty() || !scrubbing_.empty();
}

bool VirtualMemoryPool::is_welcome(const Prefetch& wanted) const {
    if (dormant_.sleeps(wanted.pages)) return false;  // it was asked for before the pause
    if (!wanted.spare) return true;
    const PageTotals& totals = table_.totals();
    const Bytes missing = table_.missing(wanted.pages);
    if (missing == 0) return true;  // it is there already
    return missing == wanted.pages.size() && totals.parked - totals.ahead + missing <= park_limit();
}

void VirtualMemoryPool::run_prefetch(const Prefetch& wanted) {
    if (!is_welcome(wanted)) {
        ++prefetches_dropped_;
        return;
    }
    for (const ByteRange& gap : table_.gaps(wanted.pages)) {
        std::vector<Extent> fresh;
        const bool made =
            (!budget_ || budget_->try_charge(gap.size())) && try_make_extent(gap, options_.scrub_fresh, fresh).ok();
        bool scrubs = false;
        bool ready = made && try_scrub(fresh, scrubs).ok();
        Result<FencePtr> fence = FencePtr();
        if (ready && scrubs && driver_->capabilities().asynchronous) {
            fence = RecordedFence::try_record(driver_, driver_->service_stream());
            ready = fence.ok();
        }
        if (!ready) {
            undo(fresh);
            ++prefetches_dropped_;
            return;
        }
        Extent& extent = fresh.front();
        extent.ahead = !wanted.spare;
        extent.fixed = wanted.spare;
        extent.zeroing = fence.value();
        if (extent.zeroing) scrubbing_.emplace_back(extent.range.begin, extent.zeroing);
        table_.insert(std::move(extent));
        note_peaks();
    }
    ++prefetches_done_;
}

void VirtualMemoryPool::release_everything() noexcept {
    {
        std::unique_lock lock(mutex_);
        wait_until_still(lock);
        if (closed_) {
            give_back_parked(capacity());
            return;
        }
        closed_ = true;
        prefetches_.clear();
        prefetched_.notify_all();
        dormant_.clear();
        note_sleep();
    }
    worker_.stop();
    std::unique_lock lock(mutex_);
    retiring_.ignore_gates();
    settle_passed();
    std::vector<FencePtr> fences = retiring_.pending_fences();
    for (const auto& [begin, fence] : scrubbing_) fences.push_back(fence);
    // Work on memory that was never released has no fence of its own, nor has that on streams that still capture.
    bool unfenced = !table_.live().empty() || retiring_.has_unrecorded();
    lock.unlock();
    for (const FencePtr& fence : fences) unfenced |= !fence->try_wait().ok();
    if (unfenced && driver_->capabilities().asynchronous) (void)driver_->synchronize();
    lock.lock();
    settle_passed();
    std::vector<ByteRange> parts;
    table_.live().for_each({0, capacity()}, [&](ByteRange part) { parts.push_back(part); });
    for (const ByteRange& part : parts) table_.release(part, any_batch);
    table_.settle({0, capacity()}, any_batch);
    retiring_.clear();
    give_back_parked(capacity());
    former_places_.clear();  // ended with their extents, or kept by what the driver refused
}

}  // namespace elastikv
