// Blocks of any size on ranges of a pool that grow.
//
// Requests are rounded to 512 bytes and cut from the smallest free block that holds them, which is split; freed
// neighbours coalesce. Each stream has ranges of its own, small requests apart from large ones, so that a block freed
// on a stream is handed out again there at once, in the stream's order, without waiting. A block that other streams
// used (record_stream) is free once fences behind their work have passed.
//
// The common arena's ranges are elastic: pages are mapped where a block needs them and, once idle, given back whole
// extents at a time: to other ranges when these grow, to other clients of the budget when they are short, by
// empty_cache() to the device. Other arenas are made of segments of fixed size, like torch's private pools, whose
// addresses stay theirs while a graph may replay into them.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "heap/arena.h"
#include "heap/block_table.h"
#include "heap/types.h"
#include "pool/virtual_memory_pool.h"

namespace elastikv {

struct HeapOptions {
    // Free blocks larger than this are neither split nor given to requests that are smaller than it.
    Bytes max_split_size = ~Bytes{0};
    // Large ranges grow ahead of need by this share of what the heap holds, or by more while that is little beside the
    // room that is left; 0: not at all. Beyond the most that was ever in use at once, and as much again as ahead of it,
    // they grow by what lies idle elsewhere before new extents are made.
    double idle_share = 0.01;
    // Growth is cut into extents of at most this size, rounded up to pages; 0: of one percent of the room that is left,
    // or 8 MiB. An extent goes back as a whole, so one block left in it holds all of it, while the driver's cost goes
    // by the extent: small ones hold less idle memory and cost more time while the heap grows.
    Bytes largest_extent = 0;
    // Bytes that the heap may hold; beyond them it is out of memory.
    Bytes limit = ~Bytes{0};
};

// Thread safe: one mutex guards all state. It is held while drawing on the pool, never while making room in the budget,
// calling a segment source, or waiting; but for the rare waits for the whole device, when segments of other arenas go
// back. Lock order: this, pool, driver.
class Heap final : public IdleHolder {
  public:
    // Draws on `pool` beneath `window`: whole pages, by offset, that nobody else uses. To give way to the pool's budget
    // too, it is to be made known there (Budget::add_idle_holder).
    Heap(std::shared_ptr<VirtualMemoryPool> pool, ByteRange window, HeapOptions options = {});
    // Gives everything back once the device has finished with it.
    ~Heap() override;
    Heap(const Heap&) = delete;
    Heap& operator=(const Heap&) = delete;

    // Throws InvalidSize (0 bytes, or sizes beyond the window), OutOfPhysicalMemory, OutOfVirtualMemory, CudaError,
    // MappingFailed, PoolClosed. State changes only on success, but for idle memory that was given back.
    Address allocate(const HeapRequest& request);
    // What the arena has at hand, without drawing on the pool; 0 if it has nothing.
    Address try_allocate_cached(const HeapRequest& request);
    // False if no block of this heap starts there.
    bool free(Address address, const Note& note = {}) noexcept;
    // `stream` uses the block too: once freed it is reused only after the work that was put on it before then.
    bool record_stream(Address address, Stream stream);

    // The block that starts there.
    std::optional<BlockView> find(Address address) const;
    // The contiguous memory around a block, as {address, size}.
    std::optional<std::pair<Address, Bytes>> base_of(Address address) const;
    // The pages that an address of the pool's own memory lies in, for handing them to another process; null for a
    // segment from elsewhere, whose source is then in `source`.
    std::optional<ByteRange> pages_of(Address address, std::shared_ptr<SegmentSource>* source = nullptr) const;

    // Arenas are counted: made at the first use, and given back by empty_cache() or under pressure after the last.
    // `source` counts at the first use only; null: segments come from the pool.
    void use_arena(ArenaId arena, std::shared_ptr<SegmentSource> source = nullptr);
    // Throws InvalidArgument for an arena that is not in use.
    void release_arena(ArenaId arena);
    int arena_use_count(ArenaId arena) const;
    // The arena's free memory serves requests of the common arena before these run out of memory.
    void set_use_on_oom(ArenaId arena, bool use);
    // The arena's segments are made to measure and never split.
    void set_no_split(ArenaId arena);

    // How the arena's blocks lie, and back to it: restore() frees every block of the arena that is handed out, then
    // hands out those of `state` at their addresses. Both throw InvalidArgument, changing nothing, for an unknown arena
    // or blocks that other streams may still use; restore() also where the arena no longer has the segments.
    ArenaState checkpoint(ArenaId arena);
    RestoreResult restore(const ArenaState& state, const Note& note = {});

    // Gives all idle memory back to the device, after waiting for the work that used it; of the common arena and of
    // those no longer in use, or of one arena. Returns the bytes.
    Bytes empty_cache(ArenaId arena = {}, const Note& note = {});
    // Gives idle memory back to the pool, at least `wanted` bytes if there are as many, without waiting.
    Bytes release_idle(Bytes wanted) override;

    HeapStats stats() const;
    void reset_peak_stats();
    void reset_accumulated_stats();
    Bytes largest_free() const;
    // All of it, or one arena's.
    std::vector<SegmentView> snapshot(std::optional<ArenaId> arena = std::nullopt) const;

    void set_options(const HeapOptions& options);
    HeapOptions options() const;
    // Replaces the observer; null for none. It must outlive the heap or its replacement.
    void set_observer(HeapObserver* observer);
    // By this, null for none, blocks of other arenas than the common one are reused within the graph that all of their
    // streams record: once the streams have joined, and not only when the capture has ended. It must outlive the heap
    // or its replacement.
    void set_capture_order(CaptureOrder* order);
    // Told of pages, by their offsets in the pool, before they go back to it; under the heap's lock, so it must neither
    // call the heap nor wait for anything. To be set before the heap is shared between threads.
    void set_before_release(std::function<void(ByteRange)> told) { before_release_ = std::move(told); }

    VirtualMemoryPool& pool() { return *pool_; }
    const std::shared_ptr<VirtualMemoryPool>& shared_pool() const { return pool_; }
    // What is wrong with the books, empty if nothing; for tests.
    std::string check() const;

  private:
    using Lock = std::unique_lock<std::mutex>;
    // Memory from elsewhere, to be given back without the lock.
    struct Returned {
        std::shared_ptr<SegmentSource> source;
        Address address;
        Bytes size;
        Stream stream;
    };

    // Where a request of an elastic bin will go: `pages` of an absent block are to be mapped, at its front or its back.
    struct Hole {
        Block* block = nullptr;
        Bytes pages = 0;
        bool at_back = false;
    };

    // heap.cpp
    Block* take(Arena& arena, const HeapRequest& request);
    Address hand_out(Block* block, const HeapRequest& request);
    void count_handed_out(Block* block, Bytes requested, const Note& note);
    void count_freed(const Block& block, const Note& note);
    void free_block(Block* block);
    void retire(Block* block);
    bool try_fence(Block& block, Stream stream);
    void settle_recorded(const Bin& bin);
    void settle_passed(bool all);
    void wait_for_streams(Lock& lock);
    Arena& arena_for(ArenaId id);
    Arena* find_arena(ArenaId id) const;

    // blocks.cpp
    Block* new_block(Address address, Bytes size, Segment* segment);
    void insert_free(Block* block);
    void remove_free(Block* block);
    bool should_split(const Block& block, Bytes size) const;
    Block* split(Block* block, Bytes size);
    Block* join(Block* left, Block* right);
    Block* coalesce(Block* block);
    void make_present(Block* absent);
    void make_absent(Block* block, ByteRange part);
    void count_split(const Block& block, bool more);
    void count_reserved(const Segment& segment, Bytes size, bool more);
    void insert_segment(Bin& bin, Address address, Bytes size, const HeapRequest& request);
    void remove_segment(Segment* segment);

    // arenas.cpp
    Arena& settled_arena(ArenaId id);

    // growth.cpp
    Address allocate_slowly(Lock& lock, const HeapRequest& request);
    // Both return the bytes that were lacking, 0 where the bin now has a free block of the size.
    Bytes try_grow(Bin& bin, const HeapRequest& request, HandOver& handed);
    Bytes try_add_segment(Lock& lock, const HeapRequest& request, HandOver& handed);
    Bytes over_limit(Bytes more) const;
    Bytes room() const;
    Bytes largest_extent() const;
    Bytes ahead_of(Bytes held) const;
    Hole best_hole(const Bin& bin, Bytes size) const;
    Bytes grown(Hole hole, Bytes pages) const;
    Bytes begin_of(const Hole& hole) const;
    void fill(Bin& bin, const Hole& hole, const Note& note);
    Hole add_range(Bin& bin, Bytes size);
    OutOfVirtualMemory out_of_addresses(Bytes size);
    void drop_empty_ranges();
    Block* take_from_others(const HeapRequest& request);
    Bytes take_addresses(Bytes size);

    // relocation.cpp
    bool relocate(Bin& bin, Hole hole, Bytes owed, const Note& note);
    void pay(const Hole& hole, Bytes owed, HandOver& handed, const Note& note);

    // reclaim.cpp
    // Idle extents of elastic ranges, but for those in the blocks beside `spared`.
    Bytes release_extents(Bytes wanted, const Block* spared, const Note& note);
    // All idle extents, also those that several idle blocks share; for when the heap is asked, not when it grows.
    Bytes release_shared_extents(Bytes wanted, const Note& note);
    std::vector<Block*> idle_blocks(const Block* spared) const;
    ByteRange whole_pages(const Block& block) const;
    Bytes release_segments(Arena& arena, Bytes wanted, std::vector<Returned>& returned, const Note& note);
    Bytes release_all_idle(Bytes wanted, std::vector<Returned>& returned, const Note& note);
    Bytes round_to_page(Bytes offset) const;
    std::vector<Stream> with_other_streams(const std::vector<Stream>& owners) const;
    void give_to_pool(const std::vector<ByteRange>& parts, std::span<const Stream> streams);
    static void give_back(std::vector<Returned>& returned) noexcept;

    void notify(HeapAction action, Address address, Bytes size, const Segment& segment, const Note& note);
    Bytes offset_of(Address address) const { return address - pool_->base_address(); }

    const std::shared_ptr<VirtualMemoryPool> pool_;
    const ByteRange window_;
    const ProcessGuard process_;
    std::function<void(ByteRange)> before_release_;

    mutable std::mutex mutex_;  // guards everything below
    HeapOptions options_;
    HeapObserver* observer_ = nullptr;
    CaptureOrder* capture_order_ = nullptr;
    IntervalSet addresses_;  // free ones of the window
    std::map<ArenaId, std::unique_ptr<Arena>> arenas_;
    Arena* common_ = nullptr;
    BlockTable handed_out_;
    std::deque<Block> blocks_;
    std::vector<Block*> spare_blocks_;
    std::vector<Block*> retiring_;  // freed while other streams may use them
    HeapStats stats_;
    Bytes highest_load_ = 0;  // the most that was in use at once when the heap grew
};

}  // namespace elastikv
