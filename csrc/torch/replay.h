// Replays recorded allocations on torch's current CUDA allocator or on a heap, and times it.
#pragma once

#include <memory>
#include <vector>

#include "heap/types.h"

namespace elastikv {
class Heap;
}

namespace elastikv::torch {

enum class ReplayAction : std::uint8_t { allocate, free, record_stream };

struct ReplayOperation {
    Bytes size = 0;            // of an allocation
    std::uint32_t block = 0;   // each number is allocated once
    std::uint16_t stream = 0;  // where it is allocated or recorded; 0 is the default stream
    ReplayAction action = ReplayAction::allocate;
};

// A list of operations that make sense. Immutable, but for the streams of its own; replays may not run at once.
class Replay {
  public:
    // Throws InvalidArgument, naming the operation, where a block is allocated twice, used or freed while it is not
    // allocated, or empty, or where a stream's number is 32 or more: torch has no more streams of a priority.
    explicit Replay(std::vector<ReplayOperation> operations);

    // Both return nanoseconds of the operations alone, and free what is left then, also when they throw.
    // On torch's current CUDA allocator. Throws c10::OutOfMemoryError, InvalidArgument where this elastikv has no CUDA.
    std::int64_t run_on_cuda(int device);
    // Throws as Heap::allocate.
    std::int64_t run_on(Heap& heap);

    std::size_t size() const { return operations_.size(); }
    std::size_t blocks() const { return blocks_; }

  private:
    const std::vector<ReplayOperation> operations_;
    std::size_t blocks_ = 0;
    std::size_t streams_ = 1;
    std::vector<std::uintptr_t> handles_;  // of CUDA streams by number, the same in every replay
};

}  // namespace elastikv::torch
