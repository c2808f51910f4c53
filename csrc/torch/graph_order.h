// The order of work in CUDA graphs while they are recorded.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include "heap/capture_order.h"

namespace elastikv::torch {

class GraphOrder final : public CaptureOrder {
  private:
    std::optional<Place> place_of(Stream stream) override;
    bool add_predecessors(const void* node, std::vector<const void*>& nodes) override;
};

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
