// Which blocks of a paged cache are held, how often, and on which extents they lie. Bookkeeping only: no driver, no
// policy but one, the placement.
//
// Extents are numbered from the lowest address, and each has the same number of blocks, the last one perhaps fewer.
// What is taken together is likely to be freed together: so as much of a request as fills whole extents has extents of
// its own, as long as there are few holes elsewhere. Any other block goes to the fullest extent that has room, so that
// the emptier ones run out of blocks and can be given back; of several to the one that changed last. Extents to be
// mapped are those of the lowest addresses, unless the caller prefers others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace elastikv {

using BlockId = std::int64_t;

// Each call costs O(1) a block, and a step for each 64 blocks of an extent. Not thread safe.
class BlockMap {
  public:
    // Nothing is mapped, no block is held. Both at least 1, and together as many as 32 bits can count.
    BlockMap(std::uint64_t blocks, std::uint64_t blocks_per_extent);

    std::uint64_t blocks() const { return references_.size(); }
    std::uint64_t held() const { return held_; }
    // Free blocks on extents that are mapped, and on those that are not.
    std::uint64_t free_mapped() const { return free_mapped_; }
    std::uint64_t free_unmapped() const { return blocks() - held_ - free_mapped_; }
    std::uint64_t mapped_extents() const { return mapped_extents_; }
    std::uint64_t extents() const { return extents_.size(); }
    std::uint64_t extent_of(BlockId id) const { return static_cast<std::uint64_t>(id) / blocks_per_extent_; }
    bool is_mapped(std::uint64_t extent) const { return extents_[extent].mapped; }

    // How many whole extents a request for `count` blocks should have for itself.
    std::uint64_t worth_whole(std::uint64_t count) const;
    // Unmapped extents that give `count` blocks together, of which there must be as many, in order: first of those in
    // `preferred`, then those of the lowest addresses.
    std::vector<std::uint64_t> extents_for(std::uint64_t count, std::span<const std::uint64_t> preferred = {}) const;
    void map(std::uint64_t extent);
    // No block of it may be held.
    void unmap(std::uint64_t extent);

    // Takes free blocks of mapped extents, of which there must be as many, each with one reference.
    void take(std::span<BlockId> out);
    // The same from one extent, as many as it has and `out` holds; returns their number.
    std::size_t take_from(std::uint64_t extent, std::span<BlockId> out);
    // Drops a reference of each id, as often as it stands there; a block without any is free. All or none: where one is
    // not held, or not as often, its place in `ids` is returned and nothing has changed. Extents on which the last
    // block went are added to `emptied`.
    std::optional<std::size_t> drop(std::span<const BlockId> ids, std::vector<std::uint64_t>& emptied);
    // Takes back a drop() that went through, with nothing done since.
    void undo_drop(std::span<const BlockId> ids);
    // Adds a reference to each id. All or none, as above.
    std::optional<std::size_t> touch(std::span<const BlockId> ids);
    // 0 for a block that is free, and for an id that there is not.
    std::uint32_t references(BlockId id) const { return is_known(id) ? references_[static_cast<std::size_t>(id)] : 0; }
    bool is_known(BlockId id) const { return id >= 0 && static_cast<std::uint64_t>(id) < blocks(); }

    // Recounts everything from scratch; for tests. Returns what disagrees, empty if nothing does.
    std::string check() const;

  private:
    static constexpr std::uint32_t none = ~std::uint32_t{0};

    struct Extent {
        std::uint32_t free = 0;
        std::uint32_t previous = none;  // among mapped extents with as many free blocks
        std::uint32_t next = none;
        bool mapped = false;
    };

    std::uint32_t size_of(std::uint64_t extent) const;
    void list(std::uint32_t extent);
    void unlist(std::uint32_t extent);
    std::uint32_t fullest() const;
    void set_free(BlockId id);
    void set_held(BlockId id);
    bool is_free(BlockId id) const;
    std::size_t word_of(BlockId id) const;
    static std::uint64_t bit_of(std::uint64_t index) { return std::uint64_t{1} << (index % 64); }

    std::uint64_t blocks_per_extent_;
    std::uint64_t words_per_extent_;
    std::vector<Extent> extents_;
    std::vector<std::uint32_t> references_;  // by block
    std::vector<std::uint64_t> free_bits_;   // by extent, words_per_extent_ each; bits of unmapped extents are 0
    std::vector<std::uint32_t> heads_;       // by count of free blocks: the first extent of its list
    std::vector<std::uint64_t> listed_;      // a bit for each count whose list is not empty
    std::uint64_t lowest_unmapped_ = 0;      // no extent below it is unmapped
    std::uint64_t held_ = 0;
    std::uint64_t free_mapped_ = 0;
    std::uint64_t mapped_extents_ = 0;
};

}  // namespace elastikv
