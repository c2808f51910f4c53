#include "torch/model_heap.h"

#include <utility>

namespace elastikv::torch {

ModelHeap::ModelHeap(std::unique_ptr<Region> region, const HeapOptions& options)
    : region_(std::move(region)),
      heap_(region_->model()->shared_pool(),
            {region_->base() - region_->model()->base_address(),
             region_->base() - region_->model()->base_address() + region_->size()},
            options) {}

ModelHeapPtr ModelHeap::make(const ModelPtr& model, Bytes addresses, const HeapOptions& options) {
    ModelHeapPtr made(new ModelHeap(model->reserve(addresses, heap_tag), options));
    // The heap as part of what owns it: whoever asks it for memory keeps both alive meanwhile.
    if (const auto& budget = model->shared_pool()->budget()) {
        budget->add_idle_holder(std::shared_ptr<IdleHolder>(made, &made->heap_));
    }
    return made;
}

}  // namespace elastikv::torch
