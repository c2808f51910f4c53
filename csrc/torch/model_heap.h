// A heap on a model's share of the pool: what it hands out is charged to the model. No torch header here.
#pragma once

#include <memory>

#include "heap/heap.h"
#include "shared/model.h"

namespace elastikv::torch {

// Owns the addresses that its heap works in, and keeps the model. Thread safe, as its parts are.
class ModelHeap {
  public:
    // Takes `addresses` bytes of the model's, rounded up to pages; nothing is resident yet. The heap gives way when the
    // model's pool is short. Throws InvalidSize (0), OutOfVirtualMemory, ModelNotFound once unregistered.
    static std::shared_ptr<ModelHeap> make(const ModelPtr& model, Bytes addresses, const HeapOptions& options = {});

    // Waits for device work on the heap's memory and gives it back.
    ~ModelHeap() = default;
    ModelHeap(const ModelHeap&) = delete;
    ModelHeap& operator=(const ModelHeap&) = delete;

    Heap& heap() { return heap_; }
    const Heap& heap() const { return heap_; }
    const ModelPtr& model() const { return region_->model(); }
    Address base() const { return region_->base(); }
    Bytes addresses() const { return region_->size(); }
    // Throws ModelPaused. Of what is idle in the heap nothing may be handed out while it sleeps.
    void require_awake() const { region_->require_awake(); }
    bool contains(Address address) const { return address - region_->base() < region_->size(); }

  private:
    ModelHeap(std::unique_ptr<Region> region, const HeapOptions& options);

    const std::unique_ptr<Region> region_;
    Heap heap_;  // goes before the region
};

// Of all memory that is torch's own allocations within a model: see Model::pause.
inline constexpr const char* heap_tag = "use";

using ModelHeapPtr = std::shared_ptr<ModelHeap>;

}  // namespace elastikv::torch
