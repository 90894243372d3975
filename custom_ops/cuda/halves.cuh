// More rows of X, as float16: weights become float16 in registers, and meet X on the tensor cores.
//
// Making weights costs more than multiplying them, and as much for one row of X as for 32.
#pragma once

#include "cuda/levels.cuh"

namespace qbb::cuda {

constexpr int kColumn = 8;      // rows of X that one product takes
constexpr int kRowStride = 20;  // 16-byte pieces from row to row of X: 16, and 4 that spread them over all banks

// Inputs k .. k + 32 of a row of 16-bit X, as stored; 0 past the end.
__device__ __forceinline__ void load_word(uint4 (&raw)[4], const uint16_t* x, int k, int K, bool aligned) {
  if (aligned && k + QBB_WORD_BITS <= K) {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(x + k) + i);
    return;
  }
  const auto pair = [&](int at) -> uint32_t {
    return (at < K ? x[at] : 0u) | static_cast<uint32_t>(at + 1 < K ? x[at + 1] : 0u) << 16;
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) raw[i] = make_uint4(pair(k + 8 * i), pair(k + 8 * i + 2), pair(k + 8 * i + 4), pair(k + 8 * i + 6));
}

// As 16 pairs of neighbours.
__device__ __forceinline__ void spread(uint32_t (&r)[16], const uint4 (&raw)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = raw[i].x;
    r[4 * i + 1] = raw[i].y;
    r[4 * i + 2] = raw[i].z;
    r[4 * i + 3] = raw[i].w;
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

// kPart bases of a chunk times X, added to `sums`. `low`, `high`: bytes of the levels of rows 2g and 2g + 1.
template <int kPart, int kColumns>
__device__ __forceinline__ void add_part(float (&sums)[kColumns][4], const uint2* words, const Levels (&levels)[2],
                                         const uint4* x) {
  uint32_t w0[kPart], w1[kPart], c0[4], c1[4];
#pragma unroll
  for (int b = 0; b < kPart; ++b) {
    w0[b] = words[b].x;
    w1[b] = words[b].y;
  }
  all_codes<kPart>(c0, w0);
  all_codes<kPart>(c1, w1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      look_up<kPart>(a[h][0], a[h][2], levels[0], c0[i], h);
      look_up<kPart>(a[h][1], a[h][3], levels[1], c1[i], h);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint4 b = x[n * kColumn * kRowStride + 4 * i];
      multiply(sums[n], a[0], b.x, b.y);
      multiply(sums[n], a[1], b.z, b.w);
    }
  }
}

template <int kBases, int kColumns>
__device__ __forceinline__ void add_chunk(float (&sums)[kColumns][4], const uint2* words, const uint4 (&table)[2],
                                          const uint4* x) {
  const Levels first[2] = {{{table[0].x, table[0].z}, {table[0].y, table[0].w}},
                           {{table[1].x, table[1].z}, {table[1].y, table[1].w}}};
  if constexpr (kBases == 4) {  // a look-up has eight entries, so four bases are two matrices
    const Levels second[2] = {{{table[0].z, 0}, {table[0].w, 0}}, {{table[1].z, 0}, {table[1].w, 0}}};
    add_part<2>(sums, words, first, x);
    add_part<2>(sums, words + 2, second, x);
  } else {
    add_part<kBases>(sums, words, first, x);
  }
}

// How `batch` treats X and weights: as float16. kBrain: X is bfloat16.
template <bool kBrain>
struct Halves {
  static constexpr int kRawPieces = 4;  // of 16 bytes: a word's inputs

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    load_word(raw, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
  }

  // Word t of a chunk of a row into shared memory; its number: what the chunk was divided by. All lanes take part.
  static __device__ __forceinline__ void stage(uint4* to, float2* number, const uint4 (&raw)[kRawPieces], Type, int word,
                                               float) {
    uint32_t r[16];
    spread(r, raw);
    if constexpr (kBrain) {
      const float power = to_half(r);
      if (word == 0) *number = make_float2(power, 0.0f);
    }
    stage_word(to, r);
  }

  // Bytes of the levels of a row's chunk: low ones and high ones of the first four levels, then of the others.
  template <int kBases>
  static __device__ __forceinline__ uint4 table(const float (&s)[kBases], float z, float inverse) {
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    float scaled[kPart];
#pragma unroll
    for (int b = 0; b < kPart; ++b) scaled[b] = s[b] * inverse;
    const Levels first = make_levels<kPart>(scaled, z * inverse);
    if constexpr (kBases == 4) {
      const float rest[2] = {s[2] * inverse, s[3] * inverse};
      const Levels second = make_levels<2>(rest, 0.0f);
      return make_uint4(first.low[0], first.high[0], second.low[0], second.high[0]);
    } else if constexpr (kBases == 3) {
      return make_uint4(first.low[0], first.high[0], first.low[1], first.high[1]);
    } else {
      return make_uint4(first.low[0], first.high[0], 0, 0);
    }
  }

  static __device__ __forceinline__ float inverse_of(const Weights& w, int /*row*/) { return 1.0f / w.unit; }
  static __device__ __forceinline__ float last_factor(const Weights& w, int /*row*/) { return w.unit; }
  static __host__ __device__ constexpr float correction(int /*bases*/) { return 0.0f; }

  template <int kBases, int kColumns>
  static __device__ __forceinline__ void add(float (&sums)[kColumns][4], const Chunk<kBases>& chunk,
                                             const uint4 (&table)[2], const float2&, const uint4* x,
                                             const float2* numbers, int t) {
    if constexpr (kBrain) {
      float part[kColumns][4] = {};
      add_chunk<kBases, kColumns>(part, chunk.words, table, x);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(part[n][i], numbers[n * kColumn + 2 * t + i % 2].x, sums[n][i]);
      }
    } else {
      add_chunk<kBases, kColumns>(sums, chunk.words, table, x);
    }
  }
};

}  // namespace qbb::cuda
