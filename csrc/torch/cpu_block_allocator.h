// torch's CPU allocator for a block of code: while a thread is in the block of a host model, what it allocates for CPU
// tensors comes from a heap on that model. Other threads, and this one outside, keep the allocator that was there.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "driver/fork_guard.h"
#include "torch/model_heap.h"

namespace elastikv::torch {

// A host model's heap, one a model. It lives while the model can be entered again or any of its memory is in a tensor.
// Thread safe.
class CpuBlock {
  public:
    explicit CpuBlock(ModelHeapPtr made) : heap_(std::move(made)) {}

    Heap& heap() { return heap_->heap(); }
    ModelHeap& model_heap() { return *heap_; }
    const ModelPtr& model() const { return heap_->model(); }
    bool forked() const { return process_.forked(); }

    void count_tensor() { tensors_.fetch_add(1, std::memory_order_relaxed); }
    // True for the last one.
    bool discount_tensor() { return tensors_.fetch_sub(1, std::memory_order_acq_rel) == 1; }
    // Nobody can enter its model any more, and no tensor needs its memory.
    bool idle() const;

  private:
    const ModelHeapPtr heap_;
    const ProcessGuard process_;
    std::atomic<std::int64_t> tensors_{0};  // that are alive
};
using CpuBlockPtr = std::shared_ptr<CpuBlock>;

// The model's heap for blocks, made at the first call, over half of the addresses that the model has free. The first
// call of a process puts our allocator in front of torch's, for good: outside of blocks it only passes requests on.
// Throws InvalidArgument for a model on another device, ModelNotFound once unregistered, OutOfVirtualMemory.
CpuBlockPtr cpu_block(const ModelPtr& model);
// The same, or null where there is none yet.
CpuBlockPtr find_cpu_block(const ModelPtr& model);

// From here on the calling thread's CPU allocations come from the block, until it leaves it. Blocks nest. In a child
// that is forked within, torch's allocator serves again.
void enter(const CpuBlockPtr& block);
// Throws InvalidArgument where the calling thread is not in the block.
void leave(const CpuBlockPtr& block);

// Forgets the heaps that nobody can use any more, which gives their memory back.
void drop_unused_cpu_blocks();

}  // namespace elastikv::torch
