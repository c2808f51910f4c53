// Heap: giving memory back.
#include <algorithm>
#include <iterator>
#include <utility>

#include "heap/heap.h"

namespace elastikv {

// Free ones of elastic ranges that may hold a page, but for those beside `spared`.
std::vector<Block*> Heap::idle_blocks(const Block* spared) const {
    std::vector<Block*> idle;
    for (const auto& bin : common_->bins) {
        for (auto it = bin->free.rbegin(); it != bin->free.rend() && (*it)->size >= pool_->page_size(); ++it) {
            const bool beside = spared != nullptr && (*it == spared->prev || *it == spared->next);
            if (!beside) idle.push_back(*it);
        }
    }
    return idle;
}

// By their offsets in the pool; maybe none.
ByteRange Heap::whole_pages(const Block& block) const {
    const Bytes begin = round_to_page(offset_of(block.address));
    return {begin, std::max(begin, align_down(offset_of(block.address) + block.size, pool_->page_size()))};
}

// Largest free blocks first, as they cost the fewest calls a byte, and each from its end, so that memory stays at low
// addresses.
Bytes Heap::release_extents(Bytes wanted, const Block* spared, const Note& note) {
    std::vector<Block*> candidates = idle_blocks(spared);
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Block* a, const Block* b) { return a->size > b->size; });

    Bytes released = 0;
    std::vector<std::pair<Block*, ByteRange>> chosen;
    std::vector<ByteRange> extents;
    std::vector<Stream> owners;
    for (Block* const block : candidates) {
        if (released >= wanted) break;
        const ByteRange pages = whole_pages(*block);
        if (pages.empty()) continue;
        const std::vector<ByteRange> within = pool_->extents_within(pages.begin, pages.size());
        for (auto extent = within.rbegin(); extent != within.rend() && released < wanted; ++extent) {
            chosen.emplace_back(block, *extent);
            extents.push_back(*extent);
            owners.push_back(block->segment->bin->stream);
            released += extent->size();
        }
    }
    if (released == 0) return 0;
    give_to_pool(extents, with_other_streams(owners));
    for (const auto& [block, extent] : chosen) {
        const Address address = pool_->base_address() + extent.begin;
        notify(HeapAction::segment_unmap, address, extent.size(), *block->segment, note);
        make_absent(block, {address, address + extent.size()});
    }
    return released;
}

// Programs free memory that other streams still use without a word (record_stream). Torch's own allocator lets that
// pass, as it keeps the memory mapped; so it goes back only after the work of every stream that the heap serves.
std::vector<Stream> Heap::with_other_streams(const std::vector<Stream>& owners) const {
    std::vector<Stream> streams;
    const auto is_new = [&](Stream stream) {
        return std::find(streams.begin(), streams.end(), stream) == streams.end();
    };
    std::copy_if(owners.begin(), owners.end(), std::back_inserter(streams), is_new);
    for (const auto& [id, arena] : arenas_) {
        for (const auto& bin : arena->bins) {
            // Not one that captures a graph, which would keep the memory until the capture ends, or is gone.
            if (is_new(bin->stream) && pool_->try_record_fence(bin->stream).ok()) streams.push_back(bin->stream);
        }
    }
    return streams;
}

// An extent that goes back while work on it is pending may be taken up again meanwhile: in parts, with a hole between
// them, or by ranges of different streams.
Bytes Heap::release_shared_extents(Bytes wanted, const Note& note) {
    std::vector<Block*> blocks = idle_blocks(nullptr);
    std::erase_if(blocks, [this](const Block* block) { return whole_pages(*block).empty(); });
    std::sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->address < b->address; });
    std::vector<ByteRange> pages;
    for (const Block* const block : blocks) pages.push_back(whole_pages(*block));
    const auto extents = pool_->extents_within(pages);

    Bytes released = 0;
    // From the highest address down, as each piece cuts its block to what lies below.
    for (auto pieces = extents.rbegin(); pieces != extents.rend() && released < wanted; ++pieces) {
        std::vector<Block*> holders;
        std::vector<Stream> streams;
        for (const ByteRange& piece : *pieces) {
            const auto above = std::upper_bound(pages.begin(), pages.end(), piece.begin,
                                                [](Bytes at, const ByteRange& each) { return at < each.begin; });
            holders.push_back(blocks[static_cast<std::size_t>(above - pages.begin()) - 1]);
            streams.push_back(holders.back()->segment->bin->stream);
        }
        give_to_pool(*pieces, with_other_streams(streams));
        for (std::size_t i = pieces->size(); i-- > 0;) {
            const ByteRange piece = (*pieces)[i];
            const Address address = pool_->base_address() + piece.begin;
            released += piece.size();
            notify(HeapAction::segment_unmap, address, piece.size(), *holders[i]->segment, note);
            make_absent(holders[i], {address, address + piece.size()});
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
    // Last, as a segment too may have held a part of an extent whose other parts are idle.
    if (released < wanted) released += release_shared_extents(wanted - released, note);
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
