// How X and weights meet in cluster.cuh, mostly: both as float16, weights by look-ups.
//
// X of a chunk in shared memory: two matrices of kTokens rows of 128 bytes, as warpgroup products want them. A set of
// weights is what a lane has for half a chunk: four operands of four registers.
#pragma once

#include "cuda/cluster_piece.cuh"
#include "cuda/halves.cuh"

namespace qbb::cuda {

// A look-up has eight entries, so four bases are two matrices.
__host__ __device__ constexpr int parts_of(int bases) { return bases == 4 ? 2 : 1; }

// The tables of a part, of rows 2g and 2g + 1.
template <int kBases>
__device__ __forceinline__ uint4 table_of_part(const uint4& table, int part) {
  if constexpr (kBases != 4) return table;
  return part == 0 ? make_uint4(table.x, table.y, 0, 0) : make_uint4(table.z, table.w, 0, 0);
}

// kBrain: X is bfloat16, whose chunks were divided by powers of two.
template <int kRows, bool kBrain>
struct HalfProducts {
  using Kind = Halves<kBrain>;
  static constexpr int kTokens = kRows, kRawPieces = Kind::kRawPieces;
  static constexpr int kInputBytes = 2;
  static constexpr bool kDirect = !kBrain, kNumbers = kBrain, kTables = true;
  using OfChunk = float[kTokens / 2];

  static __device__ __forceinline__ float unit_of(const Weights& w) { return w.unit; }

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    Kind::load(raw, rows, row, k, K, aligned);
  }

  // Row `token` of the first matrix has the pairs of steps 0 … 3, that of the second one those of steps 4 … 7 (levels.cuh).
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

#if QBB_WARPGROUP_PRODUCTS
  // Adds the products of a piece. `tables`: the warp's own memory; `unit`: of lane's row; x: the piece's first chunk of X, and
  // its numbers.
  template <class Memory, int kBases>
  static __device__ __forceinline__ void multiply(float (&sums)[kTokens / 2], const Piece& p, uint64_t x, const float2* numbers,
                                                  uint4* tables, float unit, int lane) {
    constexpr int kParts = parts_of(kBases), kPart = kBases / kParts;
    const float inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    // Levels: a lane makes those of a row and chunk.
#pragma unroll
    for (int i = 0; i < Memory::kChunks; i += 2) {
      const int u = i + lane / QBB_TILE_ROWS;
      const int place = p.template place<Memory>(u, lane % QBB_TILE_ROWS);
      float s[kBases], z = 0.0f;
#pragma unroll
      for (int b = 0; b < kBases; ++b) {
        s[b] = p.has(u) ? __half2float(*reinterpret_cast<const __half*>(p.template scale<Memory>(b, place))) : 0.0f;
      }
      if (p.offset && p.has(u)) z = *reinterpret_cast<const float*>(p.template offsets<Memory>(place));
      tables[i * QBB_TILE_ROWS + lane] = table<kBases>(s, z, inverse);
    }
    __syncwarp();
    uint32_t a[2][4][4];  // the next set of weights is made while one is multiplied
    [[maybe_unused]] OfChunk of_chunk[2];
#pragma unroll
    for (int u = 0; u < Memory::kChunks; ++u) {
      const uint4 table[2] = {tables[u * QBB_TILE_ROWS + lane / 4 * 2], tables[u * QBB_TILE_ROWS + lane / 4 * 2 + 1]};
      uint2 words[kBases];
#pragma unroll
      for (int b = 0; b < kBases; ++b) words[b] = p.template words<Memory>(b, u, lane);
      if (u + 1 == Memory::kChunks) {
        __syncwarp();  // all have read the levels
        arrive(p.empty);
      }
      uint32_t codes[kParts][2][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t w0[kPart], w1[kPart];
#pragma unroll
        for (int b = 0; b < kPart; ++b) {
          w0[b] = words[part * kPart + b].x;
          w1[b] = words[part * kPart + b].y;
        }
        all_codes<kPart>(codes[part][0], w0);
        all_codes<kPart>(codes[part][1], w1);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        make<kBases>(a[i], codes, table, i);
        begin_products();
        const uint64_t at = later(x, u * Memory::kChunkBytes);
        if constexpr (kDirect) {
          start<false>(sums, a[i], at, i);
        } else if (i == 0) {
          start<true>(of_chunk[u % 2], a[i], at, i);
        } else {
          start<false>(of_chunk[u % 2], a[i], at, i);
        }
        end_products();
        wait_for_products<1>();  // registers of the set before can be written, and those of the chunk before read
        if constexpr (!kDirect) {
          if (i == 0 && u > 0) {
            hold(of_chunk[(u + 1) % 2]);
            add(sums, of_chunk[(u + 1) % 2], numbers + (u - 1) * kTokens, lane % 4);
          }
        }
      }
    }
    wait_for_products<0>();
    if constexpr (kDirect) {
      hold(sums);
    } else {
      hold(of_chunk[1]);
      add(sums, of_chunk[1], numbers + (Memory::kChunks - 1) * kTokens, lane % 4);
    }
  }

 private:
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

  static __device__ __forceinline__ void add(float (&sums)[kTokens / 2], const OfChunk& c, const float2* numbers, int t) {
#pragma unroll
    for (int n = 0; n < kTokens / kColumn; ++n) {
      const float4 two = *reinterpret_cast<const float4*>(numbers + n * kColumn + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[4 * n + i] = fmaf(i % 2 == 0 ? two.x : two.z, c[4 * n + i], sums[4 * n + i]);
    }
  }
#endif
};

}  // namespace qbb::cuda
