// A c10::Allocator on a model's share of the pool: what it allocates is charged to the model.
#pragma once

#include <c10/core/Allocator.h>

#include <string>
#include <utility>

#include "shared/model.h"

namespace elastikv::torch {

// For tensors on the model's device, CPU or CUDA. Each allocation is an extent of its own, on pages of its own: meant
// for few large blocks, not for every activation. Holds the model; must outlive no tensor. Thread safe.
class ElasticAllocator final : public c10::Allocator {
  public:
    explicit ElasticAllocator(ModelPtr model, bool scrub = true, std::string tag = "")
        : model_(std::move(model)), scrub_(scrub), tag_(std::move(tag)) {}

    // The bytes are zero unless scrub is off. 0 bytes give a null pointer. Throws c10::OutOfMemoryError with who holds
    // what; other faults are VmmErrors.
    c10::DataPtr allocate(std::size_t bytes) override;
    // Asynchronous on CUDA: ordered on the current stream.
    void copy_data(void* to, const void* from, std::size_t bytes) const override;

  private:
    const ModelPtr model_;
    const bool scrub_;
    const std::string tag_;
};

}  // namespace elastikv::torch
