// VirtualMemoryPool: extents that an owner has idle in one place and wants in another.
//
// An extent is mapped at its new addresses at once, and unmapped from the old ones once the work there has passed: in
// between it is one extent at two places, as aliases are (aliasing.cpp), charged once. So the owner's stream goes on
// without a wait, no memory is made, and none is held twice.
#include <algorithm>
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

// The owner has all of it, and nobody else holds on to where it lies.
bool VirtualMemoryPool::is_movable(const Extent& extent) const {
    return !extent.exported && !extent.waking && !extent.unparkable() && !dormant_.sleeps(extent.range) &&
           table_.live().first_gap(extent.range) == extent.range.end;
}

std::vector<ByteRange> VirtualMemoryPool::movable_within(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const ByteRange part = checked_range(offset, size);
    std::vector<ByteRange> found;
    const std::lock_guard lock(mutex_);
    require_open();
    table_.for_each_extent(part, [&](const Extent& extent) {
        if (part.contains(extent.range) && is_movable(extent)) found.push_back(extent.range);
    });
    return found;
}

bool VirtualMemoryPool::try_relocate(std::span<const ByteRange> extents, Bytes to, Stream stream,
                                     std::span<const Stream> users) {
    process_.require_same_process();
    Bytes total = 0;
    for (const ByteRange& each : extents) total += checked_range(each.begin, each.size()).size();
    const ByteRange target = checked_range(to, total);
    const std::lock_guard lock(mutex_);
    require_open();
    require_awake(target);
    if (moving_) return false;
    settle_passed();
    std::vector<Extent*> sources;
    for (const ByteRange& each : extents) {
        Extent* const source = table_.find(each.begin);
        if (source == nullptr || !(source->range == each) || !is_movable(*source)) return false;
        sources.push_back(source);
    }
    if (const auto held = table_.live().first_overlap(target)) throw AlreadyMapped(target, *held);
    if (!try_vacate(target)) return false;
    auto prepared = retiring_.try_prepare({extents.begin(), extents.end()}, users, nullptr);
    if (!prepared.ok()) return false;

    std::vector<Extent> moved;
    try {
        Bytes at = to;
        for (Extent* const source : sources) {
            map_alias(*source, at - source->range.begin, stream, moved);
            moved.back().fixed = source->fixed;
            at += source->range.size();
        }
    } catch (const MappingFailed&) {
        for (Extent& extent : moved) discard(std::move(extent));
        return false;
    }
    for (Extent& extent : moved) {
        if (extent.zeroing) scrubbing_.emplace_back(extent.range.begin, extent.zeroing);
        table_.insert(std::move(extent));
    }
    table_.claim(target);
    retire(std::move(prepared.value()));
    return true;
}

bool VirtualMemoryPool::is_leaving(Bytes offset, Bytes size) const {
    process_.require_same_process();
    const ByteRange part = checked_range(offset, size);
    bool found = false;
    const std::lock_guard lock(mutex_);
    if (table_.totals().aliased == 0) return false;
    table_.for_each_extent(part, [&](const Extent& extent) { found = found || extent.shared(); });
    return found;
}

}  // namespace elastikv
