// Heap: giving memory back.
#include <algorithm>
#include <array>
#include <utility>

#include "heap/heap.h"

namespace elastikv {

// Largest free blocks first, as they cost the fewest calls a byte, and each from its end, so that memory stays at low
// addresses.
Bytes Heap::release_extents(Bytes wanted, const Block* spared, const Note& note) {
    struct Idle {
        Block* block;
        std::vector<ByteRange> extents;  // offsets in the pool, last one first
    };
    const Bytes page = pool_->page_size();
    std::vector<Block*> candidates;
    for (const auto& bin : common_->bins) {
        for (auto it = bin->free.rbegin(); it != bin->free.rend() && (*it)->size >= page; ++it) {
            const bool beside = spared != nullptr && (*it == spared->prev || *it == spared->next);
            if (!beside) candidates.push_back(*it);
        }
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Block* a, const Block* b) { return a->size > b->size; });

    Bytes released = 0;
    for (Block* const block : candidates) {
        if (released >= wanted) break;
        const Bytes begin = round_to_page(offset_of(block->address));
        const Bytes end = align_down(offset_of(block->address) + block->size, page);
        if (begin >= end) continue;
        std::vector<ByteRange> extents = pool_->extents_within(begin, end - begin);
        std::reverse(extents.begin(), extents.end());
        Bytes chosen = 0;
        std::size_t count = 0;
        while (count < extents.size() && released + chosen < wanted) chosen += extents[count++].size();
        if (count == 0) continue;
        extents.resize(count);
        give_to_pool(extents, std::array{block->segment->bin->stream});
        released += chosen;
        for (const ByteRange& extent : extents) {
            const Address address = pool_->base_address() + extent.begin;
            notify(HeapAction::segment_unmap, address, extent.size(), *block->segment, note);
            make_absent(block, {address, address + extent.size()});
        }
    }
    return released;
}

Bytes Heap::round_to_page(Bytes offset) const { return align_up(offset, pool_->page_size()).value_or(offset); }

void Heap::give_to_pool(const std::vector<ByteRange>& parts, std::span<const Stream> streams) {
    if (before_release_) std::for_each(parts.begin(), parts.end(), before_release_);
    try {
        pool_->deallocate_all(parts, streams);
    } catch (const CudaError&) {
        // No fence could be recorded, say on a stream that is gone: nothing is pending once the device has finished.
        pool_->synchronize();
        pool_->deallocate_all(parts, {});
    }
}

// Segments that are free as a whole. Graphs that were replayed on streams which nobody told of may still be running, so
// all of the device's work comes first.
Bytes Heap::release_segments(Arena& arena, Bytes wanted, std::vector<Returned>& returned, const Note& note) {
    std::vector<Segment*> idle;
    Bytes released = 0;
    for (const auto& bin : arena.bins) {
        for (const auto& segment : bin->segments) {
            const bool whole = segment->first->is_free() && segment->first->next == nullptr;
            if (segment->elastic || !whole || released >= wanted) continue;
            idle.push_back(segment.get());
            released += segment->size;
        }
    }
    if (idle.empty()) return 0;
    pool_->synchronize();
    std::vector<ByteRange> parts;
    for (const Segment* const segment : idle) {
        const Bytes begin = offset_of(segment->address);
        if (!segment->source) parts.push_back({begin, begin + segment->size});
    }
    if (!parts.empty()) give_to_pool(parts, {});
    for (const ByteRange& part : parts) addresses_.add(part);
    for (Segment* const segment : idle) {
        if (segment->source) {
            returned.push_back({segment->source, segment->address, segment->size, segment->bin->stream});
        }
        notify(HeapAction::segment_free, segment->address, segment->size, *segment, note);
        remove_segment(segment);
    }
    return released;
}

// Of the common arena and of those that nobody uses any more.
Bytes Heap::release_all_idle(Bytes wanted, std::vector<Returned>& returned, const Note& note) {
    Bytes released = release_extents(wanted, nullptr, note);
    for (auto it = arenas_.begin(); it != arenas_.end();) {
        Arena& arena = *it->second;
        if (arena.use_count == 0 && released < wanted) {
            released += release_segments(arena, wanted - released, returned, note);
            const bool empty = std::all_of(arena.bins.begin(), arena.bins.end(),
                                           [](const auto& bin) { return bin->segments.empty(); });
            if (empty) {
                it = arenas_.erase(it);
                continue;
            }
        }
        ++it;
    }
    return released;
}

void Heap::give_back(std::vector<Returned>& returned) noexcept {
    for (const Returned& each : returned) each.source->free(each.address, each.size, each.stream);
    returned.clear();
}

Bytes Heap::release_idle(Bytes wanted) {
    std::vector<Returned> returned;
    Lock lock(mutex_);
    settle_passed(/*all=*/true);
    const Bytes released = release_all_idle(wanted, returned, {});
    lock.unlock();
    give_back(returned);
    return released;
}

Bytes Heap::empty_cache(ArenaId id, const Note& note) {
    std::vector<Returned> returned;
    Lock lock(mutex_);
    wait_for_streams(lock);
    Bytes released = 0;
    if (id.common()) {
        released = release_all_idle(~Bytes{0}, returned, note);
    } else if (Arena* const arena = find_arena(id)) {
        released = release_segments(*arena, ~Bytes{0}, returned, note);
    }
    lock.unlock();
    give_back(returned);
    pool_->reclaim(~Bytes{0}, /*wait=*/true);
    return released;
}

}  // namespace elastikv
