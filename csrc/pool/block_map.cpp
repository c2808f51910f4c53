#include "pool/block_map.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>

namespace elastikv {
namespace {

// Of eight held blocks: with more holes than one they are filled first.
constexpr std::uint64_t most_holes = 8;

}  // namespace

BlockMap::BlockMap(std::uint64_t blocks, std::uint64_t blocks_per_extent)
    : blocks_per_extent_(blocks_per_extent),
      words_per_extent_((blocks_per_extent + 63) / 64),
      extents_((blocks + blocks_per_extent - 1) / blocks_per_extent),
      references_(blocks),
      free_bits_(extents_.size() * words_per_extent_),
      heads_(blocks_per_extent + 1, none),
      listed_(blocks_per_extent / 64 + 1) {}

std::uint32_t BlockMap::size_of(std::uint64_t extent) const {
    return static_cast<std::uint32_t>(std::min(blocks_per_extent_, blocks() - extent * blocks_per_extent_));
}

std::size_t BlockMap::word_of(BlockId id) const {
    const auto index = static_cast<std::uint64_t>(id);
    return index / blocks_per_extent_ * words_per_extent_ + index % blocks_per_extent_ / 64;
}

bool BlockMap::is_free(BlockId id) const {
    return (free_bits_[word_of(id)] & bit_of(static_cast<std::uint64_t>(id) % blocks_per_extent_)) != 0;
}

// Into the list of its count of free blocks; an extent without any is in none.
void BlockMap::list(std::uint32_t extent) {
    Extent& each = extents_[extent];
    if (each.free == 0) return;
    std::uint32_t& head = heads_[each.free];
    each.previous = none;
    each.next = head;
    if (head != none) {
        extents_[head].previous = extent;
    } else {
        listed_[each.free / 64] |= bit_of(each.free);
    }
    head = extent;
}

void BlockMap::unlist(std::uint32_t extent) {
    const Extent& each = extents_[extent];
    if (each.free == 0) return;
    if (each.next != none) extents_[each.next].previous = each.previous;
    if (each.previous != none) {
        extents_[each.previous].next = each.next;
        return;
    }
    heads_[each.free] = each.next;
    if (each.next == none) listed_[each.free / 64] &= ~bit_of(each.free);
}

// The first of those that have the fewest free blocks, but some.
std::uint32_t BlockMap::fullest() const {
    for (std::size_t word = 0;; ++word) {
        if (listed_[word] == 0) continue;
        return heads_[word * 64 + static_cast<std::size_t>(std::countr_zero(listed_[word]))];
    }
}

std::uint64_t BlockMap::worth_whole(std::uint64_t count) const {
    if (count < blocks_per_extent_ || free_mapped_ > held_ / most_holes) return 0;
    const std::uint64_t last = extents_.size() - 1;
    const bool part = !extents_[last].mapped && size_of(last) < blocks_per_extent_;
    const std::uint64_t whole = (free_unmapped() - (part ? size_of(last) : 0)) / blocks_per_extent_;
    return std::min(count / blocks_per_extent_, whole);
}

std::vector<std::uint64_t> BlockMap::extents_for(std::uint64_t count, std::span<const std::uint64_t> preferred) const {
    std::vector<std::uint64_t> found;
    std::uint64_t surplus = 0;
    const auto add = [&](std::uint64_t extent) {
        found.push_back(extent);
        const std::uint64_t taken = std::min<std::uint64_t>(count, size_of(extent));
        count -= taken;
        surplus += size_of(extent) - taken;
    };
    for (const std::uint64_t extent : preferred) {
        if (count > 0) add(extent);
    }
    const std::size_t chosen = found.size();
    for (std::uint64_t extent = lowest_unmapped_; count > 0; ++extent) {
        const auto end = found.begin() + static_cast<std::ptrdiff_t>(chosen);
        if (!extents_[extent].mapped && std::find(found.begin(), end, extent) == end) add(extent);
    }
    std::sort(found.begin(), found.end());
    // The last of all may be short, and not needed beside what came behind it: no extent is to be mapped for nothing,
    // as it would be given back with its last block.
    if (!found.empty() && found.back() == extents_.size() - 1 && surplus >= size_of(found.back())) found.pop_back();
    return found;
}

void BlockMap::map(std::uint64_t extent) {
    Extent& each = extents_[extent];
    each.mapped = true;
    each.free = size_of(extent);
    for (std::uint32_t i = 0; i < each.free; ++i) free_bits_[extent * words_per_extent_ + i / 64] |= bit_of(i);
    free_mapped_ += each.free;
    ++mapped_extents_;
    list(static_cast<std::uint32_t>(extent));
    while (lowest_unmapped_ < extents_.size() && extents_[lowest_unmapped_].mapped) ++lowest_unmapped_;
}

void BlockMap::unmap(std::uint64_t extent) {
    Extent& each = extents_[extent];
    unlist(static_cast<std::uint32_t>(extent));
    const auto first = free_bits_.begin() + static_cast<std::ptrdiff_t>(extent * words_per_extent_);
    std::fill_n(first, words_per_extent_, std::uint64_t{0});
    free_mapped_ -= each.free;
    --mapped_extents_;
    each = {};
    lowest_unmapped_ = std::min(lowest_unmapped_, extent);
}

void BlockMap::take(std::span<BlockId> out) {
    while (!out.empty()) out = out.subspan(take_from(fullest(), out));
}

std::size_t BlockMap::take_from(std::uint64_t extent, std::span<BlockId> out) {
    Extent& each = extents_[extent];
    unlist(static_cast<std::uint32_t>(extent));
    const std::size_t count = std::min<std::size_t>(out.size(), each.free);
    std::size_t taken = 0;
    std::uint64_t base = extent * blocks_per_extent_;
    for (std::size_t word = extent * words_per_extent_; taken < count; ++word, base += 64) {
        std::uint64_t& bits = free_bits_[word];
        for (; bits != 0 && taken < count; bits &= bits - 1) {
            const std::uint64_t id = base + static_cast<std::uint64_t>(std::countr_zero(bits));
            references_[id] = 1;
            out[taken++] = static_cast<BlockId>(id);
        }
    }
    each.free -= static_cast<std::uint32_t>(count);
    held_ += count;
    free_mapped_ -= count;
    list(static_cast<std::uint32_t>(extent));
    return count;
}

void BlockMap::set_free(BlockId id) {
    const auto extent = static_cast<std::uint32_t>(extent_of(id));
    unlist(extent);
    ++extents_[extent].free;
    list(extent);
    free_bits_[word_of(id)] |= bit_of(static_cast<std::uint64_t>(id) % blocks_per_extent_);
    --held_;
    ++free_mapped_;
}

void BlockMap::set_held(BlockId id) {
    const auto extent = static_cast<std::uint32_t>(extent_of(id));
    unlist(extent);
    --extents_[extent].free;
    list(extent);
    free_bits_[word_of(id)] &= ~bit_of(static_cast<std::uint64_t>(id) % blocks_per_extent_);
    ++held_;
    --free_mapped_;
}

std::optional<std::size_t> BlockMap::drop(std::span<const BlockId> ids, std::vector<std::uint64_t>& emptied) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
        if (references(ids[i]) > 0) {
            --references_[static_cast<std::size_t>(ids[i])];
            continue;
        }
        for (std::size_t done = 0; done < i; ++done) ++references_[static_cast<std::size_t>(ids[done])];
        return i;
    }
    for (const BlockId id : ids) {
        // An id that stands there twice is free from its first time on.
        if (references_[static_cast<std::size_t>(id)] != 0 || is_free(id)) continue;
        set_free(id);
        const std::uint64_t extent = extent_of(id);
        if (extents_[extent].free == size_of(extent)) emptied.push_back(extent);
    }
    return std::nullopt;
}

void BlockMap::undo_drop(std::span<const BlockId> ids) {
    for (const BlockId id : ids) {
        if (references_[static_cast<std::size_t>(id)]++ == 0) set_held(id);
    }
}

std::optional<std::size_t> BlockMap::touch(std::span<const BlockId> ids) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
        const std::uint32_t now = references(ids[i]);
        if (now > 0 && now < std::numeric_limits<std::uint32_t>::max()) {
            ++references_[static_cast<std::size_t>(ids[i])];
            continue;
        }
        for (std::size_t done = 0; done < i; ++done) --references_[static_cast<std::size_t>(ids[done])];
        return i;
    }
    return std::nullopt;
}

std::string BlockMap::check() const {
    std::uint64_t held = 0, free = 0, mapped = 0;
    for (std::uint64_t extent = 0; extent < extents_.size(); ++extent) {
        const std::string where = "extent " + std::to_string(extent) + ": ";
        const Extent& each = extents_[extent];
        std::uint64_t here = 0;
        for (std::uint64_t i = 0; i < size_of(extent); ++i) {
            const auto id = static_cast<BlockId>(extent * blocks_per_extent_ + i);
            const bool has_references = references_[static_cast<std::size_t>(id)] > 0;
            if (is_free(id) && (has_references || !each.mapped)) return where + "a block is marked free and is not";
            if (has_references && !each.mapped) return where + "a block is held that is not mapped";
            if (each.mapped && !has_references && !is_free(id)) return where + "a block is lost";
            here += is_free(id) ? 1 : 0;
            held += has_references ? 1 : 0;
        }
        if (here != each.free) return where + "its count is stale";
        if (!each.mapped && extent < lowest_unmapped_) return where + "the lowest unmapped extent is stale";
        free += here;
        mapped += each.mapped ? 1 : 0;
    }
    std::uint64_t listed = 0;
    for (std::size_t count = 1; count < heads_.size(); ++count) {
        const bool any = (listed_[count / 64] & bit_of(count)) != 0;
        if (any != (heads_[count] != none)) return "the bits of the lists are stale";
        for (std::uint32_t at = heads_[count]; at != none; at = extents_[at].next) {
            if (!extents_[at].mapped || extents_[at].free != count) return "an extent is in the wrong list";
            ++listed;
        }
    }
    const auto with_room = static_cast<std::uint64_t>(
        std::count_if(extents_.begin(), extents_.end(), [](const Extent& each) { return each.free > 0; }));
    if (listed != with_room) return "an extent with room is in no list";
    if (held != held_ || free != free_mapped_ || mapped != mapped_extents_) return "the totals are stale";
    return {};
}

}  // namespace elastikv
