// Which block starts at an address, among those that are handed out.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "heap/arena.h"

namespace elastikv {

// A hash table with open addressing: every allocation and every free goes through it, and a table of nodes would cost
// each of them as much as the rest of the heap's books. Not thread safe.
class BlockTable {
  public:
    // No block with that address is there.
    void insert(Block* block) {
        if ((size_ + 1) * 2 > slots_.size()) grow();
        ++size_;
        place(block);
    }

    Block* find(Address address) const {
        if (slots_.empty()) return nullptr;
        for (std::size_t at = home(address);; at = next(at)) {
            if (slots_[at].block == nullptr || slots_[at].address == address) return slots_[at].block;
        }
    }

    // Returns what was there, or null.
    Block* take(Address address) {
        if (slots_.empty()) return nullptr;
        std::size_t at = home(address);
        while (slots_[at].block != nullptr && slots_[at].address != address) at = next(at);
        Block* const found = slots_[at].block;
        if (found == nullptr) return nullptr;
        close_gap(at);
        --size_;
        return found;
    }

    std::size_t size() const { return size_; }

  private:
    struct Slot {
        Address address = 0;
        Block* block = nullptr;  // null: empty
    };

    std::size_t next(std::size_t at) const { return (at + 1) & (slots_.size() - 1); }
    std::size_t home(Address address) const {
        constexpr std::uint64_t golden = 0x9e3779b97f4a7c15;
        return static_cast<std::size_t>(((address / heap_unit) * golden) >> shift_);
    }

    void place(Block* block) {
        std::size_t at = home(block->address);
        while (slots_[at].block != nullptr) at = next(at);
        slots_[at] = {block->address, block};
    }

    // Moves up what was displaced past the gap, so that no search ends before its time.
    void close_gap(std::size_t gap) {
        const std::size_t mask = slots_.size() - 1;
        for (std::size_t at = next(gap); slots_[at].block != nullptr; at = next(at)) {
            const std::size_t displaced = (at - home(slots_[at].address)) & mask;
            if (displaced < ((at - gap) & mask)) continue;
            slots_[gap] = slots_[at];
            gap = at;
        }
        slots_[gap] = {};
    }

    void grow() {
        const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(slots_.empty() ? 64 : slots_.size() * 2));
        shift_ = 64;
        for (std::size_t slots = slots_.size(); slots > 1; slots /= 2) --shift_;
        for (const Slot& slot : old) {
            if (slot.block != nullptr) place(slot.block);
        }
    }

    std::vector<Slot> slots_;  // a power of two, at most half full
    std::size_t size_ = 0;
    int shift_ = 64;
};

}  // namespace elastikv
