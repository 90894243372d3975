// Loads, stores and warp-wide steps that several kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/instructions.cuh"
#include "cuda/weights.h"

namespace qbb::cuda {

// What all lanes of a warp have alike, so that the compiler knows it, too: then it takes no vector instructions.
__device__ __forceinline__ int uniform(int v) { return static_cast<int>(__shfl_sync(kAllLanes, static_cast<uint32_t>(v), 0)); }

constexpr float kSmallest = 1e-30f;  // inputs below it count as 0: the reciprocal of the step has to be finite

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

// Where a lane's part of a chunk is: rows 2g and 2g + 1, word t. Offsets have 32 bits and are added to addresses that all
// threads share; with 64-bit arithmetic in every load, a kernel would wait for addresses and not for memory.
struct Lane {
  uint32_t g, t;
};

__device__ __forceinline__ Lane lane_of(int lane) {
  return Lane{static_cast<uint32_t>(lane) / 4, static_cast<uint32_t>(lane) % 4};
}

__device__ __forceinline__ float2 to_floats(uint32_t halves) {
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// Which of a word's 32 inputs its bit `b` stands for (layout 1, format.h).
__device__ __forceinline__ int input_of_bit(int b) { return 4 * (b / 8) + b % 4 + (b % 8 < 4 ? 0 : 16); }

}  // namespace qbb::cuda
