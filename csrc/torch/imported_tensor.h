// A tensor over memory of another process.
#pragma once

#include <ATen/core/Tensor.h>

#include "shared/range_export.h"

namespace elastikv::torch {

// One dimension over the whole range, which it keeps mapped. Throws InvalidArgument where the range is not a whole
// number of elements, or does not start on a multiple of their size.
at::Tensor tensor_over(const ImportedRange& range, at::ScalarType dtype);

}  // namespace elastikv::torch
