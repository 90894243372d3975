// Loads, stores and warp-wide steps that several kernels use.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/weights.h"

namespace qbb::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Weights are read once: they should not push anything else out of the first-level cache.
__device__ __forceinline__ uint2 load_once(const uint32_t* p) {
  uint2 r;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}

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

// One lane's part of a chunk, four words of 16 rows: with g = lane / 4 and t = lane % 4, word t of rows 2g and 2g + 1, and
// their float16 scales. Only for groups that are whole chunks, or whole rows.
template <int kBases>
struct Chunk {
  uint2 words[kBases];
  uint32_t scales[kBases];
};

__device__ __forceinline__ int group_of_chunk(const Weights& w, int chunk) {
  const int word = min(chunk * kChunkWords, w.words - 1);  // chunks may be counted past the end
  return w.group_words == kChunkWords ? word / kChunkWords : word / w.group_words;
}

template <int kBases>
__device__ __forceinline__ void load_chunk(Chunk<kBases>& to, const Weights& w, int tile, int chunk, int lane) {
  const int word = chunk * kChunkWords + lane % 4, group = group_of_chunk(w, chunk);
#pragma unroll
  for (int b = 0; b < kBases; ++b) {
    const int64_t at = static_cast<int64_t>(b) * w.tiles + tile;
    to.words[b] = make_uint2(0, 0);
    if (word < w.words) to.words[b] = load_once(w.planes + (at * w.words + word) * QBB_TILE_ROWS + lane / 4 * 2);
    const auto* scales = static_cast<const __half*>(w.scales) + (at * w.groups + group) * QBB_TILE_ROWS + lane / 4 * 2;
    to.scales[b] = __ldg(reinterpret_cast<const unsigned*>(scales));
  }
}

__device__ __forceinline__ float2 load_offset(const Weights& w, int tile, int chunk, int lane) {
  const int64_t at = static_cast<int64_t>(tile) * w.groups + group_of_chunk(w, chunk);
  return *reinterpret_cast<const float2*>(w.offset + at * QBB_TILE_ROWS + lane / 4 * 2);
}

__device__ __forceinline__ float2 to_floats(uint32_t halves) {
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

__device__ __forceinline__ int sum_of_lanes(int v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, v);
#else
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kAllLanes, v, s);
  return v;
#endif
}

// The largest of 32 floats that are at least 0: their bits are in the same order.
__device__ __forceinline__ float max_of_lanes(float v) {
#if __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(v)));
#else
  for (int s = 16; s > 0; s >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, s));
  return v;
#endif
}

// Which of a word's 32 inputs its bit `b` stands for (layout 1, format.h).
__device__ __forceinline__ int input_of_bit(int b) { return 4 * (b / 8) + b % 4 + (b % 8 < 4 ? 0 : 16); }

// The kernel before this one in the stream has ended, and its results can be seen. What does not depend on them may be
// read earlier. Does nothing unless the launch allows an early start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace qbb::cuda
