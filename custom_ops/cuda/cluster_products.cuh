// How X and weights meet in cluster.cuh: both as whole numbers of 16 bits (ByteProducts), or as float16 (HalfProducts).
//
// X of a chunk in shared memory: two matrices of kTokens rows of 128 bytes, as warpgroup products want them. A set of
// weights is what a lane has for half a chunk: four operands of four registers.
#pragma once

#include "cuda/bytes.cuh"
#include "cuda/halves.cuh"
#include "cuda/warpgroup.cuh"

namespace qbb::cuda {

// A look-up has eight entries, so four bases are two matrices.
__host__ __device__ constexpr int parts_of(int bases) { return bases == 4 ? 2 : 1; }

constexpr int kProductRow = 128;  // bytes, which is as far as the swizzle goes

// Piece `piece` of 16 bytes of a row changes places with others of that row.
__device__ __forceinline__ int place_in_row(int row, int piece) { return row * kProductRow + (piece ^ row % 8) * 16; }

// The tables of a part, of rows 2g and 2g + 1.
template <int kBases>
__device__ __forceinline__ uint4 table_of_part(const uint4& table, int part) {
  if constexpr (kBases != 4) return table;
  return part == 0 ? make_uint4(table.x, table.y, 0, 0) : make_uint4(table.z, table.w, 0, 0);
}

// Products of both bytes of weights and both bytes of X (bytes.cuh): h·h' and h·l', then l·h' and l·l', the last of which
// are there because they cost nothing, but are not used.
// kFloat: X is float32, else it has 16 bits.
template <int kRows, bool kFloat>
struct ByteProducts {
  static constexpr int kTokens = kRows, kRawPieces = kFloat ? Bytes::kRawPieces : 4;
  static constexpr bool kDirect = false, kNumbers = true;  // sums of a chunk need more before they are added; X has numbers
  using OfChunk = int[2][kTokens];

  // Sets of a chunk of weights.
  static __host__ __device__ constexpr int sets(int bases) { return 2 * parts_of(bases); }

  static __device__ __forceinline__ float unit_of(const Weights& w, int row) { return w.row_unit[row]; }

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    if constexpr (kFloat) {
      Bytes::load(raw, rows, row, k, K, aligned);
    } else {
      load_word(raw, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
    }
  }

  // Row `token` of the first matrix has the upper bytes, that of the second one the lower ones.
  template <int kBases>
  static __device__ __forceinline__ void stage(char* to, float2* number, const uint4 (&raw)[kRawPieces], Type type,
                                               int token, int word) {
    uint32_t high[4][2], low[4][2];
    const float2 of_chunk = Bytes::to_bytes(high, low, raw, type, Bytes::correction(kBases));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        char* at = to + place_in_row(token, 2 * i + h) + word * 4;
        *reinterpret_cast<uint32_t*>(at) = high[i][h];
        *reinterpret_cast<uint32_t*>(at + kTokens * kProductRow) = low[i][h];
      }
    }
    if (word == 0) *number = of_chunk;
  }

  template <int kBases>
  static __device__ __forceinline__ uint4 table(const float (&s)[kBases], float z, float inverse) {
    return Bytes::table<kBases>(s, z, inverse);
  }

  // Set `set`: upper and lower bytes of two steps.
  template <int kBases>
  static __device__ __forceinline__ void make(uint32_t (&a)[4][4], const uint32_t (&codes)[parts_of(kBases)][2][4],
                                              const uint4 (&tables)[2], int set) {
    constexpr bool kEight = kBases == 3;
    const int part = set / 2, half = set % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 table = table_of_part<kBases>(tables[r], part);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t code = codes[part][r][2 * half + j], selector = h == 0 ? code : shift_right<16>(code);
          a[2 * j][r + 2 * h] = look_up_bytes(table.y, kEight ? table.w : 0, selector);
          a[2 * j + 1][r + 2 * h] = look_up_bytes(table.x, kEight ? table.z : 0, selector);
        }
      }
    }
  }

#if QBB_WARPGROUP_PRODUCTS
  // kFirst: of a chunk.
  template <bool kFirst>
  static __device__ __forceinline__ void start(OfChunk& c, const uint32_t (&a)[4][4], uint64_t x, int set) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint64_t b = later(x, (set % 2 * 2 + j) * 32);
      if (kFirst && j == 0) {
        start_product<false>(c[0], a[0], b);
        start_product<false>(c[1], a[1], b);
      } else {
        start_product(c[0], a[2 * j], b);
        start_product(c[1], a[2 * j + 1], b);
      }
    }
  }
#endif

  // `z`: offsets of rows 2g and 2g + 1, divided by the units of these rows.
  template <int kBases>
  static __device__ __forceinline__ void add(float (&sums)[kTokens / 2], const OfChunk& c, float2 z,
                                             const float2* numbers, int t, bool offset) {
    constexpr float kOffset = 1.0f / 256.0f / Bytes::correction(kBases);  // numbers hold totals times the latter
#pragma unroll
    for (int n = 0; n < kTokens / kColumn; ++n) {
      const float4 two = *reinterpret_cast<const float4*>(numbers + n * kColumn + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float step = i % 2 == 0 ? two.x : two.z, base = i % 2 == 0 ? two.y : two.w;
        const int at = 4 * n + i;
        float part = as_float(c[0][kTokens / 2 + at] + c[1][at]) - base;
        part = fmaf(256.0f, as_float(c[0][at]) - Bytes::kMagic, part);
        if (offset) part = fmaf((i < 2 ? z.x : z.y) * kOffset, Bytes::kMagic - base, part);
        sums[at] = fmaf(step, part, sums[at]);
      }
    }
  }

 private:
  // Plus kMagic: of at most 22 bits and a sign.
  static __device__ __forceinline__ float as_float(int v) {
    return __uint_as_float(static_cast<uint32_t>(v) + __float_as_uint(Bytes::kMagic));
  }
};

// kBrain: X is bfloat16, whose chunks were divided by powers of two.
template <int kRows, bool kBrain>
struct HalfProducts {
  using Kind = Halves<kBrain>;
  static constexpr int kTokens = kRows, kRawPieces = Kind::kRawPieces;
  static constexpr bool kDirect = !kBrain, kNumbers = kBrain;
  using OfChunk = float[kTokens / 2];

  static __host__ __device__ constexpr int sets(int /*bases*/) { return 2; }

  static __device__ __forceinline__ float unit_of(const Weights& w, int /*row*/) { return w.unit; }

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    Kind::load(raw, rows, row, k, K, aligned);
  }

  // Row `token` of the first matrix has the pairs of steps 0 … 3, that of the second one those of steps 4 … 7 (levels.cuh).
  template <int kBases>
  static __device__ __forceinline__ void stage(char* to, float2* number, const uint4 (&raw)[kRawPieces], Type, int token,
                                               int word) {
    uint32_t r[16];
    spread(r, raw);
    if constexpr (kBrain) {
      const float power = to_half(r);
      if (word == 0) *number = make_float2(power, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        char* at = to + i / 2 * kTokens * kProductRow + place_in_row(token, i % 2 * 4 + j) + word * 4;
        *reinterpret_cast<uint32_t*>(at) = pair_of(r, i, j);
      }
    }
  }

  template <int kBases>
  static __device__ __forceinline__ uint4 table(const float (&s)[kBases], float z, float inverse) {
    return Kind::template table<kBases>(s, z, inverse);
  }

  // Set `set`: four steps.
  template <int kBases>
  static __device__ __forceinline__ void make(uint32_t (&a)[4][4], const uint32_t (&codes)[parts_of(kBases)][2][4],
                                              const uint4 (&tables)[2], int set) {
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    uint32_t made[parts_of(kBases)][4][4];
#pragma unroll
    for (int p = 0; p < parts_of(kBases); ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 table = table_of_part<kBases>(tables[r], p);
        const Levels levels{{table.x, table.z}, {table.y, table.w}};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          look_up<kPart>(made[p][s][r], made[p][s][r + 2], levels, codes[p][r][2 * set + s / 2], s % 2);
        }
      }
    }
    if constexpr (kBases == 4) add_pairs(made[0], made[1]);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = made[0][s][i];
    }
  }

#if QBB_WARPGROUP_PRODUCTS
  template <bool kFirst>
  static __device__ __forceinline__ void start(OfChunk& c, const uint32_t (&a)[4][4], uint64_t x, int set) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint64_t b = later(x, set * kTokens * kProductRow + s * 32);
      if (kFirst && s == 0) {
        start_product<false>(c, a[s], b);
      } else {
        start_product(c, a[s], b);
      }
    }
  }
#endif

  template <int kBases>
  static __device__ __forceinline__ void add(float (&sums)[kTokens / 2], const OfChunk& c, float2, const float2* numbers,
                                             int t, bool) {
#pragma unroll
    for (int n = 0; n < kTokens / kColumn; ++n) {
      const float4 two = *reinterpret_cast<const float4*>(numbers + n * kColumn + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * n + i] = fmaf(i % 2 == 0 ? two.x : two.z, c[4 * n + i], sums[4 * n + i]);
    }
  }
};

}  // namespace qbb::cuda
