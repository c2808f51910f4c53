// What a client of a budget is promised, what it may hold at most, and who goes first.
#pragma once

#include <optional>

#include "base/units.h"

namespace elastikv {

inline constexpr Bytes no_ceiling = ~Bytes{0};

// `reserve` bytes are the client's whenever it asks: nobody else can charge into the part of it that is not in use.
struct Quota {
    Bytes reserve = 0;
    Bytes limit = no_ceiling;  // of its charges; beyond the physical limit it says nothing
    int priority = 0;          // higher ones are served first, and may press lower ones for memory
};

// What is not set stays as it is.
struct QuotaChange {
    std::optional<Bytes> reserve;
    std::optional<Bytes> limit;
    std::optional<int> priority;
};

// A client's quota and how it fares, in bytes unless it says otherwise.
struct QuotaStats {
    Bytes reserve = 0;
    Bytes limit = 0;  // the physical limit where it has no ceiling of its own
    int priority = 0;
    Bytes charged = 0;
    Bytes overage = 0;           // charged above the limit, as that was lowered; goes as memory is freed
    Bytes waiting = 0;           // what its waiters ask for
    std::uint64_t waiters = 0;   // number
    std::uint64_t grants = 0;    // waits that were served
    std::uint64_t refusals = 0;  // requests that failed for want of physical memory
};

}  // namespace elastikv
