// What a pool tells of itself. Every field is kept up to date, so a reading costs the same at any size.
#pragma once

#include "driver/metered_driver.h"

namespace elastikv {

// Bytes, unless it says otherwise. physical_usage + aliased + spilled = used + retiring + parked + stranded, at any
// moment: these four count addresses, so that memory which is mapped at two places counts twice.
struct MemoryStats {
    Bytes virtual_capacity = 0;
    Bytes physical_usage = 0;        // bytes of live extents; what the budget is charged
    std::uint64_t mapped_pages = 0;  // physical_usage / page_size
    // The share of mapped bytes that no live allocation uses, 0 to 1; 0 where nothing is mapped.
    double fragmentation_ratio = 0;

    Bytes page_size = 0;
    Bytes live = 0;      // what callers asked for and have not freed, to the byte
    Bytes used = 0;      // pages with a live byte
    Bytes retiring = 0;  // pages released, while device work may still touch them
    Bytes parked = 0;    // whole extents mapped and idle: reused without a driver call, given back under pressure
    Bytes stranded = 0;  // idle pages of extents that others keep in use
    Bytes aliased = 0;   // mapped at a further place: costs no physical memory
    Bytes spilled = 0;   // in host memory beneath device addresses: costs no physical memory of the device
    Bytes paused = 0;    // not mapped: what resume() makes again
    Bytes backup = 0;    // pinned host memory that holds the content of what is paused
    std::uint64_t extents = 0;
    Bytes peak_physical = 0;
    Bytes peak_used = 0;
    std::uint64_t prefetches_done = 0;
    std::uint64_t prefetches_dropped = 0;  // memory was short, or the driver refused
    std::uint64_t reclaims_refused = 0;  // the driver would not take an extent back; it stays parked and is tried again
    Bytes created = 0;                   // ever taken from the device, or from others on the same budget
    Bytes released = 0;                  // ever given back to it, or to them
    Bytes received = 0;                  // of `created`, what others handed over as it was
    Bytes abandoned = 0;                 // what was lost to such refusals when its owner died
    DriverCallTable driver_calls{};
};

}  // namespace elastikv
