// In which order the work will run that streams record into a graph.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "driver/vmm_driver.h"

namespace elastikv {

// Where a stream was in a graph that it recorded: its work until then is these nodes, or runs before them.
struct CapturePoint {
    Stream stream{};
    std::uint64_t capture = 0;
    std::vector<const void*> nodes{};
};

// What a heap asks to reuse memory within a graph, whoever knows the graph. Follows its edges back from where a stream
// is, and remembers what it found there: a capture costs a look at each node once a stream. Behind an edge that lets a
// node begin before another has ended nothing counts as ordered.
//
// Not thread safe; the heap's lock guards it. A graph is its recorder's while it is recorded, so `look` is for the
// thread that is about to use the stream.
class CaptureOrder {
  public:
    virtual ~CaptureOrder() = default;

    // The graph that the stream records; 0 where it records none, or can't be asked.
    std::uint64_t capture_of(Stream stream) noexcept;
    std::optional<CapturePoint> point_of(Stream stream) noexcept;

    // Where is the stream now? False where it records no graph, or what it runs after can't be told.
    bool look(Stream stream) noexcept;
    // Whether all that the stream of the last look, which was true, records from then on runs after the point's work.
    bool passed(const CapturePoint& point) const noexcept;

  protected:
    struct Place {
        std::uint64_t capture = 0;
        std::vector<const void*> nodes{};  // what is recorded next depends on these
        bool strictly = true;              // and on their end
    };
    // None where the stream records no graph. They must neither call the heap nor wait; they may throw bad_alloc.
    virtual std::optional<Place> place_of(Stream stream) = 0;
    // Adds what a node depends on. False where it can't, or the node may begin before one of these has ended.
    virtual bool add_predecessors(const void* node, std::vector<const void*>& nodes) = 0;

  private:
    struct Before {
        std::uint64_t capture = 0;
        std::unordered_set<const void*> nodes{};
        bool unsure = false;  // for good: what is behind a node that was not found out is not known
    };

    std::unordered_map<std::uintptr_t, Before> before_;  // by stream
    const Before* looked_at_ = nullptr;
};

}  // namespace elastikv
