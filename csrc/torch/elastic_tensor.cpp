#include "torch/elastic_tensor.h"

#include <c10/core/ScalarType.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <limits>
#include <string>
#include <utility>

#include "torch/elastic_allocator.h"

namespace elastikv::torch {
namespace {

using Sizes = std::vector<std::int64_t>;

std::string format(at::IntArrayRef sizes) {
    std::string text = "(";
    for (std::size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + ")";
}

std::int64_t growing_dim(const ElasticShape& wanted) {
    const Sizes& shape = wanted.shape;
    const Sizes& max_shape = wanted.max_shape;
    const auto dims = static_cast<std::int64_t>(max_shape.size());
    const std::string both = "shape " + format(shape) + ", max_shape " + format(max_shape);
    if (dims == 0 || shape.size() != max_shape.size()) {
        throw InvalidArgument("shape and max_shape need the same number of dimensions, at least 1: " + both);
    }
    std::int64_t dim = -1;
    for (std::int64_t i = 0; i < dims; ++i) {
        if (max_shape[i] < 1) throw InvalidArgument("every dimension of max_shape must be at least 1: " + both);
        if (shape[i] < 0 || shape[i] > max_shape[i]) {
            throw InvalidArgument("dimension " + std::to_string(i) +
                                  " of shape must be between 0 and max_shape's: " + both);
        }
        if (shape[i] == max_shape[i]) continue;
        if (dim >= 0)
            throw InvalidArgument("shape and max_shape may differ in one dimension only, the one that grows: " + both);
        dim = i;
    }
    if (!wanted.dim) return dim < 0 ? 0 : dim;
    const std::int64_t asked = *wanted.dim < 0 ? *wanted.dim + dims : *wanted.dim;
    if (asked < 0 || asked >= dims) {
        throw InvalidArgument("dim " + std::to_string(*wanted.dim) + " is not a dimension of " + format(max_shape));
    }
    if (dim >= 0 && dim != asked) {
        throw InvalidArgument("shape and max_shape differ in dimension " + std::to_string(dim) +
                              ", not in the growing one, " + std::to_string(asked) + ": " + both);
    }
    return asked;
}

Bytes checked_product(Bytes a, Bytes b, const Sizes& max_shape) {
    if (a != 0 && b > static_cast<Bytes>(std::numeric_limits<std::int64_t>::max()) / a) {
        throw OutOfVirtualMemory(std::numeric_limits<Bytes>::max(),
                                 "max_shape " + format(max_shape) + " does not fit 64 bits of addresses");
    }
    return a * b;
}

struct Placement {
    RowLayout layout;
    TensorGeometry geometry;
};

Placement place(const Sizes& max_shape, std::int64_t dim, Bytes item, Bytes page) {
    Placement placed;
    placed.geometry = {max_shape, Sizes(max_shape.size(), 1), dim, item};
    Sizes& strides = placed.geometry.strides;
    RowLayout& layout = placed.layout;
    Bytes stride = 1;  // in elements
    for (std::int64_t i = static_cast<std::int64_t>(max_shape.size()) - 1; i >= 0; --i) {
        if (i == dim - 1) {
            // Rows start on pages of their own, so that what one gives back is nobody else's.
            const auto padded = align_up(checked_product(stride, item, max_shape), page);
            stride = padded.value_or(0) / item;
        }
        strides[i] = static_cast<std::int64_t>(stride);
        if (i == dim) layout.unit = checked_product(stride, item, max_shape);
        stride = checked_product(stride, static_cast<Bytes>(max_shape[i]), max_shape);
    }
    checked_product(stride, item, max_shape);
    layout.max_length = static_cast<std::uint64_t>(max_shape[dim]);
    for (std::int64_t i = 0; i < dim; ++i) layout.rows *= static_cast<std::uint64_t>(max_shape[i]);
    layout.stride = dim > 0 ? static_cast<Bytes>(strides[dim - 1]) * item : layout.max_length * layout.unit;
    return placed;
}

// True for the elastic tensor itself and for older aliases of it that differ in length only.
bool is_whole(const at::Tensor& tensor, const TensorGeometry& geometry) {
    const bool same_kind = tensor.storage_offset() == 0 && tensor.itemsize() == geometry.itemsize &&
                           tensor.dim() == static_cast<std::int64_t>(geometry.max_shape.size());
    if (!same_kind) return false;
    for (std::int64_t i = 0; i < tensor.dim(); ++i) {
        const bool size_fits =
            i == geometry.dim ? tensor.size(i) <= geometry.max_shape[i] : tensor.size(i) == geometry.max_shape[i];
        if (!size_fits || tensor.stride(i) != geometry.strides[i]) return false;
    }
    return true;
}

struct Target {
    ElasticBlock* block;
    std::int64_t dim;
};

Target checked_target(const at::Tensor& tensor, const char* doing) {
    ElasticBlock* const block = block_of(tensor);
    if (block == nullptr || block->geometry().max_shape.empty()) {
        throw InvalidArgument(std::string(doing) + " needs a tensor made by elastikv.empty, not one of shape " +
                              format(tensor.sizes()) + " on other memory");
    }
    if (tensor.requires_grad()) throw InvalidArgument(std::string(doing) + " can't change a tensor that requires grad");
    if (!is_whole(tensor, block->geometry())) {
        throw InvalidArgument(std::string(doing) + " needs the elastic tensor itself, not a view of it of shape " +
                              format(tensor.sizes()));
    }
    if (!tensor.unsafeGetTensorImpl()->allow_tensor_metadata_change()) {
        throw InvalidArgument(std::string(doing) + " can't change a detached alias; use the elastic tensor itself");
    }
    return {block, block->geometry().dim};
}

// How many references to a storage its Python wrapper has, which is no tensor and checks its bounds: 0 or 1. The
// wrapper holds the storage strongly, except in torch up to 2.9 while the storage is what keeps the wrapper alive.
template <typename Slot>
std::size_t references_of_wrapper(Slot& slot) {
    if constexpr (requires { slot.owns_pyobj(); }) {
        const auto wrapper = slot.check_pyobj(/*ignore_hermetic_tls=*/true);
        return wrapper.has_value() && *wrapper != nullptr && !slot.owns_pyobj() ? 1 : 0;
    } else {
        return slot.load_pyobj() != nullptr ? 1 : 0;
    }
}

void set_length(const at::Tensor& tensor, const Target& target, std::int64_t length) {
    Sizes sizes = tensor.sizes().vec();
    sizes[target.dim] = length;
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, tensor.strides().vec());
}

void set_storage_size(const at::Tensor& tensor, const ElasticBlock& block) {
    tensor.storage().unsafeGetStorageImpl()->set_nbytes(block.layout().reach(block.length()));
}

Target checked_growth(const at::Tensor& tensor, std::int64_t length) {
    const Target target = checked_target(tensor, "grow_");
    const std::int64_t present = tensor.size(target.dim);
    const std::uint64_t most = target.block->layout().max_length;
    if (length < present) {
        throw InvalidArgument("grow_ to length " + std::to_string(length) + ", below the present " +
                              std::to_string(present) + "; use shrink_");
    }
    if (static_cast<std::uint64_t>(length) > most) {
        throw InvalidArgument("grow_ to length " + std::to_string(length) + ", beyond max_shape's " +
                              std::to_string(most));
    }
    return target;
}

Target checked_shrink(const at::Tensor& tensor, std::int64_t length, std::size_t own_references) {
    const Target target = checked_target(tensor, "shrink_");
    const std::int64_t present = tensor.size(target.dim);
    if (length < 0 || length > present) {
        throw InvalidArgument("shrink_ to length " + std::to_string(length) +
                              ", which is not between 0 and the present " + std::to_string(present));
    }
    if (static_cast<std::uint64_t>(length) == target.block->length()) return target;
    // Other tensors share the storage; other holders of this very tensor (DLPack, autograd) share its implementation.
    const std::size_t others = tensors_on(tensor.storage()) - 1 + tensor.use_count() - own_references;
    if (others > 0) {
        throw InvalidArgument(
            "shrink_ while " + std::to_string(others) +
            " others (views, slices, exports) share the storage: they could reach into memory that is "
            "given back. Drop them first");
    }
    return target;
}

}  // namespace

std::size_t tensors_on(const c10::Storage& storage) {
    return storage.use_count() - references_of_wrapper(*storage.unsafeGetStorageImpl()->pyobj_slot());
}

caffe2::TypeMeta plain_type(at::ScalarType dtype) {
    if (dtype == at::ScalarType::Undefined || c10::isQIntType(dtype)) {
        throw InvalidArgument(std::string("dtype ") + c10::toString(dtype) + " has no plain elements to lay out");
    }
    return c10::scalarTypeToTypeMeta(dtype);
}

c10::Storage storage_of(c10::DataPtr data, Bytes bytes) {
    return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                              std::move(data),
                                                              /*allocator=*/nullptr, /*resizable=*/false));
}

at::Tensor tensor_on(c10::Storage storage, caffe2::TypeMeta type) {
    const auto key = storage.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    return at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), type);
}

at::Tensor zeros(const ModelPtr& model, const Sizes& shape, at::ScalarType dtype, const std::string& tag) {
    const auto type = plain_type(dtype);
    Bytes bytes = type.itemsize();
    for (const std::int64_t size : shape) {
        if (size < 0) throw InvalidArgument("a size below 0 in shape " + format(shape));
        bytes = checked_product(bytes, static_cast<Bytes>(size), shape);
    }
    at::Tensor tensor = tensor_on(storage_of(ElasticAllocator(model, true, tag).allocate(bytes), bytes), type);
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
    return tensor;
}

ElasticStorage make_storage(const ModelPtr& model, const ElasticShape& wanted, at::ScalarType dtype, bool scrub) {
    const std::int64_t dim = growing_dim(wanted);
    const auto type = plain_type(dtype);
    const Placement placed = place(wanted.max_shape, dim, type.itemsize(), model->pool().page_size());
    auto block = std::make_unique<ElasticBlock>(model, placed.layout, placed.geometry, scrub, wanted.tag);
    block->grow(static_cast<std::uint64_t>(wanted.shape[dim]), true);
    const Bytes reach = placed.layout.reach(block->length());
    return {storage_of(ElasticBlock::into_data_ptr(std::move(block)), reach), wanted.shape, placed.geometry.strides,
            type, placed.layout.rows > 1};
}

at::Tensor tensor_over(const ElasticStorage& made) {
    at::Tensor tensor = tensor_on(made.storage, made.type);
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(made.shape, made.strides);
    return tensor;
}

at::Tensor empty(const ModelPtr& model, const ElasticShape& wanted, at::ScalarType dtype, bool scrub) {
    return tensor_over(make_storage(model, wanted, dtype, scrub));
}

void grow(const at::Tensor& tensor, std::int64_t length, bool exact, const WaitOptions* wait) {
    const Target target = checked_growth(tensor, length);
    target.block->grow(static_cast<std::uint64_t>(length), exact, wait);
    set_storage_size(tensor, *target.block);
    set_length(tensor, target, length);
}

void require_shrinkable(const at::Tensor& tensor, std::int64_t length, std::size_t own_references) {
    (void)checked_shrink(tensor, length, own_references);
}

void shrink(const at::Tensor& tensor, std::int64_t length, std::size_t own_references) {
    const Target target = checked_shrink(tensor, length, own_references);
    if (static_cast<std::uint64_t>(length) == target.block->length()) return;
    target.block->shrink(static_cast<std::uint64_t>(length));
    set_storage_size(tensor, *target.block);
    set_length(tensor, target, length);
}

StagedGrowth::StagedGrowth(const std::vector<std::pair<at::Tensor, std::int64_t>>& wanted) {
    items_.reserve(wanted.size());  // so that what is staged is always listed
    try {
        for (const auto& [tensor, length] : wanted) {
            const Target target = checked_growth(tensor, length);
            target.block->stage(static_cast<std::uint64_t>(length));
            items_.push_back({tensor, target.block, length});
        }
    } catch (...) {
        drop();
        throw;
    }
}

void StagedGrowth::commit() {
    for (const Item& item : items_) {
        item.block->commit_staged();
        set_storage_size(item.tensor, *item.block);
        set_length(item.tensor, {item.block, item.block->geometry().dim}, item.length);
    }
    items_.clear();
}

void StagedGrowth::drop() noexcept {
    for (const Item& item : items_) item.block->drop_staged();
    items_.clear();
}

ElasticBlock* block_of(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return nullptr;
    return ElasticBlock::from(tensor.storage().data_ptr());
}

}  // namespace elastikv::torch
