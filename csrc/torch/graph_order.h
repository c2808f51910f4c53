// The order of work in CUDA graphs while they are recorded.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include <cuda_runtime_api.h>

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "heap/capture_order.h"

namespace elastikv::torch {

// Follows the graph's edges back from where a stream is, and remembers what it has found before the stream, so that a
// capture costs a look at each node once a stream. Behind a programmatic edge, which lets a kernel begin before another
// has ended, nothing counts as ordered. Not thread safe: its heap's lock guards it.
class GraphOrder final : public CaptureOrder {
  public:
    std::optional<CapturePoint> point_of(Stream stream) noexcept override;
    bool runs_after(Stream stream, const CapturePoint& point) noexcept override;

  private:
    struct Before {
        std::uint64_t capture = 0;
        std::unordered_set<const void*> nodes;
        bool unsure = false;  // there is a programmatic edge among them
    };
    static bool look_back(std::vector<const void*> from, std::unordered_set<const void*>& found);
    std::optional<CapturePoint> now(Stream stream, bool* unsure = nullptr);

    std::unordered_map<std::uintptr_t, Before> before_;  // by stream, of those that recorded at the last look
};

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
