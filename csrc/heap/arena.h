// The books of the heap: blocks in segments, segments in bins, bins in arenas. Bookkeeping only.
#pragma once

#include <memory>
#include <set>
#include <vector>

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
    std::vector<Stream> users{};     // streams beside the segment's own
    std::vector<FencePtr> fences{};  // behind the work of those among them that have one yet
    Note note{};

    bool is_free() const { return state == BlockState::free; }
    bool present() const { return state != BlockState::absent; }
};

struct BySize {
    bool operator()(const Block* a, const Block* b) const {
        return a->size != b->size ? a->size < b->size : a->address < b->address;
    }
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
    std::set<Block*, BySize> free{};
    std::set<Block*, BySize> absent{};
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
