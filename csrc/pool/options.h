// What one can ask of a pool.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "driver/vmm_driver.h"
#include "pool/pinned_buffers.h"

namespace elastikv {

// `page_size`, or the granularity for 0. Throws InvalidPageSize unless it is a power of two and a multiple of the
// granularity.
Bytes checked_page_size(Bytes page_size, Bytes granularity);

struct PoolOptions {
    Bytes page_size = 0;  // 0: the device's granularity
    // Freed extents up to this many bytes stay mapped for reuse; the oldest beyond it are given back. Not set: 256 MiB
    // on CUDA, where mapping costs tens of microseconds a handle; 0 on the host, where it is cheap and others need the
    // memory.
    std::optional<Bytes> park_limit = std::nullopt;
    // Open-ended growth maps ahead by this share of what the growing thing then holds, so it overshoots by at most as
    // much.
    double growth_share = 0.125;
    // In events and messages; none is needed.
    std::string name{};
    // New extents are zeroed, as the device may hand out what another owner wrote.
    bool scrub_fresh = false;
    // Idle extents from this size on may go to another pool on the same budget as they are, see HandOver. Smaller ones
    // go back to the device: it takes them as fast as they would be mapped again, and the other has fewer handles.
    Bytes handed_over_from = 16 * MiB;
    // For backups of what is paused. Null: the pool has its own.
    std::shared_ptr<PinnedBuffers> pinned = nullptr;
};

class Grant;
class HandOver;
struct WaitOptions;

// What new memory comes in, whole pages.
struct ExtentSizes {
    Bytes largest = 0;  // 0: one extent a gap
    // Towards the end of a gap extents are halves of what is left of it, down to this size; so what is shared up to a
    // place near the end leaves little to copy. 0: they are not.
    Bytes smallest = 0;
    // Whether the owner needs extents of just these sizes. If not, `largest` is a limit, and what others give up may be
    // smaller.
    bool exact = false;
};

// See AllocateOptions.
struct GrowthBound {
    Bytes held = 0;
    Bytes grow_end = 0;
    ExtentSizes extents{};  // where they are not those of the call
};

struct AllocateOptions {
    bool zero = false;  // the bytes read as zeros to work on `stream`
    Stream stream{};    // the first user; work it enqueues from now on runs after scrubbing and after earlier users
    // Growth of unknown extent: may map ahead, up to the offset `grow_end`, by a share of the `held` bytes.
    bool open_ended = false;
    Bytes held = 0;
    Bytes grow_end = 0;
    // Of a call with several parts, for each: takes the place of the two, and of `extents` where it has any. It lives
    // until the call returns.
    std::span<const GrowthBound> bounds{};
    // Memory that may be shared is given extents of a limited size, as an extent is shared whole: see
    // VirtualMemoryPool::alias.
    ExtentSizes extents{};
    // Where memory is short, wait in line for it; null: don't. It lives until the call returns.
    const WaitOptions* wait = nullptr;
    Grant* grant = nullptr;         // paid from before the budget is charged
    HandOver* hand_over = nullptr;  // taken from before new memory is made; told what lacks
};

// What becomes of the content of memory that is paused.
enum class Keep : std::uint8_t {
    on_host,  // in pinned host memory
    nothing,  // it is lost; the memory reads as zeros or as what the same pool wrote to it
};

// A part of a pool to be paused, whole pages.
struct PausePart {
    ByteRange range;
    bool one_owner = false;  // what lies side by side in it may come back on one extent
};

// Held by a scheduler that may still launch work on released memory. Fences are recorded only once it is open.
// Thread safe. Opening is final.
class ReleaseGate {
  public:
    void open() noexcept { open_.store(true, std::memory_order_release); }
    bool is_open() const noexcept { return open_.load(std::memory_order_acquire); }

  private:
    std::atomic<bool> open_{false};
};

}  // namespace elastikv
