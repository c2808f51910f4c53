// Python values that need torch's headers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Storage.h>

#include "bindings/bindings.h"

namespace elastikv::bindings {

// A torch.dtype; TypeError for anything else.
at::ScalarType to_dtype(const py::handle& object);
// A torch.Tensor; TypeError for anything else.
at::Tensor to_tensor(const py::handle& object);

// Gives the storage a Python face that refuses to be read as a whole, as it has gaps without memory between the rows.
// To be done before a tensor holds the storage, which keeps its face from then on.
void guard_gaps(c10::Storage& storage);

}  // namespace elastikv::bindings
