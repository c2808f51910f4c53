// The memory behind one tensor: a region of a model's addresses, and which part of it is resident.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "shared/model.h"

namespace elastikv::torch {

// Rows of equal stride, of which the same front is resident in each. A tensor that grows along its first dimension is
// one row; one that grows along dimension d has a row for each index of the dimensions before d, each on pages of its
// own.
struct RowLayout {
    std::uint64_t rows = 1;
    Bytes stride = 0;              // from row to row
    Bytes unit = 0;                // bytes of a row for each index of the growing dimension
    std::uint64_t max_length = 0;  // of the growing dimension

    Bytes row_offset(std::uint64_t row) const { return row * stride; }
    // Where the last resident byte ends, counted from the first row.
    Bytes reach(std::uint64_t length) const { return length == 0 ? 0 : (rows - 1) * stride + length * unit; }
};

// How a tensor lies over the rows. Empty for memory that does not grow.
struct TensorGeometry {
    std::vector<std::int64_t> max_shape;
    std::vector<std::int64_t> strides;  // in elements
    std::int64_t dim = 0;               // the one that grows
    Bytes itemsize = 0;
};

// Owned by a storage's DataPtr, so it dies with the last view. Thread safe: its mutex is taken before the model's, and
// not held while room is made or waited for, so that whoever is asked for memory then may use the block. While it is
// paused, what changes its memory throws ModelPaused.
class ElasticBlock {
  public:
    // Reserves addresses for max_length; nothing is resident. Throws OutOfVirtualMemory, ModelNotFound.
    ElasticBlock(const ModelPtr& model, RowLayout layout, TensorGeometry geometry, bool scrub, std::string tag = "");
    // The memory retires until work on the current stream and on recorded ones is done.
    ~ElasticBlock();

    Address address() const { return region_->base(); }
    const ModelPtr& model() const { return region_->model(); }
    const RowLayout& layout() const { return layout_; }
    const TensorGeometry& geometry() const { return geometry_; }
    std::uint64_t length() const;
    Bytes resident_bytes() const { return length() * layout_.unit * layout_.rows; }

    // All rows or none. Growing to a length that is resident already does nothing.
    // `exact`: maps no further than `length`. `wait`: in line, where memory is short. Errors are
    // VirtualMemoryPool::allocate's.
    void grow(std::uint64_t length, bool exact, const WaitOptions* wait = nullptr);
    // grow() in two halves. Memory up to `length` is made resident, exactly, while the length stays as it is; then it
    // counts, or goes back. Meanwhile grow, shrink and stage throw InvalidArgument. A length that is resident already
    // is staged at no cost.
    void stage(std::uint64_t length);
    void commit_staged() noexcept;
    void drop_staged() noexcept;
    // Gives back what lies beyond `length` in every row, or in none. Throws CudaError.
    void shrink(std::uint64_t length);
    // Moves the memory to the host beneath its addresses, and back; see VirtualMemoryPool::spill. Return the bytes
    // moved.
    Bytes spill();
    Bytes unspill();
    // Maps pages up to `length` in the background.
    void prefetch(std::uint64_t length);
    // The memory is used on this stream too: it retires until work on it is done.
    void record_stream(Stream stream);

    // Puts the block behind a DataPtr, which owns it from now on.
    static c10::DataPtr into_data_ptr(std::unique_ptr<ElasticBlock> block);
    // The block behind a DataPtr, or null if it is not elastic.
    static ElasticBlock* from(const c10::DataPtr& data);

  private:
    void claim_rows(std::uint64_t length, bool exact, const WaitOptions* wait, const std::function<void()>& claimed);
    Bytes try_claim_rows(std::uint64_t length, AllocateOptions options);
    void require_none_staged() const;
    std::vector<Stream> users() const;
    void add_stream(Stream stream);
    std::vector<ByteRange> row_parts(std::uint64_t rows, Bytes begin, Bytes end) const;

    const std::unique_ptr<Region> region_;
    const RowLayout layout_;
    const TensorGeometry geometry_;
    const bool scrub_;
    mutable std::mutex mutex_;
    std::uint64_t length_ = 0;
    std::optional<std::uint64_t> staged_;  // the length that memory is held for, where that is beyond length_
    std::vector<Stream> recorded_;
};

c10::Device torch_device(const Capabilities& device);

}  // namespace elastikv::torch
