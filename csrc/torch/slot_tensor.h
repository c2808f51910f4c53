// Slots: the keys and values of many sequences of different lengths, each in a row of its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "torch/slot_block.h"

namespace elastikv::torch {

// Addresses for `rows` rows of `max_tokens` tokens of `token_elements` elements, on a storage that no tensor holds yet.
struct SlotStorage {
    c10::Storage storage;
    SlotBlock* block = nullptr;  // the storage's
    caffe2::TypeMeta type;
    std::int64_t token_elements = 0;
};
// Throws InvalidArgument, OutOfVirtualMemory, ModelNotFound.
SlotStorage make_slot_storage(const ModelPtr& model, std::int64_t rows, std::int64_t max_tokens,
                              std::int64_t token_elements, at::ScalarType dtype, Bytes largest_extent = 0,
                              std::string tag = "");

// Owns the storage, and hands out windows on it. Each row has memory for as many tokens as it was grown to; the rest of
// its addresses are reserved, and touching them is a fault. Never scrubbed: what is read, its owner wrote before.
//
// Thread safe as far as the memory goes; windows are to be made by one thread.
class SlotTensor {
  public:
    explicit SlotTensor(SlotStorage made);

    std::int64_t rows() const { return static_cast<std::int64_t>(layout().rows); }
    std::int64_t max_tokens() const { return static_cast<std::int64_t>(layout().max_tokens); }
    // Tokens from row to row.
    std::int64_t pitch() const { return static_cast<std::int64_t>(layout().pitch / layout().token); }
    const SlotLayout& layout() const { return made_.block->layout(); }
    SlotBlock& block() { return *made_.block; }

    // [rows * pitch, *shape]: of every token the elements from `offset` on. It reaches over addresses without memory,
    // so it is for kernels that are told the lengths, and for cutting exact views from. Kept for as long as this lives.
    // Throws InvalidArgument for what is not within a token, ModelPaused.
    at::Tensor window(std::int64_t offset, const std::vector<std::int64_t>& shape);

    // Tokens by row, as in SlotBlock. Throws InvalidArgument for lists of unequal length, rows and tokens that are
    // outside; shrink also while others hold views, which could reach into what is given back.
    void grow(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens, bool exact);
    void shrink(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens);
    void prefetch(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens);
    // Of single rows, as in SlotBlock. Throws InvalidArgument for what is outside, too.
    void fork(std::int64_t to, std::int64_t from, std::int64_t tokens);
    void make_writable(std::int64_t row, std::int64_t begin, std::int64_t end);
    Bytes spill(const std::vector<std::int64_t>& rows);
    Bytes unspill(const std::vector<std::int64_t>& rows);
    // Tokens that the row has memory for.
    std::int64_t resident(std::int64_t row) const;
    // Tokens of these that it got by a fork.
    std::int64_t forked(std::int64_t row) const;
    // Tensors on the memory besides the windows.
    std::size_t views() const;

  private:
    friend class StagedSlots;
    std::vector<std::uint64_t> checked_rows(const std::vector<std::int64_t>& rows, const char* doing) const;
    std::vector<RowTokens> checked(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens,
                                   const char* doing) const;

    SlotStorage made_;
    std::vector<at::Tensor> windows_;
};

// Rows' growth in two halves, as StagedGrowth is for elastic tensors: from construction on the memory is there,
// exactly; commit() keeps it, drop(), or the end of the object, gives it back. The slots may grow and shrink meanwhile,
// but rows that have grown beyond what is staged must not be used there before it is decided. Not thread safe.
class StagedSlots {
  public:
    // Throws what SlotTensor::grow does.
    StagedSlots(std::shared_ptr<SlotTensor> slots, const std::vector<std::int64_t>& rows,
                const std::vector<std::int64_t>& tokens);
    ~StagedSlots() { drop(); }
    StagedSlots(const StagedSlots&) = delete;
    StagedSlots& operator=(const StagedSlots&) = delete;

    void commit() noexcept { taken_.clear(); }
    void drop() noexcept;

  private:
    std::shared_ptr<SlotTensor> slots_;
    std::vector<SlotBlock::Taken> taken_;
};

}  // namespace elastikv::torch
