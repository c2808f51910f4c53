// Tensors that grow and shrink in place.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <optional>
#include <string>
#include <vector>

#include "shared/model.h"
#include "torch/elastic_block.h"

namespace elastikv::torch {

struct ElasticShape {
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> max_shape;
    // The dimension that grows. Not set: the one in which the shapes differ, or the first if none does.
    std::optional<std::int64_t> dim;
    std::string tag{};  // see Model::reserve
};

// A tensor on the model's device whose addresses are reserved for max_shape while only `shape` is resident. Strides are
// those of max_shape, with every index of the dimensions before the growing one starting on a page. With `scrub`, bytes
// that become resident read as zero; without, they may hold what the same model wrote there, never another's.
// Throws InvalidArgument for shapes that don't fit each other, and the errors of ElasticBlock::grow.
at::Tensor empty(const ModelPtr& model, const ElasticShape& shape, at::ScalarType dtype, bool scrub);

// The two halves of empty(), for a caller that has something to do with the storage before a tensor holds it.
struct ElasticStorage {
    c10::Storage storage;
    std::vector<std::int64_t> shape;
    std::vector<std::int64_t> strides;
    caffe2::TypeMeta type;
    bool has_gaps = false;  // addresses without memory between its rows
};
ElasticStorage make_storage(const ModelPtr& model, const ElasticShape& shape, at::ScalarType dtype, bool scrub);
at::Tensor tensor_over(const ElasticStorage& made);

// Changes the length of the growing dimension in place: same object, same address, same storage, values kept; views
// that were taken before keep their own length. grow throws InvalidArgument beyond max_shape, below the present length,
// or for a tensor that is not the elastic tensor itself; shrink throws it above the present length, or while other
// tensors share the storage, as they may reach into what would be unmapped.
void grow(const at::Tensor& tensor, std::int64_t length, bool exact, const WaitOptions* wait = nullptr);
// `own_references` is how many the caller holds to the very tensor.
void shrink(const at::Tensor& tensor, std::int64_t length, std::size_t own_references = 1);

// What shrink() would refuse, without doing it.
void require_shrinkable(const at::Tensor& tensor, std::int64_t length, std::size_t own_references = 1);

// grow() in two halves, for several tensors at once: the memory is there, exactly, from construction on, while shapes
// stay as they are until commit(). Where that does not come, or construction throws what grow() does, everything goes
// back. A tensor may be in one StagedGrowth at a time. Not thread safe; the tensors may be read meanwhile.
class StagedGrowth {
  public:
    explicit StagedGrowth(const std::vector<std::pair<at::Tensor, std::int64_t>>& wanted);
    ~StagedGrowth() { drop(); }
    StagedGrowth(const StagedGrowth&) = delete;
    StagedGrowth& operator=(const StagedGrowth&) = delete;
    void commit();
    void drop() noexcept;

  private:
    struct Item {
        at::Tensor tensor;
        ElasticBlock* block;
        std::int64_t length;
    };
    std::vector<Item> items_;
};

// A contiguous tensor of fixed size on the model's memory, by ElasticAllocator: zero, charged to the model, freed with
// its last view. Throws InvalidArgument, OutOfVirtualMemory, ModelNotFound, c10::OutOfMemoryError.
at::Tensor zeros(const ModelPtr& model, const std::vector<std::int64_t>& shape, at::ScalarType dtype,
                 const std::string& tag = "");

// The block behind a tensor or a view of one, or null.
ElasticBlock* block_of(const at::Tensor& tensor);

// What every tensor on a block's memory is made of. The storage is not resizable: torch would replace the memory by its
// own. plain_type throws InvalidArgument for a dtype without plain elements.
caffe2::TypeMeta plain_type(at::ScalarType dtype);
c10::Storage storage_of(c10::DataPtr data, Bytes bytes);
at::Tensor tensor_on(c10::Storage storage, caffe2::TypeMeta type);
// How many tensors hold the storage.
std::size_t tensors_on(const c10::Storage& storage);

}  // namespace elastikv::torch
