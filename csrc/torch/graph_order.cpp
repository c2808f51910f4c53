#include "torch/graph_order.h"

#if ELASTIKV_TORCH_CUDA

#include <algorithm>
#include <exception>
#include <vector>

namespace elastikv::torch {
namespace {

// Whether all of these let a node begin only once the one before it has ended.
bool all_order(const cudaGraphEdgeData* edges, std::size_t count) {
    if (edges == nullptr) return true;
    return std::all_of(edges, edges + count,
                       [](const cudaGraphEdgeData& edge) { return edge.type == cudaGraphDependencyTypeDefault; });
}

// CUDA 13 gave these names to what were their third and second versions.
cudaError_t capture_of(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                       const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, std::size_t* count) {
#if CUDART_VERSION >= 13000
    return cudaStreamGetCaptureInfo(stream, status, id, nullptr, nodes, edges, count);
#else
    return cudaStreamGetCaptureInfo_v3(stream, status, id, nullptr, nodes, edges, count);
#endif
}

cudaError_t predecessors(cudaGraphNode_t node, cudaGraphNode_t* nodes, cudaGraphEdgeData* edges, std::size_t* count) {
#if CUDART_VERSION >= 13000
    return cudaGraphNodeGetDependencies(node, nodes, edges, count);
#else
    return cudaGraphNodeGetDependencies_v2(node, nodes, edges, count);
#endif
}

}  // namespace

// Adds to `found` these nodes and those that run before them, but for what is behind those that are in it already.
// False where it can't be sure that they do.
bool GraphOrder::look_back(std::vector<const void*> from, std::unordered_set<const void*>& found) {
    std::vector<cudaGraphNode_t> nodes;
    std::vector<cudaGraphEdgeData> edges;
    while (!from.empty()) {
        const void* const node = from.back();
        from.pop_back();
        if (!found.insert(node).second) continue;
        auto* const handle = static_cast<cudaGraphNode_t>(const_cast<void*>(node));
        std::size_t count = 0;
        if (predecessors(handle, nullptr, nullptr, &count) != cudaSuccess) return false;
        if (count == 0) continue;
        nodes.resize(count);
        edges.resize(count);
        if (predecessors(handle, nodes.data(), edges.data(), &count) != cudaSuccess) return false;
        if (!all_order(edges.data(), count)) return false;
        from.insert(from.end(), nodes.begin(), nodes.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return true;
}

std::optional<CapturePoint> GraphOrder::now(Stream stream, bool* unsure) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const cudaGraphNode_t* nodes = nullptr;
    const cudaGraphEdgeData* edges = nullptr;
    std::size_t count = 0;
    auto* const handle = reinterpret_cast<cudaStream_t>(stream.value);
    if (capture_of(handle, &status, &id, &nodes, &edges, &count) != cudaSuccess) {
        (void)cudaGetLastError();  // ours, and nobody else's to find
        status = cudaStreamCaptureStatusNone;
    }
    if (status != cudaStreamCaptureStatusActive) {
        before_.erase(stream.value);
        return std::nullopt;
    }
    if (unsure != nullptr) *unsure = !all_order(edges, count);
    return CapturePoint{stream, id, {nodes, nodes + count}};
}

std::optional<CapturePoint> GraphOrder::point_of(Stream stream) noexcept {
    try {
        return now(stream);
    } catch (const std::exception&) {  // out of host memory
        return std::nullopt;
    }
}

bool GraphOrder::runs_after(Stream stream, const CapturePoint& point) noexcept {
    try {
        bool unsure = false;
        const auto here = now(stream, &unsure);
        if (!here || unsure || here->capture != point.capture) return false;
        Before& before = before_[stream.value];
        if (before.capture != here->capture) before = {here->capture, {}, false};
        if (!before.unsure) before.unsure = !look_back(here->nodes, before.nodes);
        return !before.unsure && std::all_of(point.nodes.begin(), point.nodes.end(),
                                             [&](const void* node) { return before.nodes.contains(node); });
    } catch (const std::exception&) {
        return false;
    }
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
