// What is done once, when a kernel is created.
#pragma once

#include "cuda/device.cuh"

namespace qbb::cuda {

// Bit order of layout 0 to that of layout 1 (format.h).
__device__ __forceinline__ uint32_t swizzle(uint32_t word) {
  uint32_t out = 0;
  for (int j = 0; j < 4; ++j) {
    out |= ((word >> (4 * j)) & 15u) << (8 * j);
    out |= ((word >> (16 + 4 * j)) & 15u) << (8 * j + 4);
  }
  return out;
}

// [count, N, depth] to [count, tiles, depth, 16]; rows at or past N become 0.
template <class T, bool kSwizzle>
__global__ void tile_rows(const T* from, T* to, int64_t count, int64_t N, int64_t tiles, int64_t depth) {
  const int64_t total = count * tiles * depth * QBB_TILE_ROWS;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t lane = i % QBB_TILE_ROWS, d = i / QBB_TILE_ROWS % depth, tile = i / QBB_TILE_ROWS / depth % tiles;
    const int64_t n = tile * QBB_TILE_ROWS + lane, c = i / QBB_TILE_ROWS / depth / tiles;
    T value = n < N ? from[(c * N + n) * depth + d] : T{0};
    if constexpr (kSwizzle) value = swizzle(value);
    to[i] = value;
  }
}

__global__ void fill(float* to, int64_t count, float value) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = value;
  }
}

// The largest Σ_b |S| + |Z| of any group of any row, as bits of a float; `largest` is 0 before.
__global__ void largest_level(const Weights w, unsigned* largest) {
  const int64_t each = int64_t{w.tiles} * w.groups * QBB_TILE_ROWS;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < each; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t lane = i % QBB_TILE_ROWS;
    if (i / QBB_TILE_ROWS / w.groups * QBB_TILE_ROWS + lane >= w.N) continue;  // padding may hold anything
    float sum = w.offset == nullptr ? 0.0f : fabsf(w.offset[i]);
    for (int64_t b = 0; b < w.bases; ++b) {
      const int64_t at = b * each + i;
      sum += fabsf(w.half_scales ? __half2float(static_cast<const __half*>(w.scales)[at])
                                 : static_cast<const float*>(w.scales)[at]);
    }
    atomicMax(largest, __float_as_uint(sum));  // floats that are at least 0 are in the order of their bits
  }
}

}  // namespace qbb::cuda
