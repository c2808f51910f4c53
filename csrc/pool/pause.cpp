// VirtualMemoryPool: memory that is put to sleep.
//
// Neither this nor resume() holds the lock while it copies, which may take seconds. What keeps others off meanwhile:
// the area counts as asleep from the start, so that nobody gets memory there, and `moving_` makes those wait who would
// free memory of it, move extents, or pause and resume themselves.
#include <algorithm>
#include <map>
#include <utility>

#include "base/events.h"
#include "pool/moving.h"

namespace elastikv {
namespace {

// Extents of one owner that lie side by side come back as one up to this size, or up to this share of all of them:
// fewer driver calls, and not more that is kept by its last page in use than after growth.
constexpr Bytes joined_extent = 64 * MiB;
constexpr Bytes joined_share = 8;

// Joins runs side by side, from `first` on.
void join(std::vector<DormantRun>& runs, std::size_t first) {
    if (first == runs.size()) return;
    const Bytes all = runs.back().pages.end - runs[first].pages.begin;
    const Bytes largest = std::max(joined_extent, all / joined_share);
    std::size_t last = first;
    for (std::size_t next = first + 1; next < runs.size(); ++next) {
        if (runs[last].pages.size() + runs[next].pages.size() <= largest) {
            runs[last].pages.end = runs[next].pages.end;
        } else if (++last != next) {
            runs[last] = std::move(runs[next]);
        }
    }
    runs.erase(runs.begin() + static_cast<std::ptrdiff_t>(last) + 1, runs.end());
}

}  // namespace

void VirtualMemoryPool::require_awake(ByteRange bytes) const {
    if (!dormant_.sleeps(bytes)) return;
    throw ModelPaused("memory in [" + std::to_string(bytes.begin) + ", " + std::to_string(bytes.end) + ")" +
                      (options_.name.empty() ? "" : " of '" + options_.name + "'") +
                      " is paused; resume() comes first");
}

void VirtualMemoryPool::wait_until_still(std::unique_lock<std::mutex>& lock) {
    moved_.wait(lock, [this] { return !moving_; });
}

void VirtualMemoryPool::wait_until_still(std::unique_lock<std::mutex>& lock, std::span<const ByteRange> parts) {
    moved_.wait(lock, [&] {
        const auto sleeps = [this](const ByteRange& part) { return dormant_.sleeps(part); };
        return !moving_ || std::none_of(parts.begin(), parts.end(), sleeps);
    });
}

bool VirtualMemoryPool::is_paused(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    if (!any_asleep_.load(std::memory_order_acquire)) return false;
    const std::lock_guard lock(mutex_);
    return dormant_.sleeps(bytes);
}

void VirtualMemoryPool::require_awake(Bytes offset, Bytes size) const {
    const ByteRange bytes = checked_range(offset, size);
    if (!any_asleep_.load(std::memory_order_acquire)) return;
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_awake(bytes);
}

void VirtualMemoryPool::forget_pause(Bytes offset, Bytes size) {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    std::unique_lock lock(mutex_);
    wait_until_still(lock, {&bytes, 1});
    if (dormant_.area().total() < capacity() && !dormant_.live().first_overlap(bytes)) dormant_.wake(bytes);
    note_sleep();
}

Bytes VirtualMemoryPool::pause(const std::vector<PausePart>& parts, Keep keep) {
    process_.require_same_process();
    Observed observed(EventKind::pause, options_.name);
    std::unique_lock lock(mutex_);
    const Moving moving(*this, lock);
    require_open();
    std::vector<PausePart> awake;
    for (const PausePart& part : parts) {
        checked_range(part.range.begin, part.range.size());
        Bytes at = part.range.begin;
        dormant_.area().for_each(part.range, [&](ByteRange asleep) {
            if (asleep.begin > at) awake.push_back({{at, asleep.begin}, part.one_owner});
            at = asleep.end;
        });
        if (at < part.range.end) awake.push_back({{at, part.range.end}, part.one_owner});
    }
    for (const PausePart& part : awake) dormant_.lay_down(part.range);
    note_sleep();
    std::vector<DormantRun> runs;
    try {
        wait_for_work_in(lock, awake);
        runs = runs_to_pause(awake);
        if (keep == Keep::on_host) back_up(lock, runs);
    } catch (...) {
        for (const PausePart& part : awake) dormant_.wake(part.range);
        note_sleep();
        throw;
    }
    for (DormantRun& run : runs) {
        std::vector<ByteRange> live;
        table_.live().for_each(run.pages, [&](ByteRange part) { live.push_back(part); });
        dormant_.add(std::move(run), live);
        for (const ByteRange& part : live) {
            table_.release(part, any_batch);
            table_.settle(part, any_batch);
        }
    }
    const Bytes before = table_.totals().physical();
    for (const PausePart& part : awake) give_back_idle_in(part.range);
    const Bytes after = table_.totals().physical();
    observed.done(before - after, after);
    return before - after;
}

// Nobody says which streams use memory that is not released, so all of the device's work comes first.
void VirtualMemoryPool::wait_for_work_in(std::unique_lock<std::mutex>& lock, const std::vector<PausePart>& parts) {
    {
        const Unlocked unlocked(lock);
        synchronize();
    }
    for (;;) {
        settle_passed();
        std::vector<FencePtr> fences;
        for (const PausePart& part : parts) {
            for (const std::uint64_t id : table_.batches_in(part.range)) {
                const RetireBatch* const batch = retiring_.find(id);
                if (batch == nullptr) continue;
                if (!batch->recorded()) {
                    throw InvalidArgument(
                        "memory was released while a stream captures a graph or its gate is closed; it can be paused "
                        "once that is over");
                }
                fences.insert(fences.end(), batch->fences.begin(), batch->fences.end());
            }
            table_.for_each_extent(part.range, [&](const Extent& extent) {
                if (extent.zeroing && !extent.zeroing->has_passed()) fences.push_back(extent.zeroing);
            });
        }
        if (fences.empty()) return;
        const Unlocked unlocked(lock);
        for (const FencePtr& fence : fences) {
            if (const Status status = fence->try_wait(); !status.ok()) {
                throw CudaError(status, "waiting for work on memory that is to be paused");
            }
        }
    }
}

std::vector<DormantRun> VirtualMemoryPool::runs_to_pause(const std::vector<PausePart>& parts) const {
    std::vector<DormantRun> runs;
    std::map<const Places*, std::shared_ptr<Backup>> shared;
    for (const PausePart& part : parts) {
        std::size_t stretch = runs.size();  // from here on runs lie side by side and may be joined
        table_.for_each_extent(part.range, [&](const Extent& extent) {
            if (extent.used == 0 || extent.spilled) return;
            if (extent.exported) {
                throw InvalidArgument("the extent at offset " + std::to_string(extent.range.begin) +
                                      " was handed to other processes, so it can't be paused; free it first");
            }
            if (extent.shared() && part.range.contains(extent.range)) {
                std::shared_ptr<Backup>& backup = shared[extent.places.get()];
                if (!backup) backup = std::make_shared<Backup>();
                join(runs, stretch);
                runs.push_back({extent.range, backup, extent.fixed});
                stretch = runs.size();
                return;
            }
            IntervalSet used;
            table_.live().for_each(extent.range.clipped_to(part.range),
                                   [&](ByteRange bytes) { used.add(table_.pages_of(bytes)); });
            used.for_each(part.range, [&](ByteRange pages) {
                const bool alone = !part.one_owner || extent.fixed;
                if (stretch < runs.size() && (alone || runs.back().pages.end != pages.begin)) {
                    join(runs, stretch);
                    stretch = runs.size();
                }
                runs.push_back({pages, std::make_shared<Backup>(), extent.fixed});
                if (alone) stretch = runs.size();
            });
        });
        join(runs, stretch);
    }
    return runs;
}

// Copies every run's pages to pinned memory, what is shared once. After a failure nothing copies any more.
void VirtualMemoryPool::back_up(std::unique_lock<std::mutex>& lock, std::vector<DormantRun>& runs) {
    std::map<const Backup*, const DormantRun*> distinct;
    Bytes total = 0;
    for (const DormantRun& run : runs) {
        if (distinct.emplace(run.backup.get(), &run).second) total += run.pages.size();
    }
    if (total == 0) return;
    std::vector<PinnedBufferPtr> buffers;
    {
        const Unlocked unlocked(lock);
        auto taken = pinned_->try_take(total);
        if (!taken.ok()) {
            throw CudaError(taken.status(), "pinning host memory for a backup of " + format_bytes(total));
        }
        buffers = std::move(taken.value());
    }
    Status status;
    std::size_t buffer = 0;
    Bytes filled = 0;  // of that buffer
    for (const auto& [backup, run] : distinct) {
        for (Bytes at = run->pages.begin; at < run->pages.end && status.ok();) {
            const Bytes size = std::min(run->pages.end - at, buffers[buffer]->size() - filled);
            status = driver_->transfer(buffers[buffer]->address() + filled, base_address() + at, size);
            run->backup->pieces.push_back({buffers[buffer], filled, size});
            at += size;
            filled += size;
            if (filled < buffers[buffer]->size()) continue;
            ++buffer;
            filled = 0;
        }
    }
    if (status.ok()) status = try_wait_for_copies(lock, /*scrubbing=*/false);
    if (status.ok()) return;
    (void)driver_->synchronize();
    throw CudaError(status, "copying memory that is to be paused to the host");
}

Status VirtualMemoryPool::try_wait_for_copies(std::unique_lock<std::mutex>& lock, bool scrubbing) noexcept {
    if (!driver_->capabilities().asynchronous) return Status::success();
    auto copied = RecordedFence::try_record(driver_, driver_->transfer_stream());
    if (!copied.ok()) return copied.status();
    Result<FencePtr> scrubbed = FencePtr();
    if (scrubbing) scrubbed = RecordedFence::try_record(driver_, driver_->service_stream());
    if (!scrubbed.ok()) return scrubbed.status();
    const Unlocked unlocked(lock);
    Status status = copied.value()->try_wait();
    if (status.ok() && scrubbing) status = scrubbed.value()->try_wait();
    return status;
}

// What the driver refuses twice stays parked.
void VirtualMemoryPool::give_back_idle_in(ByteRange range) {
    std::vector<Bytes> idle;
    table_.for_each_extent(range, [&](const Extent& extent) {
        if (extent.idle()) idle.push_back(extent.range.begin);
    });
    for (const Bytes begin : idle) {
        if (!try_give_back(*table_.find(begin))) (void)try_give_back(*table_.find(begin));
    }
}

// Returns the first byte that is neither live nor asleep, or the end.
Bytes VirtualMemoryPool::first_free(ByteRange bytes) const {
    for (Bytes at = bytes.begin; at < bytes.end;) {
        const Bytes awake = table_.live().first_gap({at, bytes.end});
        at = awake < bytes.end ? dormant_.live().first_gap({awake, bytes.end}) : awake;
        if (at == awake) return at;
    }
    return bytes.end;
}

}  // namespace elastikv
