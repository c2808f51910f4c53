// VirtualMemoryPool: memory in use that moves to the host beneath its addresses, and back.
//
// A device reads and writes host memory that is mapped for it, at the speed of the bus. So what is rarely used can make
// room without being lost to who uses it.
#include <algorithm>
#include <utility>

#include "pool/virtual_memory_pool.h"

namespace elastikv {

Bytes VirtualMemoryPool::spill(const std::vector<ByteRange>& parts, Bytes wanted) {
    process_.require_same_process();
    if (!driver_->capabilities().host_numa) {
        throw DeviceUnavailable(device_name(driver_->capabilities()) +
                                " can't map host memory, so nothing can be spilled; pause() can make room");
    }
    synchronize();
    std::unique_lock lock(mutex_);
    wait_until_still(lock);
    require_open();
    for (const ByteRange& part : parts) clear_unparkable(lock, idle_places_of(checked_range(part.begin, part.size())));
    std::vector<Bytes> chosen;
    for (const ByteRange& part : parts) {
        checked_range(part.begin, part.size());
        require_awake(part);
        table_.for_each_extent(part, [&](const Extent& extent) {
            const bool stays = extent.used == 0 || extent.retiring > 0 || extent.exported || extent.unparkable();
            if (!stays && (chosen.empty() || chosen.back() < extent.range.begin)) chosen.push_back(extent.range.begin);
        });
    }
    Bytes moved = 0;
    for (const Bytes begin : chosen) {
        if (moved >= wanted) break;
        const Bytes size = table_.find(begin)->range.size();
        Bytes freed = 0;
        const Status status = try_retile(begin, freed, /*on_host=*/true);
        if (!status.ok()) throw CudaError(status, "spilling the extent at offset " + std::to_string(begin));
        moved += size;
    }
    return moved;
}

Bytes VirtualMemoryPool::unspill(const std::vector<ByteRange>& parts) {
    process_.require_same_process();
    synchronize();
    Bytes moved = 0;
    const Bytes lacking = try_with_room([&](HandOver&) { return try_unspill(parts, moved); });
    if (lacking > 0) throw out_of_memory(lacking);
    return moved;
}

// Returns the bytes that were lacking for all that is not back yet, 0 where nothing is left.
Bytes VirtualMemoryPool::try_unspill(const std::vector<ByteRange>& parts, Bytes& moved) {
    std::unique_lock lock(mutex_);
    wait_until_still(lock);
    require_open();
    settle_passed();
    std::vector<Bytes> spilled;
    for (const ByteRange& part : parts) {
        checked_range(part.begin, part.size());
        require_awake(part);
        table_.for_each_extent(part, [&](const Extent& extent) {
            if (extent.spilled && extent.used > 0 && extent.retiring == 0) spilled.push_back(extent.range.begin);
        });
    }
    std::sort(spilled.begin(), spilled.end());
    spilled.erase(std::unique(spilled.begin(), spilled.end()), spilled.end());  // some reach into two parts
    Bytes left = 0;
    for (const Bytes begin : spilled) left += table_.find(begin)->used;
    for (const Bytes begin : spilled) {
        const Bytes used = table_.find(begin)->used;
        Bytes freed = 0;
        const Status status = try_retile(begin, freed, /*on_host=*/false);
        if (status.code == StatusCode::out_of_memory && status.call == DriverCall::create) return left;
        if (!status.ok()) throw CudaError(status, "moving the extent at offset " + std::to_string(begin) + " back");
        moved += used;
        left -= used;
    }
    return 0;
}

}  // namespace elastikv
