// The memory behind slots: rows of equal pitch in one region, of which each has a resident front of its own.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "shared/model.h"

namespace elastikv::torch {

// A row starts on a page and on a whole token, so every row lies over its pages in the same way, and what one gives
// back is nobody else's.
struct SlotLayout {
    std::uint64_t rows = 0;
    std::uint64_t max_tokens = 0;  // of a row
    Bytes token = 0;               // bytes of one token
    Bytes pitch = 0;               // bytes from row to row: whole tokens and whole pages
    Bytes largest_extent = 0;      // of memory, whole pages; 0: any, and rows are not laid out to be forked

    Bytes row_offset(std::uint64_t row) const { return row * pitch; }
    Bytes size() const { return rows * pitch; }
};

// Throws InvalidArgument for zeros, OutOfVirtualMemory where 64 bits of addresses do not hold it.
// `largest_extent` is rounded up to pages.
SlotLayout slot_layout(std::uint64_t rows, std::uint64_t max_tokens, Bytes token, Bytes page, Bytes largest_extent = 0);

// How many tokens a row is to have memory for.
struct RowTokens {
    std::uint64_t row = 0;
    std::uint64_t tokens = 0;
};

// Owned by a storage's DataPtr, so it dies with the last view. Thread safe: its mutex is taken before the model's, and
// not held while room is made, so that whoever is asked for memory then may use the slots. While it is paused, what
// changes its memory throws ModelPaused. Rows and tokens are within the layout: the caller has checked them.
class SlotBlock {
  public:
    // Reserves the addresses; nothing is resident. Throws OutOfVirtualMemory, ModelNotFound.
    SlotBlock(const ModelPtr& model, SlotLayout layout, std::string tag = "");
    // The memory retires until work on the current stream and on recorded ones is done.
    ~SlotBlock();

    Address address() const { return region_->base(); }
    const ModelPtr& model() const { return region_->model(); }
    const SlotLayout& layout() const { return layout_; }

    // Memory for so many tokens in each of the rows, or in none; rows that have it already stay as they are. It comes
    // in whole pages, and unless `exact`, extents may reach further by a share of what the row holds of its own. Errors
    // are VirtualMemoryPool::allocate's.
    void grow(std::span<const RowTokens> rows, bool exact);
    // As grow, exactly; what it took can be given back whole, by drop_staged. Until then grow and shrink may go on.
    struct Taken {
        std::uint64_t row = 0;
        ByteRange bytes;  // offsets in the row
    };
    std::vector<Taken> stage(std::span<const RowTokens> rows);
    // Nobody has used it, or what rows grew to behind it, which goes too. What was shrunk away meanwhile has gone
    // already.
    void drop_staged(std::span<const Taken> taken) noexcept;
    // Gives back the pages behind so many tokens, in all of the rows or in none. Throws CudaError.
    void shrink(std::span<const RowTokens> rows);
    // Gives row `to`, which must hold nothing, the first `tokens` of row `from`, which has memory for them. Extents
    // that lie wholly within these tokens are shared by both rows, the rest is copied behind what the current stream
    // does; so a row may go on behind the fork at once, and asks for make_writable before it writes below. All or
    // nothing. Throws InvalidArgument, and the errors of VirtualMemoryPool::alias.
    void fork(std::uint64_t to, std::uint64_t from, std::uint64_t tokens);
    // The row's own copy of what it shares between the two tokens, beneath the same addresses, after the work of all
    // streams that use the slots. Costs nothing where nothing is shared. Errors are VirtualMemoryPool::make_writable's.
    void make_writable(std::uint64_t row, std::uint64_t begin, std::uint64_t end);
    // Moves the rows' memory to the host beneath its addresses, and back; see VirtualMemoryPool::spill. Return the
    // bytes moved.
    Bytes spill(std::span<const std::uint64_t> rows);
    Bytes unspill(std::span<const std::uint64_t> rows);
    void require_awake() const { region_->require_awake(); }
    // Maps pages up to so many tokens in the background; a hint.
    void prefetch(std::span<const RowTokens> rows);
    // Bytes that the row holds, whole pages.
    Bytes claimed(std::uint64_t row) const;
    Bytes claimed() const;  // all rows
    // What of it the row got by a fork: others pay for it, too.
    Bytes forked(std::uint64_t row) const;
    // The memory is used on this stream too: it retires until work on it is done.
    void record_stream(Stream stream);

    // Puts the block behind a DataPtr, which owns it from now on.
    static c10::DataPtr into_data_ptr(std::unique_ptr<SlotBlock> block);

  private:
    std::vector<Stream> users() const;
    void add_stream(Stream stream);
    std::vector<ByteRange> parts_of(std::span<const std::uint64_t> rows) const;
    Bytes pages_for(std::uint64_t tokens) const;
    ExtentSizes extents_for(Bytes end) const;
    std::vector<Taken> claim_rows(std::span<const RowTokens> rows, bool exact);
    std::vector<Taken> lacking_in(std::span<const RowTokens> rows) const;
    Bytes try_claim(std::span<const Taken> wanted, AllocateOptions options);
    Bytes try_fork(std::uint64_t to, std::uint64_t from, std::uint64_t tokens, const AllocateOptions& options);
    void give_back(std::span<const Taken> taken);

    const std::unique_ptr<Region> region_;
    const SlotLayout layout_;
    const Bytes page_;
    mutable std::mutex mutex_;
    std::vector<Bytes> claimed_;  // by row
    std::vector<Bytes> forked_;   // by row, of what is claimed
    std::vector<Stream> recorded_;
};

}  // namespace elastikv::torch
