// How X and weights meet in cluster.cuh where there are few rows of X: bits as bytes, X as whole numbers of two bytes.
//
// A word of weights, shifted by an even number and masked by 0x01010101 or 0x02020202, is four weights of 0 or 1, or of 0 or
// 2: one instruction, no look-up, nothing to put together. Inputs that meet the former are kept twice as large, so that all
// of a basis is one sum, V, twice that of the inputs whose bit is set. With T the inputs' total, Σ sign·x = V − T. Two signed
// bytes hold twice 16319, so inputs are rounded to whole numbers of 15 bits, of a common step for each 128.
//
// X of a chunk in shared memory: two matrices, one of each byte, of kTokens rows of 128 bytes; together one operand.
#pragma once

#include "cuda/bytes.cuh"
#include "cuda/cluster_piece.cuh"

namespace qbb::cuda {

// kFloat: X is float32, else it has 16 bits.
template <int kRows, bool kFloat>
struct BitProducts {
  static constexpr int kTokens = kRows, kRawPieces = kFloat ? Bytes::kRawPieces : 4;
  static constexpr int kInputBytes = 2;
  static constexpr bool kNumbers = true, kTables = false;
  static constexpr int kToUpper = kTokens / 2;  // in a lane's sums: those of lower bytes of X, then of upper ones

  static __device__ __forceinline__ float unit_of(const Weights&) { return 1.0f; }

  static __device__ __forceinline__ void load(uint4 (&raw)[kRawPieces], const Rows& rows, int row, int k, int K,
                                              bool aligned) {
    if constexpr (kFloat) {
      Bytes::load(raw, rows, row, k, K, aligned);
    } else {
      load_word(raw, static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * K, k, K, aligned);
    }
  }

  // A word of X. Step s of the product takes bits 8i + 2s of all words in its first half, bits 8i + 2s + 1 in the second.
  // `number`: the chunk's step and total. Four neighbouring lanes hold the words of a chunk.
  static __device__ __forceinline__ void stage(char* to, float2* number, const uint4 (&raw)[kRawPieces], Type type, int token,
                                               int word) {
    constexpr float kLargest = 16319.0f, kMagic = Bytes::kMagic;
    constexpr uint32_t kFlip = 0x80808080u;  // bytes 0 … 255 to bytes -128 … 127
    const uint32_t magic = __float_as_uint(kMagic);
    float v[QBB_WORD_BITS];
    Bytes::to_numbers(v, raw, type);
    const float largest = Bytes::largest_of_chunk(v);
    const bool some = largest > kSmallest;
    const float inverse = some ? kLargest / largest : 0.0f;
    uint32_t total = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t rounded = __float_as_uint(fmaf(v[input_of_bit(8 * i + j)], inverse, kMagic));
        total += rounded;
        q[i] = ((rounded - magic) << (1 - j % 2)) + (kFlip & 0xffffu);
      }
      const uint32_t first = __byte_perm(q[0], q[1], 0x5140), last = __byte_perm(q[2], q[3], 0x5140);
      char* at = to + place_in_row(token, j) + word * 4;
      *reinterpret_cast<uint32_t*>(at) = __byte_perm(first, last, 0x5410) ^ kFlip;
      *reinterpret_cast<uint32_t*>(at + kTokens * kProductRow) = __byte_perm(first, last, 0x7632) ^ kFlip;
    }
    total -= QBB_WORD_BITS * magic;
    total = Bytes::total_of_chunk(total);
    if (word != 0) return;
    *number = make_float2(some ? largest / kLargest : 0.0f, static_cast<float>(static_cast<int>(total)));
  }

#if QBB_WARPGROUP_PRODUCTS
  // Adds the products of a piece. x: the piece's first chunk of X, and its numbers.
  template <class Memory, int kBases>
  static __device__ __forceinline__ void multiply(float (&sums)[kTokens / 2], const Piece& p, uint64_t x, const float2* numbers,
                                                  uint4*, float, int lane) {
    constexpr int kSets = Memory::kChunks * kBases;  // a set: all weights of a chunk and basis
    uint32_t a[2][4][4];                             // one is made while the one before is multiplied
    int counts[2][2 * kToUpper];
    float2 scales[2][kBases] = {}, z[2] = {};
    float part[kTokens / 2];  // of a chunk
    uint2 words[kBases];
    const auto finish = [&](int set) {
      const int u = set / kBases, b = set % kBases;
      hold(counts[set % 2]);
      const float2 scale = scales[u % 2][b];
#pragma unroll
      for (int n = 0; n < kTokens / kColumn; ++n) {
        const float4 two = *reinterpret_cast<const float4*>(numbers + u * kTokens + n * kColumn + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * n + i;
          const int count = counts[set % 2][kToUpper + at] * 256 + counts[set % 2][at];
          const float step = i % 2 == 0 ? two.x : two.z, total = i % 2 == 0 ? two.y : two.w;
          if (b == 0) part[at] = p.offset ? (i < 2 ? z[u % 2].x : z[u % 2].y) * total : 0.0f;
          part[at] = fmaf(i < 2 ? scale.x : scale.y, static_cast<float>(count) - total, part[at]);
          if (b + 1 == kBases) sums[at] = fmaf(step, part[at], sums[at]);
        }
      }
    };
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int u = set / kBases, b = set % kBases;
      if (b == 0) {
        const int place = p.template place<Memory>(u, lane / 4 * 2);
#pragma unroll
        for (int c = 0; c < kBases; ++c) {
          words[c] = p.template words<Memory>(c, u, lane);
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(p.template scale<Memory>(c, place));
          scales[u % 2][c] = to_floats(p.has(u) ? pair : 0);
        }
        if (p.offset && p.has(u)) z[u % 2] = *reinterpret_cast<const float2*>(p.template offsets<Memory>(place));
        if (u + 1 == Memory::kChunks) arrive(p.empty);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t even = shifted(words[b].x, s), odd = shifted(words[b].y, s);  // rows
        a[set % 2][s][0] = even & 0x01010101u;
        a[set % 2][s][1] = odd & 0x01010101u;
        a[set % 2][s][2] = even & 0x02020202u;
        a[set % 2][s][3] = odd & 0x02020202u;
        hold(a[set % 2][s]);  // else they would be made between products, which are then fenced off from each other
      }
      begin_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint64_t at = later(x, u * Memory::kChunkBytes + s * 32);
        if (s == 0) {
          start_product<false>(counts[set % 2], a[set % 2][s], at);
        } else {
          start_product(counts[set % 2], a[set % 2][s], at);
        }
      }
      end_products();
      wait_for_products<1>();
      if (set > 0) finish(set - 1);
    }
    wait_for_products<0>();
    finish(kSets - 1);
  }

 private:
  static __device__ __forceinline__ uint32_t shifted(uint32_t word, int step) {
    return step == 0 ? word : step == 1 ? shift_right<2>(word) : step == 2 ? shift_right<4>(word) : shift_right<6>(word);
  }
#endif
};

}  // namespace qbb::cuda
