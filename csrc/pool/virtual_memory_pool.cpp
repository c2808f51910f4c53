#include "pool/virtual_memory_pool.h"

#include <algorithm>
#include <utility>

#include "base/events.h"

namespace elastikv {
namespace {

constexpr Bytes default_cuda_park_limit = 256 * MiB;
// So often room is made anew for the same request where others were faster to take it.
constexpr int most_robbed = 16;

std::shared_ptr<AddressRange> reserve(const MeteredDriverPtr& driver, Bytes capacity, Bytes page_size) {
    if (capacity == 0) throw InvalidSize("capacity must be at least 1 byte, not 0");
    const auto rounded = align_up(capacity, page_size);
    if (!rounded) throw OutOfVirtualMemory(capacity, "which does not fit 64 bits once rounded up to pages");
    auto range = AddressRange::try_reserve(driver, *rounded, page_size);
    if (range.status().code == StatusCode::unavailable) {
        throw DeviceUnavailable(device_name(driver->capabilities()) +
                                " can't be used in a forked process, or has shut down; start processes by spawn");
    }
    if (!range.ok()) throw OutOfVirtualMemory(*rounded, describe(range.status()));
    return std::move(range.value());
}

}  // namespace

Bytes checked_page_size(Bytes page_size, Bytes granularity) {
    if (page_size == 0) return granularity;
    if (!is_power_of_two(page_size) || page_size % granularity != 0) throw InvalidPageSize(page_size, granularity);
    return page_size;
}

VirtualMemoryPool::VirtualMemoryPool(Bytes capacity, DriverPtr driver, const PoolOptions& options,
                                     std::shared_ptr<Budget> budget)
    : driver_(std::make_shared<MeteredDriver>(std::move(driver))),
      options_(options),
      budget_(std::move(budget)),
      range_(reserve(driver_, capacity, checked_page_size(options.page_size, driver_->capabilities().granularity))),
      table_(checked_page_size(options.page_size, driver_->capabilities().granularity)),
      retiring_(driver_),
      dormant_(table_.page_size()),
      pinned_(options.pinned ? options.pinned : std::make_shared<PinnedBuffers>(driver_)),
      park_limit_(options.park_limit.value_or(driver_->capabilities().kind == DeviceKind::cuda ? default_cuda_park_limit
                                                                                               : Bytes{0})),
      worker_([this] { return work_step(); }) {
    if (!(options.growth_share >= 0.0 && options.growth_share <= 1.0)) {
        throw InvalidArgument("growth_share must be between 0 and 1, not " + std::to_string(options.growth_share));
    }
}

VirtualMemoryPool::~VirtualMemoryPool() {
    if (process_.forked()) {
        worker_.abandon();  // a child has neither the thread nor a right to the parent's memory
        return;
    }
    release_everything();
    std::vector<Bytes> refused;
    table_.for_each_extent({0, capacity()}, [&](const Extent& extent) { refused.push_back(extent.range.begin); });
    for (const Bytes begin : refused) (void)try_give_up(table_.take(begin));
}

void VirtualMemoryPool::close() {
    process_.require_same_process();
    release_everything();
}

void VirtualMemoryPool::require_open() const {
    if (closed_) throw PoolClosed("the pool is closed");
}

ByteRange VirtualMemoryPool::checked_range(Bytes offset, Bytes size) const {
    if (size == 0) throw InvalidSize("size must be at least 1 byte, not 0");
    const auto range = range_of(offset, size);
    if (!range || range->end > capacity()) throw InvalidOffset(offset, size, capacity());
    return *range;
}

Address VirtualMemoryPool::allocate(Bytes offset, Bytes size, const AllocateOptions& options) {
    const ByteRange bytes = checked_range(offset, size);
    claim_with_room({&bytes, 1}, options, [&](const AllocateOptions& given) { return try_claim(offset, size, given); });
    return base_address() + offset;
}

void VirtualMemoryPool::claim_with_room(std::span<const ByteRange> parts, const AllocateOptions& options,
                                        const std::function<Bytes(const AllocateOptions&)>& attempt) {
    const bool may_wait = options.wait != nullptr && budget_;
    if (may_wait && budget_->in_demand()) {
        // Others wait. Memory that nobody holds here is theirs first, or who has just freed would always be served
        // first.
        if (const Bytes wanted = not_held(parts); wanted > 0) return claim_in_line(parts, options, attempt, wanted);
    }
    const Bytes lacking = try_with_room([&](HandOver& handed) {
        AllocateOptions given = options;
        given.hand_over = &handed;
        return attempt(given);
    });
    if (lacking == 0) return;
    if (!may_wait) throw out_of_memory(lacking);
    claim_in_line(parts, options, attempt, lacking);
}

// Reclaiming takes other pools' locks and may wait for the device, so it happens between attempts, without our lock.
Bytes VirtualMemoryPool::try_with_room(const std::function<Bytes(HandOver&)>& attempt) {
    HandOver handed = hand_over();
    Bytes waited_for = 0;
    Bytes last = 0;
    for (int robbed = 0;;) {
        const Bytes lacking = attempt(handed);
        if (lacking == 0) return 0;
        if (handed.give_back() > 0) continue;  // it did not fit where it was wanted, but its room may do
        robbed = lacking == last ? robbed + 1 : 0;
        last = lacking;
        if (robbed < most_robbed && make_room(lacking, false, &handed) > 0) continue;
        // What was idle here may have gone back to make room, and lacks too from then on.
        if (lacking <= waited_for) return lacking;
        // Tried again whatever that frees: the worker or another thread may give memory back meanwhile.
        make_room(lacking, true, &handed);
        if (!handed.room_is_news()) waited_for = lacking;
    }
}

// All that is missing is asked for at once: what a first attempt had charged in part went back when it failed.
void VirtualMemoryPool::claim_in_line(std::span<const ByteRange> parts, AllocateOptions options,
                                      const std::function<Bytes(const AllocateOptions&)>& attempt, Bytes lacking) {
    for (;;) {
        const Bytes wanted = std::max(lacking, missing(parts));
        std::optional<Grant> grant = budget_->wait_for_room(wanted, *options.wait);
        if (!grant) throw out_of_memory(lacking);
        options.grant = &*grant;
        lacking = attempt(options);
        if (lacking == 0) return;
        // Idle pages that were counted on have gone back meanwhile.
        if (lacking > wanted) continue;
        // It is charged, so it is the device that lacks it.
        if (make_room(lacking, true) == 0) throw out_of_memory(lacking);
    }
}

Bytes VirtualMemoryPool::missing(std::span<const ByteRange> parts) const {
    const std::lock_guard lock(mutex_);
    Bytes sum = 0;
    for (const ByteRange& part : parts) sum += table_.missing(table_.pages_of(part));
    return sum;
}

// Bytes of the parts' pages that are missing, or lie on extents of which nothing is in use.
Bytes VirtualMemoryPool::not_held(std::span<const ByteRange> parts) const {
    const std::lock_guard lock(mutex_);
    Bytes sum = 0;
    for (const ByteRange& part : parts) {
        const ByteRange pages = table_.pages_of(part);
        sum += table_.missing(pages);
        table_.for_each_extent(pages, [&](const Extent& extent) {
            if (extent.used == 0) sum += extent.range.clipped_to(pages).size();
        });
    }
    return sum;
}

Bytes VirtualMemoryPool::try_claim(Bytes offset, Bytes size, const AllocateOptions& options) {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    std::unique_lock lock(mutex_);
    require_open();
    clear_unparkable(lock, {&bytes, 1});
    require_awake(bytes);
    return try_allocate({&bytes, 1}, options);
}

Bytes VirtualMemoryPool::try_claim_all(std::span<const ByteRange> parts, const AllocateOptions& options) {
    process_.require_same_process();
    Bytes reached = 0;
    for (const ByteRange& part : parts) {
        checked_range(part.begin, part.size());
        const ByteRange pages = table_.pages_of(part);
        if (pages.begin < reached) {
            throw InvalidArgument("parts to allocate must come in order and share no page, but one begins at " +
                                  std::to_string(part.begin) + ", on the page of the one before or below it");
        }
        reached = pages.end;
    }
    std::unique_lock lock(mutex_);
    require_open();
    clear_unparkable(lock, parts);
    for (const ByteRange& part : parts) require_awake(part);
    return try_allocate(parts, options);
}

Bytes VirtualMemoryPool::make_room(Bytes lacking, bool wait, HandOver* handed) {
    return budget_ ? budget_->make_room(lacking, wait, handed) : reclaim(lacking, wait, any_time, handed);
}

Bytes VirtualMemoryPool::room() const {
    process_.require_same_process();
    MemoryInfo device;
    if (!budget_) (void)driver_->memory_info(device);
    require_open();
    return (budget_ ? budget_->available() : device.free) + table_.parked_hint();
}

OutOfPhysicalMemory VirtualMemoryPool::out_of_memory(Bytes lacking) const {
    MemoryInfo device;
    (void)driver_->memory_info(device);
    if (budget_) budget_->note_refusal();
    Observed(EventKind::out_of_memory, options_.name).done(lacking, physical_memory_usage());
    const Bytes available = budget_ ? std::min(budget_->available(), device.free) : device.free;
    return {lacking, available, budget_ ? budget_->describe_holders() : ""};
}

std::vector<ByteRange> VirtualMemoryPool::extents_within(Bytes offset, Bytes size) const {
    std::vector<ByteRange> found;
    for (const auto& pieces : extents_within({checked_range(offset, size)})) found.push_back(pieces.front());
    return found;
}

std::vector<std::vector<ByteRange>> VirtualMemoryPool::extents_within(const std::vector<ByteRange>& parts) const {
    process_.require_same_process();
    std::vector<std::vector<ByteRange>> found;
    const std::lock_guard lock(mutex_);
    require_open();
    Bytes looked_at = 0;  // extents up to here
    for (auto part = parts.begin(); part != parts.end(); ++part) {
        table_.for_each_extent(*part, [&](const Extent& extent) {
            if (extent.range.begin < looked_at) return;  // an earlier part reaches into it too
            looked_at = extent.range.end;
            std::vector<ByteRange> pieces;
            Bytes at = extent.range.begin;
            bool kept = false;
            for (auto each = part; each != parts.end() && each->begin < extent.range.end && !kept; ++each) {
                pieces.push_back(each->clipped_to(extent.range));
                kept = table_.live().first_overlap({at, pieces.back().begin}).has_value();
                at = pieces.back().end;
            }
            kept = kept || table_.live().first_overlap({at, extent.range.end}).has_value();
            if (!kept) found.push_back(std::move(pieces));
        });
    }
    return found;
}

void VirtualMemoryPool::deallocate(Bytes offset, Bytes size, std::span<const Stream> streams,
                                   std::shared_ptr<ReleaseGate> gate) {
    deallocate_all({checked_range(offset, size)}, streams, std::move(gate));
}

void VirtualMemoryPool::deallocate_all(std::vector<ByteRange> parts, std::span<const Stream> streams,
                                       std::shared_ptr<ReleaseGate> gate) {
    process_.require_same_process();
    for (const ByteRange& part : parts) checked_range(part.begin, part.size());
    std::unique_lock lock(mutex_);
    wait_until_still(lock, parts);
    require_open();
    for (const ByteRange& part : parts) {
        const Bytes gap = first_free(part);
        if (gap != part.end) throw NotMapped(part, gap);
    }
    free_live(parts, streams, std::move(gate));
}

Bytes VirtualMemoryPool::deallocate_within(Bytes offset, Bytes size, std::span<const Stream> streams) {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    std::unique_lock lock(mutex_);
    wait_until_still(lock, {&bytes, 1});
    require_open();
    Bytes freed = 0;
    const auto count = [&](ByteRange part) { freed += part.size(); };
    table_.live().for_each(bytes, count);
    dormant_.live().for_each(bytes, count);
    if (freed > 0) free_live({bytes}, streams, nullptr);
    return freed;
}

// What of `parts` is live, or sleeps. What sleeps needs no fence, and goes last, as that can't fail.
void VirtualMemoryPool::free_live(const std::vector<ByteRange>& parts, std::span<const Stream> streams,
                                  std::shared_ptr<ReleaseGate> gate) {
    std::vector<ByteRange> awake;
    for (const ByteRange& part : parts) table_.live().for_each(part, [&](ByteRange each) { awake.push_back(each); });
    if (!awake.empty()) retire(std::move(awake), streams, std::move(gate));
    for (const ByteRange& part : parts) dormant_.drop(part);
}

void VirtualMemoryPool::prefetch(Bytes offset, Bytes size) {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    const std::lock_guard lock(mutex_);
    require_open();
    require_awake(bytes);
    if (table_.gaps(table_.pages_of(bytes)).empty()) return;
    prefetches_.push_back({table_.pages_of(bytes)});
    if (!worker_.wake()) {
        prefetches_.pop_back();
        ++prefetches_dropped_;
    }
}

void VirtualMemoryPool::map_spare(std::span<const ByteRange> parts) {
    process_.require_same_process();
    for (const ByteRange& part : parts) checked_range(part.begin, part.size());
    const std::lock_guard lock(mutex_);
    require_open();
    for (const ByteRange& part : parts) require_awake(part);
    if (parts.empty() || !worker_.wake()) return;
    for (const ByteRange& part : parts) prefetches_.push_back({table_.pages_of(part), /*spare=*/true});
}

std::vector<Bytes> VirtualMemoryPool::parked_within(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    std::vector<Bytes> found;
    const std::lock_guard lock(mutex_);
    require_open();
    for (const auto& [since, begin] : table_.parked()) {
        if (begin >= bytes.begin && begin < bytes.end) found.push_back(begin);
    }
    std::sort(found.begin(), found.end());
    return found;
}

bool VirtualMemoryPool::is_mapped(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const auto range = range_of(offset, size);
    if (!range || range->empty() || range->end > capacity()) return false;
    const std::lock_guard lock(mutex_);
    require_open();
    return table_.is_used(*range);
}

std::optional<Bytes> VirtualMemoryPool::blocked_until(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const ByteRange bytes = checked_range(offset, size);
    const std::lock_guard lock(mutex_);
    require_open();
    std::optional<Bytes> end;
    for (const std::uint64_t id : table_.batches_in(bytes)) {
        const RetireBatch* const batch = retiring_.find(id);
        if (batch == nullptr || batch->recorded()) continue;
        for (const ByteRange& part : batch->parts) {
            if (part.overlaps(bytes)) end = std::max(end.value_or(0), part.end);
        }
    }
    return end;
}

Bytes VirtualMemoryPool::physical_memory_usage() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    return table_.totals().physical();
}

MemoryStats VirtualMemoryPool::stats() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    const PageTotals& totals = table_.totals();
    MemoryStats stats;
    stats.virtual_capacity = capacity();
    stats.physical_usage = totals.physical();
    stats.page_size = page_size();
    stats.mapped_pages = stats.physical_usage / page_size();
    stats.live = table_.live().total();
    stats.used = totals.used;
    stats.retiring = totals.retiring;
    stats.parked = totals.parked;
    stats.stranded = totals.mapped - totals.used - totals.retiring - totals.parked;
    stats.aliased = totals.aliased;
    stats.spilled = totals.spilled;
    stats.paused = dormant_.bytes();
    stats.backup = dormant_.backed_up();
    if (totals.mapped > 0) {
        stats.fragmentation_ratio = 1.0 - static_cast<double>(stats.live) / static_cast<double>(totals.mapped);
    }
    stats.extents = table_.extent_count();
    stats.peak_physical = peak_physical_;
    stats.peak_used = peak_used_;
    stats.prefetches_done = prefetches_done_;
    stats.prefetches_dropped = prefetches_dropped_;
    stats.reclaims_refused = reclaims_refused_;
    stats.created = driver_->created();
    stats.released = driver_->released();
    stats.received = driver_->received();
    stats.abandoned = driver_->abandoned();
    stats.driver_calls = driver_->table();
    return stats;
}

std::string VirtualMemoryPool::check() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    const std::string wrong = table_.check();
    return wrong.empty() ? dormant_.check() : wrong;
}

}  // namespace elastikv
