// Loads, stores and warp-wide steps that several kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/instructions.cuh"
#include "cuda/weights.h"

namespace qbb::cuda {

__device__ __forceinline__ float load_x(const Rows& rows, int64_t i) {
  switch (rows.type) {
    case kFloat16: return __half2float(static_cast<const __half*>(rows.x)[i]);
    case kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(rows.x)[i]);
    default: return static_cast<const float*>(rows.x)[i];
  }
}

__device__ __forceinline__ void store_y(const Rows& rows, int64_t i, float value) {
  switch (rows.type) {
    case kFloat16: static_cast<__half*>(rows.y)[i] = __float2half_rn(value); break;
    case kBFloat16: static_cast<__nv_bfloat16*>(rows.y)[i] = __float2bfloat16_rn(value); break;
    default: static_cast<float*>(rows.y)[i] = value;
  }
}

// Two neighbouring scales as floats.
__device__ __forceinline__ float2 load_scales(const Weights& w, int64_t i) {
  if (w.half_scales) return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(w.scales) + i));
  return *reinterpret_cast<const float2*>(static_cast<const float*>(w.scales) + i);
}

// One lane's part of a chunk, four words of 16 rows: with g = lane / 4 and t = lane % 4, word t of rows 2g and 2g + 1,
// their float16 scales and offsets.
template <int kBases>
struct Chunk {
  uint2 words[kBases];
  uint32_t scales[kBases];
  float2 offset;
};

// Where a lane's part of all chunks begins. Addresses are sums of few terms: with integer arithmetic in every load, a
// kernel would wait for addresses and not for memory.
struct Lane {
  const char* planes;
  const char* scales;
  const char* offset;
  int word;  // t
};

__device__ __forceinline__ Lane lane_of(const Weights& w, int lane) {
  const int g = lane / 4, t = lane % 4;
  return Lane{reinterpret_cast<const char*>(w.planes) + t * QBB_TILE_ROWS * 4 + g * 8,
              static_cast<const char*>(w.scales) + g * 4, reinterpret_cast<const char*>(w.offset) + g * 8, t};
}

// Chunks first .. first + kCount of a tile. Only for groups that are 2^shift chunks, or whole rows. Past the last chunk all
// words are 0.
template <int kBases, int kCount>
__device__ __forceinline__ void load_chunks(Chunk<kBases> (&to)[kCount], const Weights& w, const Lane& lane, int tile,
                                            int first) {
  constexpr int kBytes = kChunkWords * QBB_TILE_ROWS * 4;
  const char* planes = lane.planes + static_cast<int64_t>(tile) * w.tile_bytes + static_cast<int64_t>(first) * kBytes;
  const int64_t groups = static_cast<int64_t>(tile) * w.groups;
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int64_t group = groups + min((first + u) >> w.group_shift, w.groups - 1);
    const char* scales = lane.scales + group * (QBB_TILE_ROWS * 2);
    const bool inside = (first + u) * kChunkWords + lane.word < w.words;
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      to[u].words[b] = make_uint2(0, 0);
      if (inside) to[u].words[b] = load_once(planes + b * w.plane_bytes + u * kBytes);
      to[u].scales[b] = __ldg(reinterpret_cast<const unsigned*>(scales + b * w.scale_bytes));
    }
    to[u].offset = make_float2(0.0f, 0.0f);
    if (w.offset != nullptr) {
      to[u].offset = __ldg(reinterpret_cast<const float2*>(lane.offset + group * (QBB_TILE_ROWS * 4)));
    }
  }
}

__device__ __forceinline__ float2 to_floats(uint32_t halves) {
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// Which of a word's 32 inputs its bit `b` stands for (layout 1, format.h).
__device__ __forceinline__ int input_of_bit(int b) { return 4 * (b / 8) + b % 4 + (b % 8 < 4 ? 0 : 16); }

}  // namespace qbb::cuda
