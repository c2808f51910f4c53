// Heap: recounting the books, for tests.
#include <string>

#include "heap/heap.h"

namespace elastikv {
namespace {

// What the statistics should say, counted anew.
struct Recount {
    HeapStats stats;
    std::size_t handed_out = 0;
    std::size_t retiring = 0;
    std::string fault;

    void block(const Block& block, bool split) {
        const bool large = block.segment->bin->large;
        if (block.state == BlockState::allocated) {
            ++handed_out;
            stats.allocation.increase(large, 1);
            stats.allocated_bytes.increase(large, block.size);
        }
        if (block.state == BlockState::retiring) ++retiring;
        if (block.state == BlockState::allocated || block.state == BlockState::retiring) {
            stats.active.increase(large, 1);
            stats.active_bytes.increase(large, block.size);
            stats.requested_bytes.increase(large, block.requested);
        } else if (block.present() && split) {
            stats.inactive_split.increase(large, 1);
            stats.inactive_split_bytes.increase(large, block.size);
        }
        if (block.present()) stats.reserved_bytes.increase(large, block.size);
    }

    void segment(const Segment& segment, const VirtualMemoryPool& pool) {
        const Bin& bin = *segment.bin;
        const auto bad = [&](const std::string& what) {
            if (fault.empty()) fault = "segment at " + std::to_string(segment.address) + ": " + what;
        };
        Address expected = segment.address;
        Bytes resident = 0;
        bool open = false;
        const Block* prev = nullptr;
        for (const Block* at = segment.first; at != nullptr; prev = at, at = at->next) {
            Block* const key = const_cast<Block*>(at);
            if (at->address != expected || at->prev != prev || at->segment != &segment) bad("its blocks don't chain");
            if (at->size == 0 || at->size % heap_unit != 0) bad("a block of " + std::to_string(at->size) + " bytes");
            expected += at->size;
            if (bin.free.contains(key) != (at->state == BlockState::free)) bad("a free block is not in its index");
            if (bin.absent.contains(key) != (at->state == BlockState::absent)) bad("a hole is not in its index");
            if (prev != nullptr && prev->state == at->state &&
                (at->state == BlockState::free || at->state == BlockState::absent)) {
                bad("neighbours that did not coalesce");
            }
            if (at->present()) {
                resident += at->size;
                if (!open) stats.segment.increase(bin.large, 1);
                if (!segment.source && !pool.is_mapped(at->address - pool.base_address(), at->size)) {
                    bad("a block without memory");
                }
            }
            open = at->present();
            const bool split =
                (at->prev != nullptr && at->prev->present()) || (at->next != nullptr && at->next->present());
            block(*at, split);
        }
        if (expected != segment.address + segment.size) bad("its blocks don't cover it");
        if (resident != segment.resident) bad("resident bytes don't add up");
    }
};

}  // namespace

std::string Heap::check() const {
    const Lock lock(mutex_);
    Recount recount;
    Bytes addresses = addresses_.total();
    for (const auto& [id, arena] : arenas_) {
        for (const auto& bin : arena->bins) {
            std::size_t indexed = bin->free.size() + bin->absent.size();
            for (const auto& segment : bin->segments) {
                recount.segment(*segment, *pool_);
                if (!segment->source) addresses += segment->size;
                for (const Block* block = segment->first; block != nullptr; block = block->next) {
                    if (block->is_free() || !block->present()) --indexed;
                }
            }
            if (indexed != 0) return "an index holds blocks of no segment";
        }
    }
    if (!recount.fault.empty()) return recount.fault;
    if (addresses != window_.size()) return "addresses are lost: " + std::to_string(addresses);
    if (recount.handed_out != handed_out_.size()) return "blocks that were handed out are not in the table";
    if (recount.retiring != retiring_.size()) return "retiring blocks are not in the list";
    std::string fault;
    HeapStats kept = stats_;
    std::vector<std::int64_t> counted;
    recount.stats.for_each([&](const StatTriple& triple) {
        for (const Stat& stat : triple.of) counted.push_back(stat.current);
    });
    std::size_t index = 0;
    kept.for_each([&](const StatTriple& triple) {
        for (const Stat& stat : triple.of) {
            if (stat.current != counted[index]) {
                fault = "statistic " + std::to_string(index / 3) + "." + std::to_string(index % 3) + " is " +
                        std::to_string(stat.current) + ", not " + std::to_string(counted[index]);
            }
            ++index;
        }
    });
    return fault;
}

}  // namespace elastikv
