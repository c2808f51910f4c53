// A heap's errors on their way into torch.
#pragma once

#include "heap/heap.h"

namespace elastikv::torch {

// To be called where one of them was caught: memory that is short becomes torch's out-of-memory error, with who holds
// what; all else is thrown on as it is.
[[noreturn]] void rethrow_for_torch(const Heap& heap, Bytes requested);

}  // namespace elastikv::torch
