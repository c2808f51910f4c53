// Heap: blocks and segments, and what they sum to.
#include <algorithm>
#include <utility>

#include "heap/heap.h"

namespace elastikv {
namespace {

bool present(const Block* block) { return block != nullptr && block->state != BlockState::absent; }
bool absent(const Block* block) { return block != nullptr && block->state == BlockState::absent; }
bool is_free(const Block* block) { return block != nullptr && block->state == BlockState::free; }

}  // namespace

Block* Heap::new_block(Address address, Bytes size, Segment* segment) {
    if (spare_blocks_.empty()) {
        blocks_.emplace_back();
        spare_blocks_.push_back(&blocks_.back());
    }
    Block* const block = spare_blocks_.back();
    spare_blocks_.pop_back();
    block->address = address;
    block->size = size;
    block->requested = 0;
    block->segment = segment;
    block->prev = block->next = nullptr;
    block->state = BlockState::free;
    return block;
}

// A free part of contiguous memory that is not free as a whole counts as split. The neighbours must be in the state in
// which the block was counted before: what changes them takes the block out first.
void Heap::count_split(const Block& block, bool more) {
    if (!present(block.prev) && !present(block.next)) return;
    const bool large = block.segment->bin->large;
    if (more) {
        stats_.inactive_split.increase(large, 1);
        stats_.inactive_split_bytes.increase(large, block.size);
    } else {
        stats_.inactive_split.decrease(large, 1);
        stats_.inactive_split_bytes.decrease(large, block.size);
    }
}

void Heap::insert_free(Block* block) {
    block->segment->bin->free.insert(block);
    count_split(*block, true);
}

void Heap::remove_free(Block* block) {
    count_split(*block, false);
    block->segment->bin->free.erase(block);
}

bool Heap::should_split(const Block& block, Bytes size) const {
    const Bytes rest = block.size - size;
    const Bin& bin = *block.segment->bin;
    if (bin.arena->no_split) return false;
    if (!bin.large || block.segment->elastic) return rest >= heap_unit;
    return size < options_.max_split_size && rest > small_request;
}

// Cuts the block to `size` and returns the rest, which is in no index yet.
Block* Heap::split(Block* block, Bytes size) {
    Block* const rest = new_block(block->address + size, block->size - size, block->segment);
    rest->state = block->state;
    rest->prev = block;
    rest->next = block->next;
    if (rest->next != nullptr) rest->next->prev = rest;
    block->next = rest;
    block->size = size;
    return rest;
}

// `left` swallows its neighbour; neither is in an index.
Block* Heap::join(Block* left, Block* right) {
    left->size += right->size;
    left->next = right->next;
    if (left->next != nullptr) left->next->prev = left;
    spare_blocks_.push_back(right);
    return left;
}

// A block that became free, with the free ones beside it; it is in no index before or after.
Block* Heap::coalesce(Block* block) {
    if (is_free(block->prev)) {
        remove_free(block->prev);
        block = join(block->prev, block);
    }
    if (is_free(block->next)) {
        remove_free(block->next);
        join(block, block->next);
    }
    return block;
}

void Heap::count_reserved(const Segment& segment, Bytes size, bool more) {
    if (more) {
        stats_.reserved_bytes.increase(segment.bin->large, size);
        ++stats_.device_allocs;
    } else {
        stats_.reserved_bytes.decrease(segment.bin->large, size);
        ++stats_.device_frees;
    }
}

// An absent block, in no index, has memory now. Contiguous memory counts as one segment.
void Heap::make_present(Block* block) {
    Segment& segment = *block->segment;
    Block* const before = is_free(block->prev) ? block->prev : nullptr;
    Block* const behind = is_free(block->next) ? block->next : nullptr;
    if (before != nullptr) remove_free(before);
    if (behind != nullptr) remove_free(behind);
    if (present(block->prev) && present(block->next)) {
        stats_.segment.decrease(segment.bin->large, 1);
    } else if (!present(block->prev) && !present(block->next)) {
        stats_.segment.increase(segment.bin->large, 1);
    }
    segment.resident += block->size;
    count_reserved(segment, block->size, true);
    block->state = BlockState::free;
    if (before != nullptr) block = join(before, block);
    if (behind != nullptr) block = join(block, behind);
    insert_free(block);
}

// A part of a free block has none any more.
void Heap::make_absent(Block* block, ByteRange part) {
    Segment& segment = *block->segment;
    BlockIndex& holes = segment.bin->absent;
    remove_free(block);
    Block* const before = part.begin > block->address ? block : nullptr;
    Block* gone = before != nullptr ? split(block, part.begin - block->address) : block;
    Block* const behind = part.size() < gone->size ? split(gone, part.size()) : nullptr;
    gone->state = BlockState::absent;
    if (present(gone->prev) && present(gone->next)) {
        stats_.segment.increase(segment.bin->large, 1);
    } else if (!present(gone->prev) && !present(gone->next)) {
        stats_.segment.decrease(segment.bin->large, 1);
    }
    segment.resident -= part.size();
    count_reserved(segment, part.size(), false);
    if (before != nullptr) insert_free(before);
    if (behind != nullptr) insert_free(behind);
    if (absent(gone->prev)) {
        holes.erase(gone->prev);
        gone = join(gone->prev, gone);
    }
    if (absent(gone->next)) {
        holes.erase(gone->next);
        join(gone, gone->next);
    }
    holes.insert(gone);
}

void Heap::insert_segment(Bin& bin, Address address, Bytes size, const HeapRequest& request) {
    auto made = std::make_unique<Segment>();
    Segment& segment = *made;
    segment.address = address;
    segment.size = size;
    segment.resident = size;
    segment.bin = &bin;
    segment.source = bin.arena->source;
    segment.note = request.note;
    segment.first = new_block(address, size, &segment);
    bin.segments.push_back(std::move(made));
    insert_free(segment.first);
    stats_.segment.increase(bin.large, 1);
    count_reserved(segment, size, true);
    notify(HeapAction::segment_alloc, address, size, segment, request.note);
}

// One that is free as a whole; its memory is the caller's to give back.
void Heap::remove_segment(Segment* segment) {
    Bin& bin = *segment->bin;
    remove_free(segment->first);
    spare_blocks_.push_back(segment->first);
    stats_.segment.decrease(bin.large, 1);
    count_reserved(*segment, segment->size, false);
    std::erase_if(bin.segments, [segment](const auto& each) { return each.get() == segment; });
}

}  // namespace elastikv
