// Many rows of X (prompts), float16, on Hopper: weights made float16 in registers are one operand of the warpgroup's
// matrix product, X in shared memory is the other.
//
// A block makes 128 outputs for kTokens rows of X. Two warpgroups make weights and multiply; a third brings X into the
// order of levels.cuh, a few chunks ahead. Making the weights of a chunk overlaps with the products of the one before.
#pragma once

#include "cuda/halves.cuh"
#include "cuda/warpgroup.cuh"

namespace qbb::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPromptTiles = 8;    // of 16 outputs: four for each of two warpgroups
constexpr int kPromptThreads = 3 * kWarpgroup;
constexpr int kPromptStages = 3;   // chunks of X in shared memory
constexpr int kHalfChunk = 64;     // inputs whose rows are 128 bytes, which is as far as the swizzle goes

template <int kTokens>
constexpr int kStageBytes = kTokens * kChunk * 2;

template <int kTokens>
constexpr size_t kPromptMemory = size_t{kPromptStages} * kStageBytes<kTokens> + 1024;  // and room to align it

#if QBB_WARPGROUP_PRODUCTS

// A chunk of all rows of X into a stage.
template <int kTokens>
__device__ __forceinline__ void stage_chunk(char* stage, const uint16_t* x, int chunk, int here, int K, bool aligned,
                                            int thread) {
  for (int i = thread; i < kTokens * kChunkWords; i += kWarpgroup) {
    const int word = i % kChunkWords, row = i / kChunkWords;
    uint4 raw[4] = {};
    if (row < here) load_word(raw, x + static_cast<int64_t>(row) * K, chunk * kChunk + word * QBB_WORD_BITS, K, aligned);
    uint32_t r[16];
    spread(r, raw);
    char* to = stage + row * 128 + word * 4;
#pragma unroll
    for (int i4 = 0; i4 < 4; ++i4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // pair (i4 + 4j, i4 + 4j + 16): step 2·i4 + j / 2, its first or second eight inputs
        const int piece = (i4 % 2 * 2 + j / 2) * 2 + j % 2;
        *reinterpret_cast<uint32_t*>(to + i4 / 2 * kTokens * 128 + (piece ^ (row % 8)) * 16) = pair_of(r, i4, j);
      }
    }
  }
}

// Four of a chunk's eight steps of weights: the first, or the second half.
template <int kPart>
__device__ __forceinline__ void make_weights(uint32_t (&a)[4][4], const Part<kPart>& p, int half) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t c0 = codes<kPart>(p.w0, 2 * half + i), c1 = codes<kPart>(p.w1, 2 * half + i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      look_up<kPart>(a[2 * i + h][0], a[2 * i + h][2], p.l0, c0, h);
      look_up<kPart>(a[2 * i + h][1], a[2 * i + h][3], p.l1, c1, h);
    }
  }
}

__device__ __forceinline__ void add_pairs(uint32_t (&a)[4][4], const uint32_t (&b)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a[s][i]), *reinterpret_cast<const __half2*>(&b[s][i]));
      a[s][i] = *reinterpret_cast<const uint32_t*>(&sum);
    }
  }
}

#endif

// float16 X and scales; groups that are 2^n chunks, or whole rows. blockIdx.y: blocks of kTokens rows of X.
template <int kBases, int kTokens>
__global__ void __launch_bounds__(kPromptThreads, 1) prompt(const Weights w, const Rows rows) {
#if QBB_WARPGROUP_PRODUCTS
  uint4* memory = block_memory();
  __shared__ uint64_t full[kPromptStages], empty[kPromptStages];
  char* stages = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroup;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const int row = static_cast<int>(blockIdx.y) * kTokens, here = min(rows.M - row, kTokens);
  if (thread == 0) {
    for (int s = 0; s < kPromptStages; ++s) {
      init_barrier(&full[s], kWarpgroup);
      init_barrier(&empty[s], 2 * kWarpgroup);
    }
    show_barriers();
  }
  __syncthreads();
  if (group == 2) {
    give_registers<56>();
    const auto* x = static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * w.K;
    const bool aligned = w.K % 8 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
    wait_for_previous_kernel();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % kPromptStages, turn = chunk / kPromptStages;
      if (turn > 0) wait_for(&empty[stage], (turn - 1) % 2);
      stage_chunk<kTokens>(stages + stage * kStageBytes<kTokens>, x, chunk, here, w.K, aligned, thread % kWarpgroup);
      show_stores();
      arrive(&full[stage]);
    }
    return;
  }
  take_registers<224>();
  const int lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x) * kPromptTiles + warp, mine = min(tile, w.tiles - 1);
  const Lane own = lane_of(lane);
  const float inverse = 1.0f / w.unit;
  Chunk<kBases> next[1];
  load_chunks(next, w, own, mine, 0);
  float sums[kTokens / 2] = {};
  uint32_t a[2][4][4];  // weights of half a chunk, while those of the half before are still being multiplied
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % kPromptStages, turn = chunk / kPromptStages;
    const Chunk<kBases> now = next[0];
    load_chunks(next, w, own, mine, min(chunk + 1, chunks - 1));
    const float2 z = make_float2(now.offset.x * inverse, now.offset.y * inverse);
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    const Part<kPart> part = part_of<0, kPart>(now, inverse, z);
    [[maybe_unused]] Part<2> rest;
    if constexpr (kBases == 4) rest = part_of<2, 2>(now, inverse, make_float2(0.0f, 0.0f));
    const uint32_t x = shared_address(stages + stage * kStageBytes<kTokens>);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      make_weights(a[half], part, half);
      if constexpr (kBases == 4) {
        uint32_t b[4][4];
        make_weights(b, rest, half);
        add_pairs(a[half], b);
      }
      if (half == 0) wait_for(&full[stage], turn % 2);
      begin_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        start_product(sums, a[half][s], descriptor(x + static_cast<uint32_t>(half * kTokens * 128 + s * 32)));
      }
      end_products();
      wait_for_products<1>();
      if (half == 0 && chunk > 0) arrive(&empty[(chunk - 1) % kPromptStages]);
    }
  }
  wait_for_products<0>();
  let_next_kernel_start();
  if (tile >= w.tiles) return;
  const int out = tile * QBB_TILE_ROWS + lane / 4 * 2;
  const float2 bias = make_float2(w.bias == nullptr || out >= w.N ? 0.0f : w.bias[out],
                                  w.bias == nullptr || out + 1 >= w.N ? 0.0f : w.bias[out + 1]);
  auto* y = static_cast<__half*>(rows.y);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = n * 8 + lane % 4 * 2 + i;
      if (r >= here) continue;
      const int64_t at = static_cast<int64_t>(row + r) * w.N + out;
      const __half2 pair = __floats2half2_rn(fmaf(sums[4 * n + i], w.unit, bias.x), fmaf(sums[4 * n + 2 + i], w.unit, bias.y));
      if (out + 1 < w.N && w.N % 2 == 0) {
        *reinterpret_cast<__half2*>(y + at) = pair;
      } else {
        if (out < w.N) y[at] = __low2half(pair);
        if (out + 1 < w.N) y[at + 1] = __high2half(pair);
      }
    }
  }
#endif
}

}  // namespace qbb::cuda
