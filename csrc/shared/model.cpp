#include "shared/model.h"

#include <algorithm>
#include <set>
#include <utility>

namespace elastikv {

Model::Model(std::string name, Bytes virtual_capacity, const DriverPtr& driver, const PoolOptions& options,
             AccountPtr account)
    : name_(std::move(name)),
      account_(std::move(account)),
      pool_(std::make_shared<VirtualMemoryPool>(virtual_capacity, driver, options, account_)) {
    account_->attach(pool_);
    free_.add({0, pool_->capacity()});
}

void Model::set_quota(const QuotaChange& change) {
    require_registered();
    account_->set_quota(change);
}

QuotaStats Model::quota() const {
    process_.require_same_process();
    return account_->quota();
}

Address Model::allocate(Bytes size, AllocateOptions options) {
    if (size == 0) throw InvalidSize("size must be at least 1 byte, not 0");
    require_registered();
    const Bytes begin = take_addresses(size);
    const ByteRange bytes{begin, begin + size};
    try {
        const Address address = pool_->allocate(begin, size, options);
        const std::lock_guard lock(mutex_);
        if (!registered_) {  // meanwhile, and what was allocated then is not known to unregister()
            pool_->deallocate(begin, size, {});
            throw ModelNotFound(name_, "It was unregistered");
        }
        allocated_.add(bytes);
        return address;
    } catch (...) {
        return_addresses(align_outward(bytes, pool_->page_size()));
        throw;
    }
}

void Model::deallocate(Bytes offset, Bytes size, std::span<const Stream> streams, std::shared_ptr<ReleaseGate> gate) {
    if (size == 0) throw InvalidSize("size must be at least 1 byte, not 0");
    const auto bytes = range_of(offset, size);
    if (!bytes || bytes->end > pool_->capacity()) throw InvalidOffset(offset, size, pool_->capacity());
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    if (!registered_) throw ModelNotFound(name_, "It was unregistered, which freed its allocations");
    const Bytes gap = allocated_.first_gap(*bytes);
    if (gap != bytes->end) throw NotMapped(*bytes, gap);
    pool_->deallocate(offset, size, streams, std::move(gate));
    allocated_.remove(*bytes);
    // An allocation starts on a page of its own, so a page is free once none of its bytes is allocated.
    ByteRange pages = align_outward(*bytes, pool_->page_size());
    if (allocated_.first_overlap({pages.begin, bytes->begin})) pages.begin += pool_->page_size();
    if (pages.begin < pages.end && allocated_.first_overlap({bytes->end, pages.end})) pages.end -= pool_->page_size();
    free_.add(pages);
}

std::unique_ptr<Region> Model::reserve(Bytes size, std::string tag) {
    if (size == 0) throw InvalidSize("a region needs at least 1 byte");
    require_registered();
    const Bytes begin = take_addresses(size);
    const ByteRange pages = align_outward({begin, begin + size}, pool_->page_size());
    const std::lock_guard lock(mutex_);
    regions_.emplace(pages.begin, std::pair(pages, std::move(tag)));
    return std::make_unique<Region>(shared_from_this(), pages);
}

// What is to be paused or woken: regions with a tag, or everything. In order.
std::vector<PausePart> Model::parts_of(const std::vector<std::string>& tags) const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    std::vector<PausePart> parts;
    std::vector<std::string> unknown = tags;
    Bytes reached = 0;
    for (const auto& [begin, region] : regions_) {
        const auto& [range, tag] = region;
        std::erase(unknown, tag);
        if (!tags.empty() && std::find(tags.begin(), tags.end(), tag) == tags.end()) continue;
        if (tags.empty() && reached < begin) parts.push_back({{reached, begin}});
        parts.push_back({range, /*one_owner=*/true});
        reached = range.end;
    }
    if (!unknown.empty()) {
        std::set<std::string> known;
        for (const auto& [begin, region] : regions_) known.insert("'" + region.second + "'");
        std::string list;
        for (const std::string& each : known) list += (list.empty() ? "" : ", ") + each;
        throw InvalidArgument("model '" + name_ + "' has nothing with the tag '" + unknown.front() +
                              "'; its tags are: " + (list.empty() ? "none" : list));
    }
    if (tags.empty() && reached < pool_->capacity()) parts.push_back({{reached, pool_->capacity()}});
    return parts;
}

namespace {

std::vector<ByteRange> ranges_of(const std::vector<PausePart>& parts) {
    std::vector<ByteRange> ranges;
    for (const PausePart& part : parts) ranges.push_back(part.range);
    return ranges;
}

}  // namespace

Bytes Model::pause(Keep keep, const std::vector<std::string>& tags) {
    (void)parts_of(tags);  // a bad tag has no effect
    for (const auto& holder : account_->idle_holders()) {
        if (holder->idle_order() == 0) holder->release_idle(~Bytes{0});  // caches sleep and wake with the rest
    }
    return pool_->pause(parts_of(tags), keep);
}

Bytes Model::resume(const std::vector<std::string>& tags, const WaitOptions* wait) {
    if (tags.empty()) return pool_->resume({{0, pool_->capacity()}}, wait);
    return pool_->resume(ranges_of(parts_of(tags)), wait);
}

Bytes Model::spill(Bytes wanted, const std::vector<std::string>& tags) {
    return pool_->spill(ranges_of(parts_of(tags)), wanted);
}

Bytes Model::unspill(const std::vector<std::string>& tags) { return pool_->unspill(ranges_of(parts_of(tags))); }

void Model::unregister() {
    process_.require_same_process();
    std::vector<ByteRange> parts;
    {
        const std::lock_guard lock(mutex_);
        if (!registered_) return;
        registered_ = false;  // from here on nothing is added or freed by others
        allocated_.for_each({0, pool_->capacity()}, [&](ByteRange part) { parts.push_back(part); });
    }
    try {
        // Nobody says which streams used them, so all of the device's work comes first, and not under the lock.
        if (!parts.empty()) {
            pool_->synchronize();
            pool_->deallocate_all(parts, {});
        }
        pool_->stop_parking();
    } catch (...) {
        const std::lock_guard lock(mutex_);
        registered_ = true;
        throw;
    }
    account_->set_quota(
        {.reserve = 0, .limit = std::nullopt, .priority = std::nullopt});  // nothing is asked of it any more
    const std::lock_guard lock(mutex_);
    for (const ByteRange& part : parts) allocated_.remove(part);
}

bool Model::registered() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    return registered_;
}

void Model::require_registered() const {
    if (!registered()) throw ModelNotFound(name_, "It was unregistered");
}

Bytes Model::take_addresses(Bytes size) {
    const auto rounded = align_up(size, pool_->page_size());
    const std::lock_guard lock(mutex_);
    std::optional<Bytes> place;
    for (Bytes from = 0; rounded;) {
        place = free_.find(*rounded, pool_->page_size(), from);
        if (!place) break;
        // Memory that is released under a gate or in a capture can't change hands yet: go past it.
        const auto blocked = pool_->blocked_until(*place, *rounded);
        if (!blocked) break;
        from = *blocked;
        place.reset();
    }
    if (!place) {
        throw OutOfVirtualMemory(size,
                                 "model '" + name_ + "' has " + format_bytes(free_.total()) + " of its " +
                                     format_bytes(pool_->capacity()) +
                                     " of addresses free, not in one piece of that size; register it with a larger "
                                     "virtual_capacity, addresses cost nothing");
    }
    free_.remove({*place, *place + *rounded});
    return *place;
}

void Model::forget_region(ByteRange pages) {
    try {
        pool_->forget_pause(pages.begin, pages.size());
    } catch (const PoolClosed&) {  // NOLINT(bugprone-empty-catch): of a process that this one was forked from
    }
    const std::lock_guard lock(mutex_);
    regions_.erase(pages.begin);
    free_.add(pages);
}

void Model::return_addresses(ByteRange pages) {
    const std::lock_guard lock(mutex_);
    free_.add(pages);
}

Region::~Region() {
    VirtualMemoryPool& pool = model_->pool();
    try {
        pool.deallocate_within(range_.begin, range_.size(), final_streams_);
    } catch (const PoolClosed&) {
        return;  // everything was given back already, or belongs to the process that forked this one
    } catch (const VmmError&) {
        try {
            // No fence could be recorded, say on a stream that is gone. Nothing is pending once the device has
            // finished.
            pool.synchronize();
            pool.deallocate_within(range_.begin, range_.size(), {});
        } catch (const VmmError&) {
            return;  // the addresses stay taken, so the memory is not handed to anyone
        }
    }
    model_->forget_region(range_);
}

// The same bytes, by their offset in the pool. The neighbours' addresses are not this region's to touch.
ByteRange Region::within(Bytes offset, Bytes size) const {
    const auto part = range_of(offset, size);
    if (!part || part->end > range_.size()) throw InvalidOffset(offset, size, range_.size());
    return {range_.begin + part->begin, range_.begin + part->end};
}

void Region::claim(Bytes offset, Bytes size, AllocateOptions options) {
    model_->require_registered();
    options.grow_end = range_.begin + std::min(options.grow_end, range_.size());
    model_->pool().allocate(within(offset, size).begin, size, options);
}

Bytes Region::try_claim(std::vector<ByteRange> parts, AllocateOptions options) {
    model_->require_registered();
    const auto in_pool = [this](Bytes grow_end) { return range_.begin + std::min(grow_end, range_.size()); };
    options.grow_end = in_pool(options.grow_end);
    std::vector<GrowthBound> bounds;
    for (const GrowthBound& each : options.bounds) bounds.push_back({each.held, in_pool(each.grow_end), each.extents});
    options.bounds = bounds;
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    return model_->pool().try_claim_all(parts, options);
}

void Region::claim_with_room(std::vector<ByteRange> parts, const AllocateOptions& options,
                             const std::function<Bytes(const AllocateOptions&)>& attempt) {
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    model_->pool().claim_with_room(parts, options, attempt);
}

void Region::release(std::vector<ByteRange> parts, std::span<const Stream> streams) {
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    model_->pool().deallocate_all(std::move(parts), streams);
}

void Region::alias(Bytes to, const Region& source, Bytes from, Bytes size, Bytes shared,
                   const AllocateOptions& options) {
    claim_with_room({}, options,
                    [&](const AllocateOptions& given) { return try_alias(to, source, from, size, shared, given); });
}

Bytes Region::try_alias(Bytes to, const Region& source, Bytes from, Bytes size, Bytes shared,
                        const AllocateOptions& options) {
    model_->require_registered();
    if (source.model_ != model_) {
        throw InvalidArgument("memory of model '" + model_->name() + "' can't alias that of model '" +
                              source.model_->name() + "': a model reads no other's bytes");
    }
    return model_->pool().try_alias(within(to, size).begin, source.within(from, size).begin, size, shared, options);
}

void Region::make_writable(Bytes offset, Bytes size, std::span<const Stream> streams) {
    model_->pool().make_writable(within(offset, size).begin, size, streams);
}

Bytes Region::try_make_writable(Bytes offset, Bytes size, std::span<const Stream> streams) {
    return model_->pool().try_make_writable(within(offset, size).begin, size, streams);
}

Bytes Region::spill(std::vector<ByteRange> parts) {
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    return model_->pool().spill(parts);
}

Bytes Region::try_unspill(std::vector<ByteRange> parts, Bytes& moved) {
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    return model_->pool().try_unspill(parts, moved);
}

void Region::map_spare(std::vector<ByteRange> parts) {
    model_->require_registered();
    for (ByteRange& part : parts) part = within(part.begin, part.size());
    model_->pool().map_spare(parts);
}

std::vector<Bytes> Region::parked() const {
    std::vector<Bytes> found = model_->pool().parked_within(range_.begin, range_.size());
    for (Bytes& begin : found) begin -= range_.begin;
    return found;
}

void Region::prefetch(Bytes offset, Bytes size) {
    model_->require_registered();
    model_->pool().prefetch(within(offset, size).begin, size);
}

}  // namespace elastikv
