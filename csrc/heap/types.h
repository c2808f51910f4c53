// The words of the heap that its users share: arenas, requests, events, views, statistics.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "driver/vmm_driver.h"

namespace elastikv {

// Every size is rounded up to a multiple of this, and every address is one.
inline constexpr Bytes heap_unit = 512;
// Requests up to this size live in ranges of their own, so that they don't pin large ones.
inline constexpr Bytes small_request = 1 * MiB;

// Segments of fixed size, as torch's private pools have them: for small requests, for those below `made_to_measure`,
// and beyond that as large as asked, in multiples of small_buffer.
inline constexpr Bytes small_buffer = 2 * MiB;
inline constexpr Bytes large_buffer = 20 * MiB;
inline constexpr Bytes made_to_measure = 10 * MiB;

// Which memory a request is cut from. {0, 0} is the common arena; others belong to CUDA graphs or memory pools.
struct ArenaId {
    std::uint64_t first = 0;
    std::uint64_t second = 0;
    friend constexpr bool operator==(const ArenaId&, const ArenaId&) = default;
    friend constexpr auto operator<=>(const ArenaId&, const ArenaId&) = default;  // NOLINT(modernize-use-nullptr)
    constexpr bool common() const { return first == 0 && second == 0; }
};

// What a user of the heap wants to remember of a block, a segment or an event: the heap only keeps it alive.
using Note = std::shared_ptr<void>;

struct HeapRequest {
    Bytes requested = 0;  // as asked for; the heap rounds it
    Bytes size = 0;       // at least `requested`, for a caller that rounds in its own way; 0: requested
    Stream stream{};      // the first user; memory freed on it is reused without waiting
    ArenaId arena{};
    Note note{};
};

// Memory from elsewhere for the segments of an arena. Thread safe; called with no lock of the heap's held.
class SegmentSource {
  public:
    virtual ~SegmentSource() = default;
    // 0 where there is none.
    virtual Address try_allocate(Bytes size, Stream stream) = 0;
    virtual void free(Address address, Bytes size, Stream stream) noexcept = 0;
};

enum class HeapAction : std::uint8_t {
    alloc,
    free_requested,
    free_completed,  // later than requested where other streams used the block
    segment_alloc,
    segment_free,
    segment_map,
    segment_unmap,
};

struct HeapEvent {
    HeapAction action;
    Address address;
    Bytes size;
    Stream stream;
    ArenaId arena;
    Note note;
};

// Told of every event, in order, under the heap's lock: it must neither call the heap nor wait for anything.
class HeapObserver {
  public:
    virtual ~HeapObserver() = default;
    virtual void on_event(const HeapEvent& event) noexcept = 0;
};

struct BlockView {
    Address address = 0;
    Bytes size = 0;
    Bytes requested = 0;
    bool allocated = false;  // handed out
    bool active = false;     // handed out, or freed while other streams may still use it
    Note note{};
};

// One piece of contiguous memory.
struct SegmentView {
    Address address = 0;
    Bytes size = 0;
    Stream stream{};
    bool large = false;
    bool elastic = false;  // a part of a growing range
    ArenaId arena{};
    Note note{};
    std::vector<BlockView> blocks;
};

// A quantity over time, as torch counts them.
struct Stat {
    std::int64_t current = 0;
    std::int64_t peak = 0;
    std::int64_t allocated = 0;  // the sum of all increases
    std::int64_t freed = 0;

    void increase(std::int64_t amount) {
        current += amount;
        if (current > peak) peak = current;
        allocated += amount;
    }
    void decrease(std::int64_t amount) {
        current -= amount;
        freed += amount;
    }
};

// All requests, those of small ranges, those of large ranges.
struct StatTriple {
    std::array<Stat, 3> of{};
    void increase(bool large, Bytes amount) {
        of[0].increase(static_cast<std::int64_t>(amount));
        of[large ? 2 : 1].increase(static_cast<std::int64_t>(amount));
    }
    void decrease(bool large, Bytes amount) {
        of[0].decrease(static_cast<std::int64_t>(amount));
        of[large ? 2 : 1].decrease(static_cast<std::int64_t>(amount));
    }
};

// Counts and bytes. active = allocated, or freed and awaiting another stream; inactive_split = free parts of segments
// that are not free as a whole.
struct HeapStats {
    StatTriple allocation, segment, active, inactive_split;
    StatTriple allocated_bytes, reserved_bytes, active_bytes, inactive_split_bytes, requested_bytes;
    std::int64_t retries = 0;  // requests that did not fit until idle memory was given back
    std::int64_t out_of_memory = 0;
    std::int64_t waits = 0;          // times that the heap waited for other streams
    std::int64_t device_allocs = 0;  // times that memory was drawn
    std::int64_t device_frees = 0;

    template <typename Visit>
    void for_each(Visit visit) {
        for (StatTriple* triple : {&allocation, &segment, &active, &inactive_split, &allocated_bytes, &reserved_bytes,
                                   &active_bytes, &inactive_split_bytes, &requested_bytes}) {
            visit(*triple);
        }
    }
};

// How an arena's blocks lay at a moment, to be put back that way: for graphs that are captured one after another in one
// arena.
struct ArenaState {
    struct BlockState {
        Address address;
        Bytes size;
        Bytes requested;
        bool allocated;
    };
    struct SegmentState {
        Stream stream;
        bool large;
        std::vector<BlockState> blocks;
    };
    ArenaId arena{};
    std::vector<SegmentState> segments;
};

struct RestoreResult {
    std::vector<Address> freed;
    std::vector<Address> allocated;
};

}  // namespace elastikv
