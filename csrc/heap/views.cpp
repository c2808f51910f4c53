// Heap: what it tells of itself.
#include <algorithm>
#include <utility>

#include "heap/heap.h"

namespace elastikv {
namespace {

BlockView view(const Block& block) {
    const bool allocated = block.state == BlockState::allocated;
    const bool active = allocated || block.state == BlockState::retiring;
    return {block.address, block.size, block.requested, allocated, active, block.note};
}

void view_segment(const Segment& segment, std::vector<SegmentView>& out) {
    bool open = false;
    for (const Block* block = segment.first; block != nullptr; block = block->next) {
        if (!block->present()) {
            open = false;
            continue;
        }
        if (!open) {
            const Bin& bin = *segment.bin;
            out.push_back({block->address, 0, bin.stream, bin.large, segment.elastic, bin.arena->id, segment.note, {}});
            open = true;
        }
        out.back().size += block->size;
        out.back().blocks.push_back(view(*block));
    }
}

}  // namespace

std::optional<BlockView> Heap::find(Address address) const {
    const Lock lock(mutex_);
    const Block* const block = handed_out_.find(address);
    return block == nullptr ? std::nullopt : std::optional(view(*block));
}

std::optional<std::pair<Address, Bytes>> Heap::base_of(Address address) const {
    const Lock lock(mutex_);
    const Block* first = handed_out_.find(address);
    if (first == nullptr) return std::nullopt;
    while (first->prev != nullptr && first->prev->present()) first = first->prev;
    Bytes size = 0;
    for (const Block* block = first; block != nullptr && block->present(); block = block->next) size += block->size;
    return std::pair{first->address, size};
}

std::optional<ByteRange> Heap::pages_of(Address address, std::shared_ptr<SegmentSource>* source) const {
    const Lock lock(mutex_);
    const Block* const block = handed_out_.find(address);
    if (block == nullptr) return std::nullopt;
    if (block->segment->source) {
        if (source != nullptr) *source = block->segment->source;
        return std::nullopt;
    }
    const Bytes begin = offset_of(block->address);
    return align_outward({begin, begin + block->size}, pool_->page_size());
}

HeapStats Heap::stats() const {
    const Lock lock(mutex_);
    return stats_;
}

void Heap::reset_peak_stats() {
    const Lock lock(mutex_);
    stats_.for_each([](StatTriple& triple) {
        for (Stat& stat : triple.of) stat.peak = stat.current;
    });
}

void Heap::reset_accumulated_stats() {
    const Lock lock(mutex_);
    stats_.for_each([](StatTriple& triple) {
        for (Stat& stat : triple.of) stat.allocated = stat.freed = 0;
    });
    stats_.retries = stats_.out_of_memory = stats_.waits = stats_.device_allocs = stats_.device_frees = 0;
}

Bytes Heap::largest_free() const {
    const Lock lock(mutex_);
    Bytes largest = 0;
    for (const auto& bin : common_->bins) {
        if (!bin->free.empty()) largest = std::max(largest, (*bin->free.rbegin())->size);
    }
    return largest;
}

std::vector<SegmentView> Heap::snapshot(std::optional<ArenaId> wanted) const {
    const Lock lock(mutex_);
    std::vector<SegmentView> out;
    for (const auto& [id, arena] : arenas_) {
        if (wanted && id != *wanted) continue;
        for (const auto& bin : arena->bins) {
            for (const auto& segment : bin->segments) view_segment(*segment, out);
        }
    }
    return out;
}

void Heap::set_options(const HeapOptions& options) {
    const Lock lock(mutex_);
    options_ = options;
}

HeapOptions Heap::options() const {
    const Lock lock(mutex_);
    return options_;
}

void Heap::set_observer(HeapObserver* observer) {
    const Lock lock(mutex_);
    observer_ = observer;
}

void Heap::set_capture_order(CaptureOrder* order) {
    const Lock lock(mutex_);
    capture_order_ = order;
}

}  // namespace elastikv
