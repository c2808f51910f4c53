// Heap: drawing memory, and what is tried before there is none.
#include <algorithm>
#include <utility>

#include "heap/heap.h"

namespace elastikv {
namespace {

// Small ranges grow by this share of what they hold.
constexpr Bytes small_growth = 16;
// Address space of a new range, as a share of the window.
constexpr Bytes range_share = 64;
// Where its size is not given, an extent is at most this share of the room that is left, as one that is idle in part
// can't be given back; but so large that the driver's calls stay few.
constexpr Bytes room_share = 100;
constexpr Bytes smallest_cut = 8 * MiB;
// A heap that is small beside the room that is left grows by this share of what it holds, up to that share of the room.
constexpr Bytes early_share = 8;
constexpr Bytes early_room = 512;

Bytes round_up(Bytes size, Bytes unit) {
    const auto rounded = align_up(size, unit);
    if (!rounded) throw InvalidSize("a block of " + std::to_string(size) + " bytes does not fit 64 bits in pages");
    return *rounded;
}

Bytes segment_size(Bytes request, bool no_split) {
    if (no_split) return round_up(request, small_buffer);
    if (request <= small_request) return small_buffer;
    return request < made_to_measure ? large_buffer : round_up(request, small_buffer);
}

Bytes free_size(const Block* block) { return block != nullptr && block->is_free() ? block->size : 0; }

}  // namespace

Address Heap::allocate_slowly(Lock& lock, const HeapRequest& request) {
    enum Effort { none, own_idle, idle_of_others, other_streams, other_arenas, last };
    settle_passed(/*all=*/true);
    std::vector<Returned> returned;
    HandOver handed = pool_->hand_over();
    for (int effort = none;;) {
        Arena& arena = arena_for(request.arena);
        Block* block = take(arena, request);
        if (block != nullptr) return hand_out(block, request);
        const Bytes lacking = arena.elastic()
                                  ? try_grow(arena.bin(request.stream, request.size > small_request), request, handed)
                                  : try_add_segment(lock, request, handed);
        if (lacking == 0) continue;  // the segment was made without the lock, so another thread may have taken it
        if (handed.give_back() > 0) continue;  // it did not fit where it was wanted, but its room may do
        Bytes released = 0;
        switch (++effort) {
            case own_idle:
                ++stats_.retries;
                released = release_all_idle(lacking, returned, request.note);
                break;
            case idle_of_others: break;
            case other_streams:
                wait_for_streams(lock);
                released = release_all_idle(lacking, returned, request.note);
                break;
            case other_arenas:
                if ((block = take_from_others(request)) != nullptr) return hand_out(block, request);
                [[fallthrough]];
            default:
                ++stats_.out_of_memory;
                lock.unlock();
                throw pool_->out_of_memory(lacking);
        }
        // Again while there is idle memory: what went may have lain beside the best hole, which then wants more.
        if (released > 0) --effort;
        lock.unlock();
        give_back(returned);
        pool_->make_room(lacking, /*wait=*/effort > own_idle, &handed);
        lock.lock();
    }
}

Bytes Heap::over_limit(Bytes more) const {
    const Bytes reserved = static_cast<Bytes>(stats_.reserved_bytes.of[0].current);
    if (more > options_.limit) return more;
    return reserved > options_.limit - more ? reserved - (options_.limit - more) : 0;
}

Bytes Heap::try_grow(Bin& bin, const HeapRequest& request, HandOver& handed) {
    Hole hole = best_hole(bin, request.size);
    if (hole.block == nullptr) hole = add_range(bin, request.size);
    if (!bin.large) {
        Bytes resident = 0;
        for (const auto& segment : bin.segments) resident += segment->resident;
        const Bytes ahead = align_down(resident / small_growth, pool_->page_size());
        if (over_limit(std::max(hole.pages, ahead)) == 0) {
            hole.pages = grown(hole, std::min(std::max(hole.pages, ahead), hole.block->size));
        }
    }
    const Bytes exact = hole.pages;
    const auto current = [](const StatTriple& stat) { return static_cast<Bytes>(stat.of[0].current); };
    highest_load_ = std::max(highest_load_, current(stats_.active_bytes) + request.size);
    if (bin.large) {
        // What lies idle elsewhere pays for what is mapped here, once the heap holds what its highest load needs. Below
        // that it may keep idle memory, as it will be wanted again. Small ranges would pay with extents many times
        // their growth.
        const Bytes allowed = highest_load_ + ahead_of(highest_load_);
        const Bytes held = current(stats_.reserved_bytes) + hole.pages;
        if (held > allowed) {
            if (relocate(bin, hole, std::min(held - allowed, hole.pages), request.note)) return 0;
            pay(hole, std::min(held - allowed, hole.pages), handed, request.note);
        } else {
            // A little ahead of need in the same extent, as the driver's cost goes by the handle.
            const Bytes ahead = align_down(std::min(allowed - held, ahead_of(held)), pool_->page_size());
            if (over_limit(hole.pages + ahead) == 0) {
                hole.pages = grown(hole, hole.pages + std::min(ahead, hole.block->size - hole.pages));
            }
        }
    }

    if (const Bytes over = over_limit(hole.pages); over > 0) return over;
    AllocateOptions options;
    options.stream = bin.stream;
    options.hand_over = &handed;
    options.extents.largest = largest_extent();
    for (;;) {
        const Bytes lacking = pool_->try_claim(begin_of(hole), hole.pages, options);
        if (lacking == 0) break;
        if (hole.pages == exact) return lacking;
        hole.pages = exact;  // what is ahead of need is not worth anyone else's memory
    }

    fill(bin, hole, request.note);
    return 0;
}

// So many pages for the hole, unless what was moved away is still mapped among those that it would take on.
Bytes Heap::grown(Hole hole, Bytes pages) const {
    const Bytes found = std::exchange(hole.pages, pages);
    return pages > found && pool_->is_leaving(begin_of(hole), pages) ? found : pages;
}

Bytes Heap::begin_of(const Hole& hole) const {
    return offset_of(hole.block->address) + (hole.at_back ? hole.block->size - hole.pages : 0);
}

// The pages of the hole have memory now.
void Heap::fill(Bin& bin, const Hole& hole, const Note& note) {
    Block* block = hole.block;
    bin.absent.erase(block);
    if (hole.pages < block->size) {
        Block* const rest = split(block, hole.at_back ? block->size - hole.pages : hole.pages);
        bin.absent.insert(hole.at_back ? block : rest);
        if (hole.at_back) block = rest;
    }
    notify(HeapAction::segment_map, block->address, hole.pages, *block->segment, note);
    make_present(block);
}

Bytes Heap::room() const {
    const Bytes reserved = static_cast<Bytes>(stats_.reserved_bytes.of[0].current);
    return std::min(options_.limit - std::min(options_.limit, reserved), pool_->room());
}

Bytes Heap::largest_extent() const {
    const Bytes page = pool_->page_size();
    if (options_.largest_extent > 0) return round_up(options_.largest_extent, page);
    return align_up(std::max(room() / room_share, smallest_cut), page).value_or(0);
}

// Of memory that a heap which holds so much may have idle.
Bytes Heap::ahead_of(Bytes held) const {
    if (options_.idle_share <= 0) return 0;
    const Bytes share = static_cast<Bytes>(options_.idle_share * static_cast<double>(held));
    return std::max(share, std::min(held / early_share, room() / early_room));
}

// Where the fewest pages are to be mapped, counting what lies free beside them; the lowest such place.
Heap::Hole Heap::best_hole(const Bin& bin, Bytes size) const {
    const Bytes page = pool_->page_size();
    Hole best;
    for (Block* const block : bin.absent) {
        const Bytes before = free_size(block->prev);
        const Bytes behind = free_size(block->next);
        if (before + block->size + behind < size) continue;
        for (const bool at_back : {false, true}) {
            const Bytes beside = at_back ? behind : before;
            const Bytes wanted = beside < size ? round_up(size - beside, page) : page;
            const Hole hole{block, std::min(wanted, block->size), at_back};
            const bool better = best.block == nullptr || hole.pages < best.pages ||
                                (hole.pages == best.pages && block->address < best.block->address);
            // What was moved away is mapped there until the work that used it has finished.
            if (better && !pool_->is_leaving(begin_of(hole), hole.pages)) best = hole;
        }
    }
    return best;
}

Heap::Hole Heap::add_range(Bin& bin, Bytes size) {
    const Bytes page = pool_->page_size();
    const Bytes pages = round_up(size, page);
    const Bytes generous = align_down(window_.size() / (bin.large ? range_share : range_share * 16), page);
    Bytes span = std::max(pages, generous);
    Bytes begin = take_addresses(span);
    if (begin == window_.end && span > pages) begin = take_addresses(span = pages);
    if (begin == window_.end) {
        drop_empty_ranges();
        begin = take_addresses(span);
    }
    if (begin == window_.end) throw out_of_addresses(size);
    auto made = std::make_unique<Segment>();
    made->address = pool_->base_address() + begin;
    made->size = span;
    made->elastic = true;
    made->bin = &bin;
    made->first = new_block(made->address, span, made.get());
    made->first->state = BlockState::absent;
    Block* const block = made->first;
    bin.absent.insert(block);
    bin.segments.push_back(std::move(made));
    return {block, pages, false};
}

OutOfVirtualMemory Heap::out_of_addresses(Bytes size) {
    ++stats_.out_of_memory;
    return {size, "the heap has " + format_bytes(addresses_.total()) + " of its " + format_bytes(window_.size()) +
                      " of addresses free, not in one piece of that size"};
}

// Ranges of any stream that hold no memory; their addresses may serve another.
void Heap::drop_empty_ranges() {
    for (const auto& bin : common_->bins) {
        std::erase_if(bin->segments, [&](const auto& segment) {
            const Bytes begin = offset_of(segment->address);
            if (segment->resident > 0 || pool_->blocked_until(begin, segment->size)) return false;
            if (pool_->is_leaving(begin, segment->size)) return false;
            bin->absent.erase(segment->first);
            spare_blocks_.push_back(segment->first);
            addresses_.add({begin, begin + segment->size});
            return true;
        });
    }
}

// The window's end where there is no such piece.
Bytes Heap::take_addresses(Bytes size) {
    const auto place = addresses_.find(size, pool_->page_size(), window_.begin);
    if (!place) return window_.end;
    addresses_.remove({*place, *place + size});
    return *place;
}

Bytes Heap::try_add_segment(Lock& lock, const HeapRequest& request, HandOver& handed) {
    Arena& arena = arena_for(request.arena);
    const bool large = request.size > small_request;
    const Bytes size = round_up(segment_size(request.size, arena.no_split), pool_->page_size());
    if (const Bytes over = over_limit(size); over > 0) return over;
    if (const std::shared_ptr<SegmentSource> source = arena.source) {
        lock.unlock();
        const Address address = source->try_allocate(size, request.stream);
        lock.lock();
        if (address == 0) return size;
        insert_segment(arena_for(request.arena).bin(request.stream, large), address, size, request);
        return 0;
    }
    Bytes begin = take_addresses(size);
    if (begin == window_.end) {
        drop_empty_ranges();
        begin = take_addresses(size);
    }
    if (begin == window_.end) throw out_of_addresses(size);
    AllocateOptions options;
    options.stream = request.stream;
    options.hand_over = &handed;
    Bytes lacking = 0;
    try {
        lacking = pool_->try_claim(begin, size, options);
    } catch (...) {
        addresses_.add({begin, begin + size});
        throw;
    }
    if (lacking > 0) {
        addresses_.add({begin, begin + size});
        return lacking;
    }
    insert_segment(arena.bin(request.stream, large), pool_->base_address() + begin, size, request);
    return 0;
}

// Arenas that lend their free memory rather than let others run out of it.
Block* Heap::take_from_others(const HeapRequest& request) {
    if (!request.arena.common()) return nullptr;
    for (const auto& [id, arena] : arenas_) {
        if (!arena->use_on_oom || id.common()) continue;
        if (Block* const block = take(*arena, request)) return block;
    }
    return nullptr;
}

}  // namespace elastikv
