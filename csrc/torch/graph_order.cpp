#include "torch/graph_order.h"

#if ELASTIKV_TORCH_CUDA

#include <cuda_runtime_api.h>

#include <algorithm>

namespace elastikv::torch {
namespace {

// Whether all of these let a node begin only once the one before it has ended.
bool strict(const cudaGraphEdgeData* edges, std::size_t count) {
    if (edges == nullptr) return true;
    return std::all_of(edges, edges + count, [](const cudaGraphEdgeData& edge) {
        return edge.type == cudaGraphDependencyTypeDefault && edge.from_port == 0 && edge.to_port == 0;
    });
}

// CUDA 13 gave their names to the third and second versions of these functions.
cudaError_t capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                         const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, std::size_t* count) {
#if CUDART_VERSION >= 13000
    return cudaStreamGetCaptureInfo(stream, status, id, nullptr, nodes, edges, count);
#else
    return cudaStreamGetCaptureInfo_v3(stream, status, id, nullptr, nodes, edges, count);
#endif
}

cudaError_t dependencies(cudaGraphNode_t node, cudaGraphNode_t* nodes, cudaGraphEdgeData* edges, std::size_t* count) {
#if CUDART_VERSION >= 13000
    return cudaGraphNodeGetDependencies(node, nodes, edges, count);
#else
    return cudaGraphNodeGetDependencies_v2(node, nodes, edges, count);
#endif
}

bool succeeded(cudaError_t result) {
    if (result == cudaSuccess) return true;
    (void)cudaGetLastError();  // ours, and nobody else's to find
    return false;
}

}  // namespace

std::optional<CaptureOrder::Place> GraphOrder::place_of(Stream stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const cudaGraphNode_t* nodes = nullptr;
    const cudaGraphEdgeData* edges = nullptr;
    std::size_t count = 0;
    auto* const handle = reinterpret_cast<cudaStream_t>(stream.value);
    if (!succeeded(capture_info(handle, &status, &id, &nodes, &edges, &count))) return std::nullopt;
    if (status != cudaStreamCaptureStatusActive) return std::nullopt;
    Place place;
    place.capture = id;
    place.nodes.assign(nodes, nodes + count);
    place.strictly = strict(edges, count);
    return place;
}

bool GraphOrder::add_predecessors(const void* node, std::vector<const void*>& nodes) {
    auto* const handle = static_cast<cudaGraphNode_t>(const_cast<void*>(node));
    std::vector<cudaGraphNode_t> found(16);
    std::vector<cudaGraphEdgeData> edges(found.size());
    while (true) {  // asked for the number alone, without edges, it would refuse where one is not strict
        std::size_t count = found.size();
        if (!succeeded(dependencies(handle, found.data(), edges.data(), &count))) return false;
        if (count < found.size()) {
            nodes.insert(nodes.end(), found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count));
            return strict(edges.data(), count);
        }
        found.resize(2 * found.size());
        edges.resize(found.size());
    }
}

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
