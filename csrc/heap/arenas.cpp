// Heap: arenas, their lives, and how their blocks lay at a moment.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "heap/heap.h"

namespace elastikv {
namespace {

std::string name_of(ArenaId id) { return "(" + std::to_string(id.first) + ", " + std::to_string(id.second) + ")"; }

}  // namespace

void Heap::use_arena(ArenaId id, std::shared_ptr<SegmentSource> source) {
    const Lock lock(mutex_);
    Arena& arena = arena_for(id);
    if (arena.use_count == 0 && source) arena.source = std::move(source);
    ++arena.use_count;
}

void Heap::release_arena(ArenaId id) {
    const Lock lock(mutex_);
    Arena* const arena = find_arena(id);
    if (id.common() || arena == nullptr || arena->use_count == 0) {
        throw InvalidArgument("arena " + name_of(id) + " is not in use");
    }
    --arena->use_count;
}

int Heap::arena_use_count(ArenaId id) const {
    const Lock lock(mutex_);
    const Arena* const arena = find_arena(id);
    return arena == nullptr ? 0 : arena->use_count;
}

void Heap::set_use_on_oom(ArenaId id, bool use) {
    const Lock lock(mutex_);
    arena_for(id).use_on_oom = use;
}

void Heap::set_no_split(ArenaId id) {
    const Lock lock(mutex_);
    arena_for(id).no_split = true;
}

Arena& Heap::settled_arena(ArenaId id) {
    Arena* const arena = find_arena(id);
    if (arena == nullptr || id.common()) throw InvalidArgument("there is no arena " + name_of(id));
    settle_passed(/*all=*/true);
    const auto held = std::find_if(retiring_.begin(), retiring_.end(),
                                   [&](const Block* block) { return block->segment->bin->arena == arena; });
    if (held != retiring_.end()) {
        throw InvalidArgument("other streams may still use blocks of arena " + name_of(id) +
                              "; synchronize them before its state is saved or restored");
    }
    return *arena;
}

ArenaState Heap::checkpoint(ArenaId id) {
    const Lock lock(mutex_);
    const Arena& arena = settled_arena(id);
    ArenaState state;
    state.arena = id;
    for (const auto& bin : arena.bins) {
        for (const auto& segment : bin->segments) {
            ArenaState::SegmentState saved{bin->stream, bin->large, {}};
            for (const Block* block = segment->first; block != nullptr; block = block->next) {
                saved.blocks.push_back({block->address, block->size, block->requested, !block->is_free()});
            }
            state.segments.push_back(std::move(saved));
        }
    }
    return state;
}

RestoreResult Heap::restore(const ArenaState& state, const Note& note) {
    const Lock lock(mutex_);
    Arena& arena = settled_arena(state.arena);
    std::unordered_map<Address, Segment*> present;
    for (const auto& bin : arena.bins) {
        for (const auto& segment : bin->segments) present.emplace(segment->address, segment.get());
    }
    for (const ArenaState::SegmentState& saved : state.segments) {
        Bytes size = 0;
        for (const auto& block : saved.blocks) size += block.size;
        const auto found = saved.blocks.empty() ? present.end() : present.find(saved.blocks.front().address);
        if (found == present.end() || found->second->size != size) {
            throw InvalidArgument("arena " + name_of(state.arena) + " no longer has a segment of the saved state");
        }
    }

    RestoreResult result;
    for (const auto& [address, segment] : present) {
        for (Block* block = segment->first; block != nullptr; block = block->next) {
            if (block->state == BlockState::allocated) result.freed.push_back(block->address);
        }
    }
    for (const Address address : result.freed) {
        Block* const block = handed_out_.take(address);
        count_freed(*block, note);
        block->users.clear();
        free_block(block);
    }
    for (const ArenaState::SegmentState& saved : state.segments) {
        Block* rest = present.at(saved.blocks.front().address)->first;
        remove_free(rest);
        std::vector<Block*> idle;
        for (std::size_t i = 0; i < saved.blocks.size(); ++i) {
            const ArenaState::BlockState& wanted = saved.blocks[i];
            Block* const block = rest;
            if (i + 1 < saved.blocks.size()) rest = split(block, wanted.size);
            if (wanted.allocated) {
                count_handed_out(block, wanted.requested, note);
                result.allocated.push_back(block->address);
            } else {
                idle.push_back(block);
            }
        }
        for (Block* const block : idle) insert_free(block);  // once their neighbours are what they will be
    }
    return result;
}

}  // namespace elastikv
