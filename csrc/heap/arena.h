// The books of the heap: blocks in segments, segments in bins, bins in arenas. Bookkeeping only.
#pragma once

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "heap/capture_order.h"
#include "heap/types.h"
#include "vmm/recorded_fence.h"

namespace elastikv {

struct Segment;
struct Bin;

enum class BlockState : std::uint8_t {
    free,
    allocated,
    retiring,  // freed, and other streams may still use it
    absent,    // addresses of an elastic range without memory
};

// A part of a segment. The blocks of a segment cover it without a gap, in order of address.
struct Block {
    Address address = 0;
    Bytes size = 0;
    Bytes requested = 0;
    Segment* segment = nullptr;
    Block* prev = nullptr;
    Block* next = nullptr;
    BlockState state = BlockState::free;
    std::vector<Stream> users{};         // streams beside the segment's own
    std::vector<FencePtr> fences{};      // behind the work of those among them that have one yet
    std::uint64_t capture = 0;           // the graph that its stream recorded when it was handed out, if that is known
    std::vector<CapturePoint> points{};  // where users that recorded that graph were when it was freed
    Note note{};

    bool is_free() const { return state == BlockState::free; }
    bool present() const { return state != BlockState::absent; }
};

// Blocks by size, and by address where these are equal. Nearly every request takes one out and puts another in, so the
// node of the last that left is kept for the next that comes.
class BlockIndex {
  public:
    void insert(Block* block) {
        if (spare_.empty()) {
            blocks_.insert(block);
        } else {
            spare_.value() = block;
            blocks_.insert(std::move(spare_));
        }
    }
    void erase(Block* block) { spare_ = blocks_.extract(block); }
    bool contains(Block* block) const { return blocks_.contains(block); }
    // The smallest that has at least so many bytes; null if none has.
    Block* best_fit(Bytes size) const {
        const auto found = blocks_.lower_bound(size);
        return found == blocks_.end() ? nullptr : *found;
    }
    bool empty() const { return blocks_.empty(); }
    std::size_t size() const { return blocks_.size(); }
    auto begin() const { return blocks_.begin(); }
    auto end() const { return blocks_.end(); }
    // The largest first.
    auto rbegin() const { return blocks_.rbegin(); }
    auto rend() const { return blocks_.rend(); }

  private:
    struct BySize {
        using is_transparent = void;
        bool operator()(const Block* a, const Block* b) const {
            return a->size != b->size ? a->size < b->size : a->address < b->address;
        }
        bool operator()(const Block* block, Bytes size) const { return block->size < size; }
        bool operator()(Bytes size, const Block* block) const { return size < block->size; }
    };

    std::set<Block*, BySize> blocks_;
    decltype(blocks_)::node_type spare_;
};

// Contiguous addresses of one bin: all of it has memory, or, for an elastic range, the blocks that are not absent.
struct Segment {
    Address address = 0;
    Bytes size = 0;
    Bytes resident = 0;
    bool elastic = false;
    Bin* bin = nullptr;
    Block* first = nullptr;
    std::shared_ptr<SegmentSource> source{};  // null: the pool
    Note note{};
};

struct Arena;

// One stream's memory of one kind in one arena.
struct Bin {
    Arena* arena = nullptr;
    Stream stream{};
    bool large = false;
    BlockIndex free{};
    BlockIndex absent{};
    std::vector<std::unique_ptr<Segment>> segments{};
};

struct Arena {
    ArenaId id{};
    int use_count = 0;
    bool use_on_oom = false;
    bool no_split = false;
    std::shared_ptr<SegmentSource> source{};
    std::vector<std::unique_ptr<Bin>> bins{};

    bool elastic() const { return id.common(); }
    Bin& bin(Stream stream, bool large) {
        for (const auto& bin : bins) {
            if (bin->stream == stream && bin->large == large) return *bin;
        }
        bins.push_back(std::make_unique<Bin>());
        bins.back()->arena = this;
        bins.back()->stream = stream;
        bins.back()->large = large;
        return *bins.back();
    }
};

}  // namespace elastikv
