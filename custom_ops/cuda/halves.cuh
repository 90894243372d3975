// More rows of X, as float16: weights become float16 in registers, and meet X on the tensor cores.
//
// Making weights costs more than multiplying them, and as much for one row of X as for 32.
#pragma once

#include "cuda/levels.cuh"

namespace qbb::cuda {

constexpr int kColumn = 8;      // rows of X that one product takes
constexpr int kRowStride = 20;  // 16-byte pieces from row to row of X: 16, and 4 that spread them over all banks

// Inputs k .. k + 32 of a row of X, as stored, in pairs; 0 past the end.
__device__ __forceinline__ void load_word(uint32_t (&r)[16], const uint16_t* x, int k, int K, bool aligned) {
  if (aligned && k + QBB_WORD_BITS <= K) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(x + k) + i);
      r[4 * i] = v.x;
      r[4 * i + 1] = v.y;
      r[4 * i + 2] = v.z;
      r[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto bits = [&](int at) -> uint32_t { return at < K ? x[at] : 0; };
      r[i] = bits(k + 2 * i) | bits(k + 2 * i + 1) << 16;
    }
  }
}

// bfloat16 to float16, divided by a power of two that makes the largest of the chunk about 2^13: bfloat16 has a larger
// range, but fewer digits. Four neighbouring lanes hold the words of a chunk. Returns the power.
__device__ __forceinline__ float to_half(uint32_t (&r)[16]) {
  uint32_t largest = 0;  // magnitudes of bfloat16 are in the order of their bits
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = max(largest, max(r[i] & 0x7fffu, (r[i] >> 16) & 0x7fffu));
  largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  const int exponent = min(max(static_cast<int>(largest >> 7) - 13, 27), 227);  // of the power, and of its reciprocal
  const float power = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
  const float reciprocal = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float low = __uint_as_float(r[i] << 16), high = __uint_as_float(r[i] & 0xffff0000u);
    r[i] = pack(low * reciprocal, high * reciprocal);
  }
  return power;
}

// Inputs i + 4j and i + 4j + 16 of a word; i, j < 4.
__device__ __forceinline__ uint32_t pair_of(const uint32_t (&r)[16], int i, int j) {
  return __byte_perm(r[i / 2 + 2 * j], r[i / 2 + 2 * j + 8], i % 2 == 0 ? 0x5410 : 0x7632);
}

// Word t of a chunk of one row of X, as four pieces: i holds its pairs j.
__device__ __forceinline__ void stage_word(uint4* to, const uint32_t (&r)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[4 * i] = make_uint4(pair_of(r, i, 0), pair_of(r, i, 1), pair_of(r, i, 2), pair_of(r, i, 3));
  }
}

// Bases kFrom .. kFrom + kPart of a chunk times X, added to `sums`.
template <int kFrom, int kPart, int kBases, int kColumns>
__device__ __forceinline__ void add_part(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float inverse, float2 z,
                                         const uint4* x) {
  const Part<kPart> p = part_of<kFrom, kPart>(chunk, inverse, z);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t c0 = codes<kPart>(p.w0, i), c1 = codes<kPart>(p.w1, i);
    uint4 b[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) b[n] = x[n * kColumn * kRowStride + 4 * i];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t a[4];
      look_up<kPart>(a[0], a[2], p.l0, c0, h);
      look_up<kPart>(a[1], a[3], p.l1, c1, h);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) multiply(sums[n], a, h == 0 ? b[n].x : b[n].z, h == 0 ? b[n].y : b[n].w);
    }
  }
}

template <int kBases, int kColumns>
__device__ __forceinline__ void add_chunk(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float inverse,
                                          const uint4* x) {
  const float2 z = make_float2(chunk.offset.x * inverse, chunk.offset.y * inverse);
  if constexpr (kBases == 4) {  // a look-up has eight entries, so four bases are two matrices
    add_part<0, 2>(sums, chunk, inverse, z, x);
    add_part<2, 2>(sums, chunk, inverse, make_float2(0.0f, 0.0f), x);
  } else {
    add_part<0, kBases>(sums, chunk, inverse, z, x);
  }
}

// How `batch` treats X: kBrain for bfloat16.
template <bool kBrain>
struct Halves {
  // Word t of a chunk of a row into shared memory; its number: what the chunk was divided by. All lanes take part.
  static __device__ __forceinline__ void stage(uint4* to, float2* number, const Rows& rows, int row, int k, int K,
                                               bool aligned, bool real) {
    uint32_t r[16] = {};
    if (real) load_word(r, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
    if constexpr (kBrain) {
      const float power = to_half(r);
      if (k / QBB_WORD_BITS % kChunkWords == 0) *number = make_float2(power, 0.0f);
    }
    stage_word(to, r);
  }

  template <int kBases, int kColumns>
  static __device__ __forceinline__ void add(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float inverse,
                                             const uint4* x, const float2* numbers, int t) {
    if constexpr (kBrain) {
      float part[kColumns][4] = {};
      add_chunk<kBases, kColumns>(part, chunk, inverse, x);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(part[n][i], numbers[n * kColumn + 2 * t + i % 2].x, sums[n][i]);
      }
    } else {
      add_chunk<kBases, kColumns>(sums, chunk, inverse, x);
    }
  }

  static __device__ __forceinline__ float last_factor(const Weights& w) { return w.unit; }
};

}  // namespace qbb::cuda
