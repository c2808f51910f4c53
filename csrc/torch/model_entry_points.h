// C entry points that serve from one model, for a torch.cuda.MemPool of it. torch gives such functions no argument of
// their own, so there is a table of them: a model takes a slot of the table, and the slot's functions are its.
//
// torch calls them under its allocator's lock: they neither need the GIL nor allocate from torch. It asks for segments
// and cuts them up itself, so each is a region of the model.
#pragma once

#include <cstdint>

#include "shared/model.h"

namespace elastikv::torch {

inline constexpr int model_slots = 128;

// Takes a handle to the model's slot, which is the same until the last handle is released and the last segment freed.
// Throws InvalidArgument for a model that is not on a CUDA device, and where all slots are taken; ModelNotFound once
// unregistered.
int take_model_slot(const ModelPtr& model);
void release_model_slot(int slot) noexcept;

struct EntryPoints {
    std::uintptr_t allocate = 0;  // void*(size_t, int, cudaStream_t)
    std::uintptr_t free = 0;      // void(void*, size_t, int, cudaStream_t)
};
EntryPoints entry_points_of(int slot);

// Bytes of segments that torch has from the model.
Bytes model_slot_bytes(const ModelPtr& model);
int model_slots_taken();

}  // namespace elastikv::torch
