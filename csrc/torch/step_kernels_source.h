// The CUDA C++ of step_kernels.h.
#pragma once

namespace elastikv::torch {

// Both take a thread a row.
inline constexpr char step_kernels_source[] = R"cuda(
extern "C" __global__ void plan(const int* all_lengths, const long long* slots, const long long* starts,
                                long long* positions, long long* places, int* lengths, int* first, int* seen,
                                int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int length = all_lengths[slots[row]];
    positions[row] = length;
    places[row] = starts[row] + length;
    lengths[row] = length;
    seen[row] = length + 1;
    first[row] = static_cast<int>(starts[row]);
    if (row == rows - 1) first[rows] = first[row];
}

// Without lengths nothing was stored before.
extern "C" __global__ void take(const long long* chosen, long long* tokens, long long* count, long long* history,
                                bool* ended, bool* ended_here, const long long* limits, const long long* stops,
                                const long long* pad, int stops_in_all, long long capacity, int* all_lengths,
                                const long long* slots, const int* lengths, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    bool over = ended[row];
    if (lengths != nullptr) all_lengths[slots[row]] = lengths[row] + !over;  // several rows may share the idle slot
    const long long token = over ? *pad : chosen[row];
    if (!over) {
        const long long place = count[row];
        history[row * capacity + (place < capacity ? place : capacity - 1)] = token;
        count[row] = place + 1;
    }
    for (int i = 0; i < stops_in_all; ++i) over |= token == stops[i];
    over |= count[row] >= limits[row];
    tokens[row] = token;
    ended[row] = over;
    ended_here[row] = over;
}
)cuda";

}  // namespace elastikv::torch
