// The CUDA C++ of decode_attention.h, behind element_source, compiled with -DDIM=... and -DGROUP=...: elements of a
// head, and query heads that share a KV head.
#pragma once

namespace elastikv::torch {

// One query of a row sees the row's keys, of which `gridDim.y` blocks each take a part. Decoding is bound by reading
// memory, so keys and values go from there into the registers that the matrix units take them from, with nothing in
// between.
//
// A warp has sixteen tokens at a time. Scores [head, token] are Q K^T and results [head, element] P V, by mma.m16n8k16
// with the group's heads as rows, of which at most eight are in use. A lane is `quad` = lane / 4 and `pair` = lane % 4
// in the instruction's tables. Which elements of a head an instruction takes together is free where they are summed
// over, and so is which one a column stands for where they are the result: both are chosen so that a lane reads 16
// bytes at a time.
//   Scores: a lane's 16 bytes are elements 32 j + 8 pair to + 7 of token `quad`, or quad + 8: enough for two
//   instructions. Results: they are elements 64 j + 8 quad to + 7 of tokens 2 pair, 2 pair + 1, and of 8 more each.
//   Element e of all goes into tile 8 j + e, whose column n is element 64 j + 8 n + e.
// Warps keep maxima and sums of their own, which are put together within the block, and in `combine` between blocks.
// Exponents are to base 2. Nothing beyond the row's length is read.
inline constexpr char decode_attention_source[] = R"cuda(
typedef unsigned Pair;  // the bits of two elements, the first one lower

constexpr int warps = 4;
constexpr int stride = warps * 16;  // tokens that a block has at a time
constexpr float none = -1e30f;      // below all scores, and finite, so that the difference of two is a number

#ifdef ELEMENT_FLOAT16
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif

struct alignas(16) FourPairs {
    Pair of[4];
};

__device__ inline FourPairs read(const Element* from) { return *reinterpret_cast<const FourPairs*>(from); }

__device__ inline Pair packed(float first, float second) {
    Pair out;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
}

// to[head, column] += left[head, k] * right[k, column], for the upper eight of sixteen rows: the others are zero.
__device__ inline void multiply(float (&to)[2], Pair left_low, Pair left_high, Pair right_low, Pair right_high) {
    float unused[2];
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
        ".f32 {%0,%1,%2,%3}, {%4,%8,%5,%8}, {%6,%7}, {%0,%1,%9,%9};"
        : "+f"(to[0]), "+f"(to[1]), "=f"(unused[0]), "=f"(unused[1])
        : "r"(left_low), "r"(left_high), "r"(right_low), "r"(right_high), "r"(0), "f"(0.0f));
}

extern "C" __global__ void __launch_bounds__(warps * 32, 3)
    attend(const Element* query, const Element* keys, const Element* values, const int* starts, const int* lengths,
           float* sums_out, float* bounds_out, Element* out, int kv_heads, float scale, long long query_row,
           long long query_head, long long keys_token, long long keys_head, long long values_token,
           long long values_head) {
    const int row = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
    const int length = lengths[row];
    const int share = ((length + gridDim.y - 1) / gridDim.y + stride - 1) / stride * stride;
    const int begin = blockIdx.y * share, end = min(length, begin + share);

    FourPairs q[DIM / 32] = {};
    if (quad < GROUP) {
        const Element* const head = query + row * query_row + (kv_head * GROUP + quad) * query_head + pair * 8;
#pragma unroll
        for (int j = 0; j < DIM / 32; ++j) q[j] = read(head + j * 32);
    }
    float acc[DIM / 8][2] = {}, most = none, sum = 0;  // of head `quad`
    const Element* const first_key = keys + starts[row] * keys_token + kv_head * keys_head + pair * 8;
    const Element* const first_value = values + starts[row] * values_token + kv_head * values_head + quad * 8;

    for (int base = begin + warp * 16; base < end; base += stride) {
        FourPairs key[2][DIM / 32] = {}, val[4][DIM / 64] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = base + half * 8 + quad;
#pragma unroll
            for (int j = 0; j < DIM / 32; ++j) {
                if (token < end) key[half][j] = read(first_key + token * keys_token + j * 32);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = base + i / 2 * 8 + pair * 2 + i % 2;
#pragma unroll
            for (int j = 0; j < DIM / 64; ++j) {
                if (token < end) val[i][j] = read(first_value + token * values_token + j * 64);
            }
        }

        float score[2][2] = {}, now = most;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < DIM / 32; ++j) {
                const FourPairs &left = q[j], &right = key[half][j];
                multiply(score[half], left.of[0], left.of[1], right.of[0], right.of[1]);
                multiply(score[half], left.of[2], left.of[3], right.of[2], right.of[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool there = base + half * 8 + pair * 2 + i < end;
                score[half][i] = there ? score[half][i] * scale : 2 * none;
                now = fmaxf(now, score[half][i]);
            }
        }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        const float fade = exp2f(most - now);
        if (__any_sync(~0u, most != now)) {
            sum *= fade;
#pragma unroll
            for (int tile = 0; tile < DIM / 8; ++tile) {
                acc[tile][0] *= fade;
                acc[tile][1] *= fade;
            }
            most = now;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                score[half][i] = exp2f(score[half][i] - now);
                sum += score[half][i];
            }
        }
        const Pair left_low = packed(score[0][0], score[0][1]), left_high = packed(score[1][0], score[1][1]);
#pragma unroll
        for (int j = 0; j < DIM / 64; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const unsigned chosen = e % 2 == 0 ? 0x5410 : 0x7632;  // the first or the second of two pairs
                multiply(acc[j * 8 + e], left_low, left_high,
                         __byte_perm(val[0][j].of[e / 2], val[1][j].of[e / 2], chosen),
                         __byte_perm(val[2][j].of[e / 2], val[3][j].of[e / 2], chosen));
            }
        }
    }

    __shared__ float block_acc[warps][GROUP][DIM], block_sum[warps][GROUP], block_most[warps][GROUP];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quad < GROUP) {
#pragma unroll
        for (int tile = 0; tile < DIM / 8; ++tile) {
            float* const to = block_acc[warp][quad] + tile / 8 * 64 + tile % 8 + pair * 16;
            to[0] = acc[tile][0];
            to[8] = acc[tile][1];
        }
        block_sum[warp][quad] = sum;
        block_most[warp][quad] = most;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * DIM; i += warps * 32) {
        const int g = i / DIM, d = i % DIM;
        float now = none, total = 0, result = 0;
        for (int w = 0; w < warps; ++w) now = fmaxf(now, block_most[w][g]);
        for (int w = 0; w < warps; ++w) {
            const float weight = exp2f(block_most[w][g] - now);
            total += block_sum[w][g] * weight;
            result += block_acc[w][g][d] * weight;
        }
        const long long head = (static_cast<long long>(row) * kv_heads + kv_head) * GROUP + g;
        if (gridDim.y == 1) {
            out[head * DIM + d] = bits(result / total);
            continue;
        }
        const long long place = head * gridDim.y + blockIdx.y;
        sums_out[place * DIM + d] = result;
        if (d == 0) {
            bounds_out[place * 2] = now;
            bounds_out[place * 2 + 1] = total;
        }
    }
}

// A block a row and query head, COMBINING threads an element: each takes every so many part, of up to MOST_SPLITS.
extern "C" __global__ void combine(const float* sums, const float* bounds, Element* out, int splits) {
    __shared__ float weights[MOST_SPLITS], total, results[COMBINING][DIM];
    constexpr int turns = MOST_SPLITS / 32, each = MOST_SPLITS / COMBINING;
    const long long first = static_cast<long long>(blockIdx.x) * splits;
    const int element = threadIdx.x % DIM, share = threadIdx.x / DIM;
    float parts[each];  // on their way while the weights are found
#pragma unroll
    for (int k = 0; k < each; ++k) {
        const int s = share + k * COMBINING;
        parts[k] = s < splits ? sums[(first + s) * DIM + element] : 0;
    }
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        float mine[turns], sum[turns];
        for (int k = 0; k < turns; ++k) {
            const int s = lane + 32 * k;
            mine[k] = s < splits ? bounds[(first + s) * 2] : none;
            sum[k] = s < splits ? bounds[(first + s) * 2 + 1] : 0;
        }
        float most = none;
        for (int k = 0; k < turns; ++k) most = fmaxf(most, mine[k]);
        for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
        float all = 0;
        for (int k = 0; k < turns; ++k) {
            const float weight = exp2f(mine[k] - most);
            weights[lane + 32 * k] = weight;
            all += sum[k] * weight;
        }
        for (int other = 16; other > 0; other /= 2) all += __shfl_xor_sync(~0u, all, other);
        if (lane == 0) total = all;
    }
    __syncthreads();
    float result = 0;
#pragma unroll
    for (int k = 0; k < each; ++k) result += parts[k] * weights[share + k * COMBINING];
    results[share][element] = result;
    __syncthreads();
    if (share > 0) return;
    for (int other = 1; other < COMBINING; ++other) result += results[other][element];
    out[static_cast<long long>(blockIdx.x) * DIM + element] = bits(result / total);
}
)cuda";

}  // namespace elastikv::torch
