// The CUDA C++ of decode_kernels.h and decode_attention.h, compiled with -DELEMENT_FLOAT16 or for bfloat16. No headers:
// they would take NVRTC ten times as long as the kernels.
#pragma once

namespace elastikv::torch {

// What both begin with.
inline constexpr char element_source[] = R"cuda(
typedef unsigned short Element;  // the bits of one

#ifdef ELEMENT_FLOAT16
__device__ inline float value(Element bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}
__device__ inline Element bits(float value) {
    Element out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}
#else
__device__ inline float value(Element bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
__device__ inline Element bits(float value) {
    Element out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}
#endif

struct alignas(16) Eight {
    Element of[8];
};

__device__ inline Eight load(const Element* from) { return *reinterpret_cast<const Eight*>(from); }
)cuda";

// Elements are loaded by eights where a comment says so: sizes and strides are multiples of eight then, and addresses
// of 16 bytes. Every intermediate result that transformers' models round is rounded here, so that results are the same.
inline constexpr char decode_kernels_source[] = R"cuda(
__device__ inline float rounded(float exact) { return value(bits(exact)); }

// A block a row of `size` elements, side by side; by eights.
extern "C" __global__ void rms_norm(const Element* states, const Element* weight, Element* out, int size, float eps) {
    const Element* const row = states + static_cast<long long>(blockIdx.x) * size;
    __shared__ float sums[32];
    float sum = 0;
    for (int i = threadIdx.x * 8; i < size; i += blockDim.x * 8) {
        const Eight part = load(row + i);
        for (int k = 0; k < 8; ++k) sum += value(part.of[k]) * value(part.of[k]);
    }
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += sums[warp];
    const float scale = rsqrtf(sum / size + eps);
    for (int i = threadIdx.x * 8; i < size; i += blockDim.x * 8) {
        const Eight part = load(row + i), factor = load(weight + i);
        Eight result;
        for (int k = 0; k < 8; ++k) result.of[k] = bits(value(factor.of[k]) * rounded(value(part.of[k]) * scale));
        *reinterpret_cast<Eight*>(out + static_cast<long long>(blockIdx.x) * size + i) = result;
    }
}

// Blocks of x are rows, of which there may be more than y can count.

// A block a row and head, queries before keys; the results' heads lie side by side.
extern "C" __global__ void rotate(const Element* query, const Element* key, const Element* cosines,
                                  const Element* sines, Element* query_out, Element* key_out, int query_heads,
                                  int key_heads, int dim, long long query_row, long long query_head, long long key_row, long long key_head,
                                  long long cosine_row, long long sine_row) {
    const int row = blockIdx.x, half = dim / 2;
    const bool is_key = blockIdx.y >= query_heads;
    const int head = is_key ? blockIdx.y - query_heads : blockIdx.y;
    const Element* const from = is_key ? key + row * key_row + head * key_head
                                       : query + row * query_row + head * query_head;
    Element* const to = is_key ? key_out + (static_cast<long long>(row) * key_heads + head) * dim
                               : query_out + (static_cast<long long>(row) * query_heads + head) * dim;
    const Element* const cosine = cosines + row * cosine_row;
    const Element* const sine = sines + row * sine_row;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float a = value(from[i]), b = value(from[i + half]);
        to[i] = bits(rounded(a * value(cosine[i])) + rounded(-b * value(sine[i])));
        to[i + half] = bits(rounded(b * value(cosine[i + half])) + rounded(a * value(sine[i + half])));
    }
}

// A block a row and head: one token's key and value to its place in the windows, or without places to that number in each
// pitch.
extern "C" __global__ void store(Element* keys, Element* values, const long long* places, long long pitch, long long number, const Element* key,
                                 const Element* value, int key_dim, int value_dim, long long keys_token,
                                 long long keys_head, long long values_token, long long values_head, long long key_row,
                                 long long key_head, long long value_row, long long value_head) {
    const long long head = blockIdx.y, row = blockIdx.x;
    const long long place = places != nullptr ? places[row] : row * pitch + number;
    for (int i = threadIdx.x; i < key_dim; i += blockDim.x) {
        keys[place * keys_token + head * keys_head + i] = key[row * key_row + head * key_head + i];
    }
    for (int i = threadIdx.x; i < value_dim; i += blockDim.x) {
        values[place * values_token + head * values_head + i] = value[row * value_row + head * value_head + i];
    }
}

// SiLU of one times the other: a column of blocks a row, eight elements a thread; the result's rows lie side by side.
extern "C" __global__ void gate(const Element* gates, const Element* factors, Element* out, int size,
                                long long gates_row, long long factors_row) {
    const long long row = blockIdx.x;
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (i >= size) return;
    const Eight left = load(gates + row * gates_row + i), right = load(factors + row * factors_row + i);
    Eight result;
    for (int k = 0; k < 8; ++k) {
        const float x = value(left.of[k]);
        result.of[k] = bits(rounded(x / (1.0f + expf(-x))) * value(right.of[k]));
    }
    *reinterpret_cast<Eight*>(out + row * size + i) = result;
}

// A block a position; the results lie side by side.
extern "C" __global__ void angles(const long long* positions, const float* frequencies, Element* cosines, Element* sines,
                                  int half, float scaling) {
    const long long token = blockIdx.x;
    const float position = static_cast<float>(positions[token]);
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const float angle = position * frequencies[i];
        const Element cosine = bits(cosf(angle) * scaling), sine = bits(sinf(angle) * scaling);
        Element* const to = cosines + token * 2 * half + i;
        Element* const sines_to = sines + token * 2 * half + i;
        to[0] = to[half] = cosine;
        sines_to[0] = sines_to[half] = sine;
    }
}

// Larger for larger elements, and then for earlier ones. Zeros are equal; what is no number is above all.
__device__ inline unsigned long long rank(Element element, int index) {
    unsigned order = element;
    const float number = value(element);
    if (number != number) {
        order = 0x1ffff;
    } else if (number == 0) {
        order = 0x8000;
    } else {
        order = order & 0x8000 ? 0xffff - order : order | 0x8000;
    }
    return static_cast<unsigned long long>(order) << 32 | (0x7fffffffu - index);
}

// A block a row; by eights.
extern "C" __global__ void likeliest(const Element* logits, long long* out, int size, long long row) {
    const Element* const from = logits + blockIdx.x * row;
    __shared__ unsigned long long found[32];
    unsigned long long best = 0;
    for (int i = threadIdx.x * 8; i < size; i += blockDim.x * 8) {
        const Eight part = load(from + i);
        for (int k = 0; k < 8; ++k) best = max(best, rank(part.of[k], i + k));
    }
    for (int lane = 16; lane > 0; lane /= 2) best = max(best, __shfl_xor_sync(~0u, best, lane));
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = threadIdx.x < blockDim.x / 32 ? found[threadIdx.x] : 0;
    for (int lane = 16; lane > 0; lane /= 2) best = max(best, __shfl_xor_sync(~0u, best, lane));
    if (threadIdx.x == 0) out[blockIdx.x] = 0x7fffffffu - static_cast<unsigned>(best);
}
)cuda";

}  // namespace elastikv::torch
