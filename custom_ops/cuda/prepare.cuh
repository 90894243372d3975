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

__device__ __forceinline__ float scale_at(const Weights& w, int64_t i) {
  return w.half_scales ? __half2float(static_cast<const __half*>(w.scales)[i]) : static_cast<const float*>(w.scales)[i];
}

// Weights::row_unit, and the largest Σ_b |S| + |Z| of any group of any row, as bits of a float; `largest` is 0 before.
__global__ void largest_levels(const Weights w, float* row_unit, unsigned* largest) {
  const int64_t each = int64_t{w.tiles} * w.groups * QBB_TILE_ROWS;
  for (int64_t n = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; n < int64_t{w.tiles} * QBB_TILE_ROWS;
       n += int64_t{gridDim.x} * blockDim.x) {
    float of_row = 0.0f, with_offset = 0.0f;
    for (int64_t group = 0; n < w.N && group < w.groups; ++group) {  // padding may hold anything
      const int64_t i = (n / QBB_TILE_ROWS * w.groups + group) * QBB_TILE_ROWS + n % QBB_TILE_ROWS;
      float sum = 0.0f;
      for (int64_t b = 0; b < w.bases; ++b) sum += fabsf(scale_at(w, b * each + i));
      of_row = fmaxf(of_row, sum);
      with_offset = fmaxf(with_offset, sum + (w.offset == nullptr ? 0.0f : fabsf(w.offset[i])));
    }
    row_unit[n] = of_row / kLargestLevel;
    atomicMax(largest, __float_as_uint(with_offset));  // floats that are at least 0 are in the order of their bits
  }
}

}  // namespace qbb::cuda
