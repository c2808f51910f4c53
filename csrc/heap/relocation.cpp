// Heap: growth by what lies idle elsewhere.
#include <algorithm>
#include <iterator>
#include <utility>

#include "heap/heap.h"

namespace elastikv {

// Fills the hole, or more or less of it, with idle extents of the same stream, in whose order they may be used at once.
// At least `owed` bytes, if there are as many. False, and nothing has changed, where there are none.
bool Heap::relocate(Bin& bin, Hole hole, Bytes owed, const Note& note) {
    struct Idle {
        Block* block;
        ByteRange extent;
    };
    std::vector<Idle> idle;
    for (Block* const block : idle_blocks(hole.block)) {
        const ByteRange pages = whole_pages(*block);
        if (block->segment->bin->stream != bin.stream || pages.empty()) continue;
        for (const ByteRange& extent : pool_->movable_within(pages.begin, pages.size()))
            idle.push_back({block, extent});
    }
    std::sort(idle.begin(), idle.end(), [](const Idle& a, const Idle& b) {
        return a.extent.size() != b.extent.size() ? a.extent.size() < b.extent.size() : a.extent.begin > b.extent.begin;
    });
    // The smallest that fills what is left of the hole, or else the largest: the cost goes by the extent.
    std::vector<Idle> chosen;
    Bytes total = 0;
    while (!idle.empty() && total < owed) {
        const auto fills = [&](const Idle& each) { return total + each.extent.size() >= hole.pages; };
        auto next = std::find_if(idle.begin(), idle.end(), fills);
        const auto fits = [&](const Idle& each) { return total + each.extent.size() <= hole.block->size; };
        if (next == idle.end() || !fits(*next)) next = std::prev(idle.end());
        if (fits(*next)) {
            chosen.push_back(*next);
            total += next->extent.size();
        }
        idle.erase(next);
    }
    if (chosen.empty()) return false;

    // From the highest address down, as each piece cuts its block to what lies below.
    std::sort(chosen.begin(), chosen.end(),
              [](const Idle& a, const Idle& b) { return a.extent.begin > b.extent.begin; });
    std::vector<ByteRange> extents;
    for (const Idle& each : chosen) extents.push_back(each.extent);
    hole.pages = total;
    if (!pool_->try_relocate(extents, begin_of(hole), bin.stream, with_other_streams({bin.stream}))) return false;
    for (const Idle& each : chosen) {
        const Address address = pool_->base_address() + each.extent.begin;
        notify(HeapAction::segment_unmap, address, each.extent.size(), *each.block->segment, note);
        make_absent(each.block, {address, address + each.extent.size()});
    }
    fill(bin, hole, note);
    return true;
}

// With idle extents of other streams, which are passed on once their work has finished, or go back to the device.
void Heap::pay(const Hole& hole, Bytes owed, HandOver& handed, const Note& note) {
    const Bytes released = release_extents(owed, hole.block, note);
    if (released == 0) return;
    handed.want(hole.pages, std::min(hole.pages, largest_extent()), /*exact=*/false);
    pool_->reclaim(released, /*wait=*/false, any_time, &handed);  // or both are held until the worker gets to it
}

}  // namespace elastikv
