// A few more rows of X than decode.cuh takes, and float32 X: both sides as whole numbers of 16 bits, a byte at a time on the
// tensor cores. Weights come by the same look-ups as in halves.cuh, but two bytes of a weight need not meet in a register.
//
// A number is 256·h + l with h and l signed; X·W = 65536·h·h' + 256·(h·l' + l·h'), and l·l' is left out. A level L of a row,
// in units of Weights::row_unit, is kept as L − 128.5: then its complement, bit by bit, is −L kept so.
#pragma once

#include <type_traits>

#include "cuda/halves.cuh"

namespace qbb::cuda {

struct Bytes {
  static constexpr int kRawPieces = 8;  // of 16 bytes: a word's inputs as float32, or twice as many as are needed
  static constexpr float kLargest = 32639.0f;      // 127·256 + 127
  static constexpr float kMagic = 12582912.0f;     // 1.5·2^23: a sum with it has the rounded number in its last bits
  static constexpr uint32_t kFlip = 0x80808080u;   // bytes 0 … 255 to bytes -128 … 127

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    if (rows.type != kFloat32) {
      uint4 (&half)[4] = *reinterpret_cast<uint4(*)[4]>(&raw);
      load_word(half, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
      return;
    }
    const auto* x = static_cast<const uint32_t*>(rows.x) + static_cast<int64_t>(row) * K;
    if (aligned && k + QBB_WORD_BITS <= K) {
#pragma unroll
      for (int i = 0; i < 8; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(x + k) + i);
      return;
    }
    const auto bits = [&](int at) -> uint32_t { return at < K ? x[at] : 0; };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      raw[i] = make_uint4(bits(k + 4 * i), bits(k + 4 * i + 1), bits(k + 4 * i + 2), bits(k + 4 * i + 3));
    }
  }

  // kPieces: 4 where X has 16 bits for certain.
  template <int kPieces>
  static __device__ __forceinline__ void to_numbers(float (&v)[QBB_WORD_BITS], const uint4 (&raw)[kPieces], Type type) {
    if constexpr (kPieces == kRawPieces) {
      if (type == kFloat32) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          v[4 * i] = __uint_as_float(raw[i].x);
          v[4 * i + 1] = __uint_as_float(raw[i].y);
          v[4 * i + 2] = __uint_as_float(raw[i].z);
          v[4 * i + 3] = __uint_as_float(raw[i].w);
        }
        return;
      }
    }
    uint32_t r[16];
    spread(r, *reinterpret_cast<const uint4(*)[4]>(&raw));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 two = type == kFloat16 ? to_floats(r[i])
                                          : make_float2(__uint_as_float(r[i] << 16), __uint_as_float(r[i] & 0xffff0000u));
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }

  // Of a chunk, whose words four neighbouring lanes hold: its largest magnitude, and its total from those of the words.
  static __device__ __forceinline__ float largest_of_chunk(const float (&v)[QBB_WORD_BITS]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < QBB_WORD_BITS; ++i) largest = fmaxf(largest, fabsf(v[i]));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    return largest;
  }
  static __device__ __forceinline__ uint32_t total_of_chunk(uint32_t total) {
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    return total;
  }

  // A word of X as bytes: high[i][h] and low[i][h] are those of inputs i + 8h, i + 8h + 16, i + 8h + 4, i + 8h + 20, in the
  // order of look-ups. Returns the chunk's number: 256 steps, and kMagic less `correction` times the inputs' total. Four
  // neighbouring lanes hold the words of a chunk.
  static __device__ __forceinline__ float2 to_bytes(uint32_t (&high)[4][2], uint32_t (&low)[4][2],
                                                    const uint4 (&raw)[kRawPieces], Type type, float correction) {
    float v[QBB_WORD_BITS];
    to_numbers(v, raw, type);
    const float largest = largest_of_chunk(v);
    const bool some = largest > kSmallest;
    const float inverse = some ? kLargest / largest : 0.0f;
    uint32_t total = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int input = i + 8 * h + j / 2 * 4 + j % 2 * 16;
          q[j] = __float_as_uint(fmaf(v[input], inverse, kMagic + 128.0f));  // 128 more: then byte 1 is the upper one
          total += q[j];
        }
        const uint32_t first = __byte_perm(q[0], q[1], 0x5140), second = __byte_perm(q[2], q[3], 0x5140);
        low[i][h] = __byte_perm(first, second, 0x5410) ^ kFlip;
        high[i][h] = __byte_perm(first, second, 0x7632);
      }
    }
    total -= QBB_WORD_BITS * __float_as_uint(kMagic + 128.0f);
    total = total_of_chunk(total);
    const float of_inputs = static_cast<float>(static_cast<int>(total));
    return make_float2(some ? 256.0f * largest / kLargest : 0.0f, kMagic - correction * of_inputs);
  }

  // Piece i of a word: upper bytes (h = 0, 1), then lower ones.
  static __device__ __forceinline__ void stage(uint4* to, float2* number, const uint4 (&raw)[kRawPieces], Type type,
                                               int word, float correction) {
    uint32_t high[4][2], low[4][2];
    const float2 of_chunk = to_bytes(high, low, raw, type, correction);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * i] = make_uint4(high[i][0], high[i][1], low[i][0], low[i][1]);
    if (word == 0) *number = of_chunk;
  }

  static __device__ __forceinline__ float inverse_of(const Weights& w, int row) {
    const float unit = w.row_unit[row];
    return unit > 0.0f ? 1.0f / unit : 0.0f;
  }
  static __device__ __forceinline__ float last_factor(const Weights& w, int row) { return w.row_unit[row]; }

  // What each input adds, in units of 256, because levels are kept less 128.5; four bases are two matrices.
  static __host__ __device__ constexpr float correction(int bases) { return (bases == 4 ? 2 : 1) * 128.5f / 256.0f; }

  // Levels of the codes with the last bit set, as whole numbers less 128: bytes in the order of codes.
  template <int kPart>
  static __device__ __forceinline__ uint2 upper_levels(const float* s, float inverse) {
    uint32_t q[kPart];
#pragma unroll
    for (int b = 0; b < kPart; ++b) {
      // A level is a whole number and a half, thanks to the last basis.
      const float scaled = b + 1 == kPart ? fmaf(s[b], inverse, -0.5f) : s[b] * inverse;
      q[b] = __float_as_uint(scaled + kMagic);
    }
    if constexpr (kPart == 1) return make_uint2((q[0] & 255u) ^ 128u, q[0] >> 8 & 255u);
    if constexpr (kPart == 2) {
      const uint32_t both = __byte_perm(q[1] - q[0], q[1] + q[0], 0x5140);
      return make_uint2((both & 0xffffu) ^ 0x8080u, both >> 16);
    }
    if constexpr (kPart == 3) {
      const uint32_t first = __byte_perm(q[2] - q[1] - q[0], q[2] - q[1] + q[0], 0x5140);
      const uint32_t second = __byte_perm(q[2] + q[1] - q[0], q[2] + q[1] + q[0], 0x5140);
      return make_uint2(__byte_perm(first, second, 0x5410) ^ kFlip, __byte_perm(first, second, 0x7632));
    }
  }

  // Low and high bytes of a row's levels, of a chunk.
  template <int kBases>
  static __device__ __forceinline__ uint4 table(const float (&s)[kBases], float /*z*/, float inverse) {
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    const auto whole = [](uint32_t upper) {  // the lower half is the upper one's complement, in the opposite order
      if constexpr (kPart == 1) return (~upper & 255u) | upper << 8;
      return __byte_perm(~upper, upper, 0x5401);
    };
    const uint2 first = upper_levels<kPart>(s, inverse);
    if constexpr (kPart == 3) {
      return make_uint4(__byte_perm(~first.x, 0, 0x0123), __byte_perm(~first.y, 0, 0x0123), first.x, first.y);
    } else if constexpr (kBases == 4) {
      const uint2 second = upper_levels<2>(s + 2, inverse);
      return make_uint4(whole(first.x), whole(first.y), whole(second.x), whole(second.y));
    } else {
      return make_uint4(whole(first.x), whole(first.y), 0, 0);
    }
  }

  template <int kPart, bool kFirst, int kColumns>
  static __device__ __forceinline__ void add_part(int (&upper)[kColumns][4], int (&middle)[kColumns][4],
                                                  const uint2* words, const uint4 (&table)[2], const uint4* x) {
    uint32_t w0[kPart], w1[kPart], c[2][4];
#pragma unroll
    for (int b = 0; b < kPart; ++b) {
      w0[b] = words[b].x;
      w1[b] = words[b].y;
    }
    all_codes<kPart>(c[0], w0);
    all_codes<kPart>(c[1], w1);
    const auto step = [&](auto first, int i) {
      constexpr bool kStart = decltype(first)::value;
      uint32_t high[4], low[4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t selector = h == 0 ? c[r][i] : c[r][i] >> 16;
          low[r + 2 * h] = look_up_bytes(table[r].x, kPart > 2 ? table[r].z : 0, selector);
          high[r + 2 * h] = look_up_bytes(table[r].y, kPart > 2 ? table[r].w : 0, selector);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const uint4 b = x[n * kColumn * kRowStride + 4 * i];
        multiply_bytes<kStart>(upper[n], high, b.x, b.y);
        multiply_bytes<kStart>(middle[n], high, b.z, b.w);
        multiply_bytes<false>(middle[n], low, b.x, b.y);
      }
    };
    step(std::bool_constant<kFirst>{}, 0);
#pragma unroll
    for (int i = 1; i < 4; ++i) step(std::false_type{}, i);
  }

  // `inverse`: of the units of rows 2g and 2g + 1.
  template <int kBases, int kColumns>
  static __device__ __forceinline__ void add(float (&sums)[kColumns][4], const Chunk<kBases>& chunk,
                                             const uint4 (&table)[2], const float2& inverse, const uint4* x,
                                             const float2* numbers, int t) {
    int upper[kColumns][4], middle[kColumns][4];
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    add_part<kPart, true>(upper, middle, chunk.words, table, x);
    if constexpr (kBases == 4) {
      const uint4 second[2] = {{table[0].z, table[0].w, 0, 0}, {table[1].z, table[1].w, 0, 0}};
      add_part<2, false>(upper, middle, chunk.words + 2, second, x);
    }
    // Units of z: those of `middle`, and of the total that numbers hold.
    constexpr float kOffset = 1.0f / 256.0f / correction(kBases);
    const float z[2] = {chunk.offset.x * inverse.x * kOffset, chunk.offset.y * inverse.y * kOffset};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 number = numbers[n * kColumn + 2 * t + i % 2];
        float part = __int_as_float(middle[n][i]) - number.y;
        part = fmaf(256.0f, __int_as_float(upper[n][i]) - kMagic, part);
        part = fmaf(z[i / 2], kMagic - number.y, part);
        sums[n][i] = fmaf(number.x, part, sums[n][i]);
      }
    }
  }
};

}  // namespace qbb::cuda
