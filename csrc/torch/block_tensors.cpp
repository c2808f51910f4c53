#include "torch/block_tensors.h"

#include <limits>
#include <string>
#include <utility>

#include "torch/elastic_block.h"
#include "torch/elastic_tensor.h"
#include "torch/interpreter.h"

namespace elastikv::torch {
namespace {

using PoolPtr = std::shared_ptr<BlockPool>;

void release_pool(void* context) {
    const auto deleter = [](void* pool) { delete static_cast<PoolPtr*>(pool); };
    delete_memory_of(*(*static_cast<PoolPtr*>(context))->model(), deleter, context);
}

Bytes bytes_of_layer(const BlockShape& shape) {
    if (shape.layers == 0) throw InvalidArgument("a block needs at least 1 layer");
    if (shape.shape.empty()) throw InvalidArgument("the shape of a block needs at least 1 dimension");
    constexpr Bytes most = std::numeric_limits<std::int64_t>::max();
    Bytes bytes = plain_type(shape.dtype).itemsize();
    const auto grow_by = [&](Bytes factor) {
        if (factor > most / bytes) throw OutOfVirtualMemory(most, "for one block, which does not fit 63 bits");
        bytes *= factor;
    };
    for (const std::int64_t size : shape.shape) {
        if (size < 1) throw InvalidArgument("a block can't have a dimension of " + std::to_string(size));
        grow_by(static_cast<Bytes>(size));
    }
    const Bytes layer = bytes;
    grow_by(shape.layers);
    return layer;
}

}  // namespace

BlockTensors::BlockTensors(const ModelPtr& model, BlockShape shape)
    : shape_(std::move(shape)),
      layer_bytes_(bytes_of_layer(shape_)),
      pool_(std::make_shared<BlockPool>(
          model,
          BlockLayout::fit(shape_.blocks, shape_.layers * layer_bytes_, model->pool().page_size(), shape_.extent),
          shape_.tag, shape_.ahead)) {}

c10::Storage BlockTensors::make_storage() const {
    const BlockLayout& layout = pool_->layout();
    auto* const base = reinterpret_cast<void*>(static_cast<std::uintptr_t>(pool_->base()));
    auto owner = std::make_unique<PoolPtr>(pool_);
    const c10::Device device = torch_device(pool_->model()->pool().device());
    c10::DataPtr data(base, owner.release(), &release_pool, device);
    const Bytes extents = (layout.blocks + layout.blocks_per_extent() - 1) / layout.blocks_per_extent();
    return storage_of(std::move(data), extents * layout.extent);
}

at::Tensor BlockTensors::layer(c10::Storage storage, std::int64_t index) const {
    if (index < 0 || static_cast<std::uint64_t>(index) >= shape_.layers) {
        throw InvalidArgument("layer " + std::to_string(index) + " is not between 0 and " +
                              std::to_string(shape_.layers - 1));
    }
    const auto type = plain_type(shape_.dtype);
    const auto item = static_cast<std::int64_t>(type.itemsize());
    std::vector<std::int64_t> sizes{static_cast<std::int64_t>(shape_.blocks)};
    std::vector<std::int64_t> strides(shape_.shape.size() + 1);
    sizes.insert(sizes.end(), shape_.shape.begin(), shape_.shape.end());
    std::int64_t stride = 1;
    for (std::size_t i = shape_.shape.size(); i > 0; --i) {
        strides[i] = stride;
        stride *= sizes[i];
    }
    strides[0] = static_cast<std::int64_t>(pool_->layout().stride) / item;
    at::Tensor tensor = tensor_on(std::move(storage), type);
    const std::int64_t offset = index * static_cast<std::int64_t>(layer_bytes_) / item;
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
    return tensor;
}

}  // namespace elastikv::torch
