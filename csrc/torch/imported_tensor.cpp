#include "torch/imported_tensor.h"

#include <c10/core/ScalarType.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

#include <memory>
#include <string>

#include "torch/elastic_block.h"

namespace elastikv::torch {

at::Tensor tensor_over(const ImportedRange& range, at::ScalarType dtype) {
    if (dtype == at::ScalarType::Undefined || c10::isQIntType(dtype)) {
        throw InvalidArgument(std::string("dtype ") + c10::toString(dtype) + " has no plain elements to lay out");
    }
    const auto type = c10::scalarTypeToTypeMeta(dtype);
    if (range.size % type.itemsize() != 0 || range.address() % type.itemsize() != 0) {
        throw InvalidArgument("a range of " + format_bytes(range.size) + " does not hold whole elements of " +
                              c10::toString(dtype));
    }
    auto keeper = std::make_unique<std::shared_ptr<ImportedMemory>>(range.memory);
    const c10::Device device = torch_device(range.memory->device());
    auto* const address = reinterpret_cast<void*>(static_cast<std::uintptr_t>(range.address()));
    c10::DataPtr data(
        address, keeper.release(), [](void* gone) { delete static_cast<std::shared_ptr<ImportedMemory>*>(gone); },
        device);
    c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), range.size,
                                                               std::move(data), /*allocator=*/nullptr,
                                                               /*resizable=*/false));
    const auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), type);
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous({static_cast<std::int64_t>(range.size / type.itemsize())});
    return tensor;
}

}  // namespace elastikv::torch
