// Tensors over all blocks of a BlockPool, one a layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "shared/block_pool.h"

namespace elastikv::torch {

struct BlockShape {
    std::uint64_t blocks = 0;
    std::uint64_t layers = 0;
    std::vector<std::int64_t> shape;  // of one layer's part of a block, as [2, block_size, heads, dim]
    at::ScalarType dtype = at::ScalarType::Undefined;
    Bytes extent = 0;   // what is wanted; 0: see BlockLayout::fit
    std::string tag{};  // see Model::reserve
    Bytes ahead = 0;    // see BlockPool
};

// A block holds all layers' parts, one behind the other, so that one extent serves all layers of its tokens. The tensor
// of a layer is [blocks, *shape], strided. It covers blocks that are not mapped: only those that are held may be
// touched. Tensors keep the addresses reserved and the object behind pool() alive. Immutable, so thread safe.
class BlockTensors {
  public:
    // Throws InvalidArgument for a shape or dtype that can't be, and the errors of BlockLayout::fit and BlockPool.
    BlockTensors(const ModelPtr& model, BlockShape shape);

    const std::shared_ptr<BlockPool>& pool() const { return pool_; }
    const BlockShape& shape() const { return shape_; }
    // Of all blocks. Not resizable; its bytes are not all mapped.
    c10::Storage make_storage() const;
    // `storage` is one of make_storage(). Throws InvalidArgument where there is no such layer.
    at::Tensor layer(c10::Storage storage, std::int64_t index) const;

  private:
    const BlockShape shape_;
    const Bytes layer_bytes_;
    const std::shared_ptr<BlockPool> pool_;
};

}  // namespace elastikv::torch
