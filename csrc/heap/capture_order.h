// In which order the work will run that streams record into a graph.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "driver/vmm_driver.h"

namespace elastikv {

// Where a stream was in a graph that it recorded: its work until then is these nodes, or runs before them.
struct CapturePoint {
    Stream stream{};
    std::uint64_t capture = 0;
    std::vector<const void*> nodes{};
};

// What a heap asks to reuse memory within a graph. Called under the heap's lock: it must neither call the heap nor wait
// for anything.
class CaptureOrder {
  public:
    virtual ~CaptureOrder() = default;
    // None where the stream records no graph, or can't be asked.
    virtual std::optional<CapturePoint> point_of(Stream stream) noexcept = 0;
    // Whether all that `stream` records from now on runs after the work that the point stands for. False where the
    // stream does not record into the same graph.
    virtual bool runs_after(Stream stream, const CapturePoint& point) noexcept = 0;
};

}  // namespace elastikv
