// Graphs that streams record, drawn by a test.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include "heap/capture_order.h"

namespace elastikv::testing {

// Nodes are numbers from 1 on.
class DrawnGraph final : public CaptureOrder {
  public:
    using Node = std::uintptr_t;
    struct Stand {
        std::uint64_t capture = 1;
        std::vector<Node> nodes{};
        bool strictly = true;
    };

    // Where streams are; those that are not in here record nothing.
    std::map<std::uintptr_t, Stand> at;
    std::map<Node, std::vector<Node>> edges;  // from a node to those before it
    std::vector<Node> loose;                  // nodes that may begin before those ahead of them have ended
    int looks = 0;                            // at nodes

    // A node on the stream, behind what it stands at.
    Node record(std::uintptr_t stream) {
        const Node node = ++last_;
        edges[node] = at[stream].nodes;
        at[stream].nodes = {node};
        return node;
    }
    // What `stream` records from now on runs after what `other` has recorded.
    void join(std::uintptr_t stream, std::uintptr_t other) {
        Stand& here = at[stream];
        here.capture = at[other].capture;
        here.nodes.insert(here.nodes.end(), at[other].nodes.begin(), at[other].nodes.end());
    }

  private:
    static const void* pointer(Node node) { return reinterpret_cast<const void*>(node); }
    std::optional<Place> place_of(Stream stream) override {
        const auto found = at.find(stream.value);
        if (found == at.end()) return std::nullopt;
        Place place{found->second.capture, {}, found->second.strictly};
        for (const Node node : found->second.nodes) place.nodes.push_back(pointer(node));
        return place;
    }
    bool add_predecessors(const void* node, std::vector<const void*>& nodes) override {
        ++looks;
        const auto number = reinterpret_cast<Node>(node);
        for (const Node each : edges.at(number)) nodes.push_back(pointer(each));
        return std::find(loose.begin(), loose.end(), number) == loose.end();
    }

    Node last_ = 0;
};

}  // namespace elastikv::testing
