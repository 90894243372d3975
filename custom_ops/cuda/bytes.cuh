// A few more rows of X than decode.cuh takes, as whole numbers of 16 bits: bits of the weights become bytes, which cost half an
// instruction each, and meet upper and lower bytes of X on the tensor cores. Sums within a chunk are exact.
#pragma once

#include <type_traits>

#include "cuda/halves.cuh"

namespace qbb::cuda {

// Inputs k .. k + 32 of a row of X, of any type; 0 past the end.
__device__ __forceinline__ void load_floats(float (&v)[QBB_WORD_BITS], const Rows& rows, int row, int k, int K,
                                            bool aligned) {
  if (rows.type == kFloat32) {
    const float* x = static_cast<const float*>(rows.x) + static_cast<int64_t>(row) * K;
#pragma unroll
    for (int i = 0; i < QBB_WORD_BITS; i += 4) {
      float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (aligned && k + i + 4 <= K) {
        four = __ldg(reinterpret_cast<const float4*>(x + k + i));
      } else {
        if (k + i < K) four.x = x[k + i];
        if (k + i + 1 < K) four.y = x[k + i + 1];
        if (k + i + 2 < K) four.z = x[k + i + 2];
        if (k + i + 3 < K) four.w = x[k + i + 3];
      }
      v[i] = four.x;
      v[i + 1] = four.y;
      v[i + 2] = four.z;
      v[i + 3] = four.w;
    }
    return;
  }
  uint32_t r[16];
  load_word(r, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (rows.type == kBFloat16) {
      v[2 * i] = __uint_as_float(r[i] << 16);
      v[2 * i + 1] = __uint_as_float(r[i] & 0xffff0000u);
    } else {
      const float2 two = to_floats(r[i]);
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }
}

// How `batch` treats X. Of a chunk of a row, four lanes hold a word each.
struct Bytes {
  // Piece j of a word: upper bytes of inputs i + 4·b + 16·h, b < 4, of registers 2j and 2j + 1 (i + 4h = 2j, 2j + 1),
  // then the lower ones. Its number: 2/128 of the step, and 128/2 of the
  // inputs' total.
  static __device__ __forceinline__ void stage(uint4* to, float2* number, const Rows& rows, int row, int k, int K,
                                               bool aligned, bool real) {
    float v[QBB_WORD_BITS] = {};
    if (real) load_floats(v, rows, row, k, K, aligned);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < QBB_WORD_BITS; ++i) largest = fmaxf(largest, fabsf(v[i]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const bool some = largest > kSmallest;
    const float inverse = some ? 32767.0f / largest : 0.0f;
    int total = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t pairs[2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int bit = 2 * j + e, first = bit % 4 + (bit < 4 ? 0 : 16);
        uint32_t q[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int number_of = __float2int_rn(v[first + 4 * b] * inverse);
          total += number_of;
          q[b] = static_cast<uint32_t>(number_of);
        }
        const uint32_t low = __byte_perm(q[0], q[1], 0x5410), high = __byte_perm(q[2], q[3], 0x5410);
        pairs[e][0] = __byte_perm(low, high, 0x7531);  // upper bytes
        pairs[e][1] = __byte_perm(low, high, 0x6420);
      }
      to[4 * j] = make_uint4(pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]);
    }
    total += static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<unsigned>(total), 1));
    total += static_cast<int>(__shfl_xor_sync(kAllLanes, static_cast<unsigned>(total), 2));
    if (k / QBB_WORD_BITS % kChunkWords == 0) {
      *number = make_float2(some ? largest / 32767.0f / 64.0f : 0.0f, 64.0f * static_cast<float>(total));
    }
  }

  template <int kBases, int kColumns>
  static __device__ __forceinline__ void add(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float /*inverse*/,
                                             const uint4* x, const float2* numbers, int t) {
    uint4 b[kColumns][4];
    float2 number[kColumns][2];
    float part[kColumns][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) b[n][j] = x[n * kColumn * kRowStride + 4 * j];
#pragma unroll
      for (int i = 0; i < 2; ++i) number[n][i] = numbers[n * kColumn + 2 * t + i];
#pragma unroll
      for (int i = 0; i < 4; ++i) part[n][i] = (i < 2 ? chunk.offset.x : chunk.offset.y) * number[n][i % 2].y;
    }
#pragma unroll
    for (int base = 0; base < kBases; ++base) {
      const float2 scale = to_floats(chunk.scales[base]);
      const uint32_t row0 = chunk.words[base].x, row1 = chunk.words[base].y;
      int high[kColumns][4], low[kColumns][4];
      const auto step = [&](auto first, int j) {
        constexpr bool kFirst = decltype(first)::value;
        constexpr uint32_t kTop = 0x80808080u;  // a set bit is 128: left shifts are multiplications, of which there are more
        const uint32_t a[4] = {row0 << (7 - 2 * j) & kTop, row1 << (7 - 2 * j) & kTop, row0 << (6 - 2 * j) & kTop,
                               row1 << (6 - 2 * j) & kTop};
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          multiply_bytes<true, kFirst>(high[n], a, b[n][j].x, b[n][j].y);
          multiply_bytes<false, kFirst>(low[n], a, b[n][j].z, b[n][j].w);
        }
      };
      step(std::true_type{}, 0);
#pragma unroll
      for (int j = 1; j < 4; ++j) step(std::false_type{}, j);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum = static_cast<float>(high[n][i] * 256 + low[n][i]) - number[n][i % 2].y;
          part[n][i] = fmaf(i < 2 ? scale.x : scale.y, sum, part[n][i]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = fmaf(number[n][i % 2].x, part[n][i], sums[n][i]);
    }
  }

  static __device__ __forceinline__ float last_factor(const Weights&) { return 1.0f; }
};

}  // namespace qbb::cuda
