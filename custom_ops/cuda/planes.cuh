// Activations as bit planes, and the product of bits with bits.
//
// 128 inputs of one row of X are rounded to whole numbers of 16 (or 8) bits of a common step. Plane j holds bit j of all
// of them, so a sum over the inputs whose weight bit is set is Σ_j 2^j · popcount(weights & plane_j): tensor cores
// count 16 rows times 8 planes at once, from the packed weights as they lie in memory.
//
//     Σ sign·x  =  2·Σ_{bit set} x − Σ x
#pragma once

#include "cuda/device.cuh"

namespace qbb::cuda {

// One lane's part of 128 inputs: input `input_of_bit(lane)` of each of the four words.
struct Inputs {
  float v[kChunkWords];
};

__device__ __forceinline__ Inputs load_inputs(const Weights& w, const Rows& rows, int row, int chunk, int lane) {
  Inputs in;
#pragma unroll
  for (int i = 0; i < kChunkWords; ++i) {
    const int k = chunk * kChunk + i * QBB_WORD_BITS + input_of_bit(lane);
    in.v[i] = k < w.K ? load_x(rows, static_cast<int64_t>(row) * w.K + k) : 0.0f;
  }
  return in;
}

// Lane i gives row i of a 32×32 matrix of bits and gets column i.
__device__ __forceinline__ uint32_t transpose_bits(uint32_t x, int lane) {
  const uint32_t masks[5] = {0x0000ffffu, 0x00ff00ffu, 0x0f0f0f0fu, 0x33333333u, 0x55555555u};
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const int s = 16 >> i;
    const uint32_t other = __shfl_xor_sync(kAllLanes, x, s);
    x = (lane & s) == 0 ? (x & masks[i]) | ((other & masks[i]) << s) : (x & ~masks[i]) | ((other >> s) & masks[i]);
  }
  return x;
}

// kBits 16: planes[r] of lane l is plane l % 16 of word 2r + l / 16. kBits 8: planes[0] of lane l is plane l % 8 of word
// l / 8.
template <int kBits>
struct Planes {
  uint32_t planes[kBits / 8];
  int q[kChunkWords];
  float step;
};

template <int kBits>
__device__ __forceinline__ Planes<kBits> to_planes(const Inputs& in, int lane) {
  constexpr float kLargest = kBits == 8 ? 127.0f : 32767.0f;
  const float m =
      max_of_lanes(fmaxf(fmaxf(fabsf(in.v[0]), fabsf(in.v[1])), fmaxf(fabsf(in.v[2]), fabsf(in.v[3]))));
  Planes<kBits> p;
  const bool some = m > kSmallest;
  p.step = some ? m / kLargest : 0.0f;
  const float inverse = some ? kLargest / m : 0.0f;
#pragma unroll
  for (int i = 0; i < kChunkWords; ++i) p.q[i] = __float2int_rn(in.v[i] * inverse);
  const auto bits = [&](int i) { return static_cast<uint32_t>(p.q[i]) & ((1u << kBits) - 1); };
  if constexpr (kBits == 8) {
    p.planes[0] = transpose_bits(bits(0) | bits(1) << 8 | bits(2) << 16 | bits(3) << 24, lane);
  } else {
    p.planes[0] = transpose_bits(bits(0) | bits(1) << 16, lane);
    p.planes[1] = transpose_bits(bits(2) | bits(3) << 16, lane);
  }
  return p;
}

// Planes 2t and 2t + 1 (and 8 + 2t, 9 + 2t) of a count, in units of 4^t. The last plane is that of the sign.
__device__ __forceinline__ int weigh(int c0, int c1, int last) { return c0 + last * c1; }
__device__ __forceinline__ int weigh(int c0, int c1, int d0, int d1, int last) {
  return c0 + 2 * c1 + 256 * d0 + 256 * last * d1;
}

}  // namespace qbb::cuda
