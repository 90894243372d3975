// Few rows of X in integer modes: table_kernel.h with whole numbers of one or two bytes for the entries of its tables.
//
// Numerics, for each row of X and each segment (the inputs of a group, at most 256):
//   1. q    = largest |x0|+|x1|+|x2|+|x3| of its quads;  step = q / 32512
//   2. x'   = x * (32512 / q), rounded to the nearest whole number
//   3. t    = +-x0' +-x1' +-x2' +-x3', 16 bits and exact. int16 mode looks up t; int8 mode (t + 128) >> 8 in its place
//   4. p_b  = sum of what is looked up, exact
//   5. c    = fma(s_b, p_b, c) for b = 0, 1, ..., from 0; then fma(z, sum of all x', c)
//   6. acc  = fma(c, step, acc); in the end acc + bias, rounded once to the type of Y
// Sums of whole numbers do not depend on their order, so every ISA gives the same bits by construction.
//
// 16 inputs make one 64-byte table: entries j*16 .. j*16+15 are the sums of quad j. A byte j of a weight word then picks
// its entry by one of its nibbles, for four quads at a time. Entries of two bytes are two such tables, high and low.
#pragma once

#include "cpu/table_kernel.h"

namespace qbb::cpu {
namespace {

constexpr float kLargest = 32512;          // of a sum: 127 * 256, so that rounding to a byte never leaves -127..127
constexpr float kTiny = 0x1p-100f;         // segments below count as zero: 1 / q stays finite
constexpr int kTableBytes = 2 * 64;        // of one word and one byte of the entries
// Of tables at a time:
constexpr int kRowTableBytes = 128 << 10;      // one row of X leaves time to fetch them from L2: weights stream on
constexpr int kBlockTableBytes = 24 << 10;     // more rows: they stay in L1 next to the weights that stream past
constexpr int64_t kAllTableBytes = 256 << 10;  // of all K and a block of rows: a part of L2
constexpr int64_t kWeightBytes = 384 << 10;    // of weights that several blocks of rows read: another part of it
// What is asked for ahead, all bases together: memory answers after some 100 ns, in which it could deliver 3 KB.
constexpr int64_t kAheadWords = 144;
constexpr int64_t kAheadScales = 16 * kLanes;

struct Step {
  float value, inverse;  // inverse 0: all inputs count as 0
};

// Inputs of one segment in x, and the value of 1 if their largest is to become `codes`: the largest |x|, or the largest
// sum of four (`kQuads`).
template <class V, bool kQuads>
QBB_INLINE Step load_segment(const Block& k, int64_t row, const core::Segment& segment, float codes, float* x) {
  typename V::Lanes largest = V::zero(), probe = V::zero();
  for (int w = 0; w < segment.words; ++w, x += QBB_WORD_BITS) {
    load_inputs<V>(k, row, segment.first + w, x);
    for (int i = 0; i < QBB_WORD_BITS; i += kLanes) {
      typename V::Lanes a = V::abs(V::load(x + i));
      if constexpr (kQuads) a = V::quad_sums(a);
      largest = V::max(a, largest);
      probe = V::fma(a, V::zero(), probe);  // NaN where a is not finite
    }
  }
  if (!V::all_zero(probe)) return {__builtin_nanf(""), 0};
  const float q = V::largest(largest);
  return q < kTiny ? Step{0, 0} : Step{q / codes, codes / q};
}

// Tables of the segments of a block, for its rows.
template <class V, int kBytes>
QBB_NOINLINE void build_byte_tables(const Block& k) {
  alignas(64) float x[core::kSegmentWords * QBB_WORD_BITS];
  alignas(64) int16_t codes[core::kSegmentWords * QBB_WORD_BITS];
  for (int64_t s = k.segment; s < k.segment + k.segments; ++s) {
    const core::Segment& segment = k.w->segments[s];
    for (int64_t row = k.row; row < k.row + k.rows; ++row) {
      const Step step = load_segment<V, true>(k, row, segment, kLargest, x);
      const typename V::Lanes inverse = V::splat(step.inverse);
      int32_t total = 0;
      for (int i = 0; i < segment.words * QBB_WORD_BITS; i += kLanes) {
        if (step.inverse != 0) {
          V::store_rounded(codes + i, V::mul(V::load(x + i), inverse));
        } else {
          memset(codes + i, 0, kLanes * sizeof *codes);
        }
        for (int j = 0; j < kLanes; ++j) total += codes[i + j];
      }
      k.a.steps[s * k.M + row] = step.value * (kBytes == 1 ? 256 : 1);
      k.a.totals[s * k.M + row] = total;
      for (int w = 0; w < segment.words; ++w) {
        uint8_t* table = k.a.codes + ((segment.first + w) * k.a.table_rows + row) * kBytes * kTableBytes;
        for (int h = 0; h < 2; ++h) {
          V::template byte_tables<kBytes>(codes + w * QBB_WORD_BITS + h * 16, table + h * 64,
                                          table + kTableBytes + h * 64);
        }
      }
    }
  }
}

// Where tiles are read: moves on from segment to segment.
struct Cursor {
  const uint32_t* words;   // of the first tile and basis
  const uint8_t* tables;   // of the first row of X
  int64_t plane;           // words from one basis to the next
  int64_t tile;            // words from one tile to the next
  int64_t table_stride;    // bytes from one word to the next
  int64_t ahead;           // words to prefetch
};

// Adds B bases from `basis` on of one segment to c [T, R]: R rows of X share the indexes, bases and tiles the tables.
// kWords: words of the segment where they are known at compile time, else 0.
template <class V, int kBytes, int R, int B, int T, int kWords>
QBB_INLINE void add_byte_bases(const core::Tiled& w, const Cursor& at, int64_t basis, int num_words, int64_t scales,
                               typename V::Lanes* c) {
  using Lanes = typename V::Lanes;
  const int count = kWords > 0 ? kWords : num_words;
  const uint32_t* words = at.words + basis * at.plane;
  const uint8_t* tables = at.tables;
  constexpr int kStreams = T * B;  // stream i: tile i / B, basis i % B
  typename V::Ints high[kStreams][R], low[kStreams][R];
  for (int i = 0; i < kStreams; ++i) {
    for (int r = 0; r < R; ++r) high[i][r] = low[i][r] = V::zero_ints();
  }
  for (int word = 0; word < count; ++word, words += kLanes, tables += at.table_stride) {
    typename V::Indexes index[kStreams];
    for (int i = 0; i < kStreams; ++i) {
      const uint32_t* from = words + i / B * at.tile + i % B * at.plane;
      index[i] = V::indexes(V::load_words(from));
      __builtin_prefetch(from + at.ahead);
    }
    for (int r = 0; r < R; ++r) {
      const uint8_t* table = tables + r * kBytes * kTableBytes;
      for (int i = 0; i < kStreams; ++i) {
        high[i][r] = V::add_signed(high[i][r], index[i], table);
        if constexpr (kBytes == 2) low[i][r] = V::add_unsigned(low[i][r], index[i], table + kTableBytes);
      }
    }
  }
  for (int i = 0; i < kStreams; ++i) {
    const int64_t from = scales + ((basis + i % B) * w.tiles + i / B) * w.groups * kLanes;
    const Lanes scale = load_scales<V>(w, from);
    __builtin_prefetch(static_cast<const char*>(w.scales) + (from + kAheadScales) * (w.half_scales ? 2 : 4));
    for (int r = 0; r < R; ++r) {
      Lanes p = V::to_float(high[i][r]);
      if constexpr (kBytes == 2) p = V::fma(p, V::splat(256), V::to_float(low[i][r]));  // exact: below 2^24
      Lanes& sum = c[i / B * R + r];
      sum = V::fma(scale, p, sum);
    }
  }
}

// Adds segments s .. end of T tiles to the accumulators [T, R, 16], B bases at a time.
template <class V, int kBytes, int R, int B, int T>
QBB_INLINE void add_byte_tiles(const Block& k, int64_t row, int64_t tile, int64_t s, int64_t end, float* acc) {
  const core::Tiled& w = *k.w;
  const int64_t first = w.segments[s].first;
  const core::Segment& final = w.segments[end - 1];
  const int64_t block = final.first + final.words - first;
  const int64_t distance = kAheadWords / (w.bases * T) < block ? kAheadWords / (w.bases * T) : block;
  Cursor at{w.planes + (tile * w.words + first) * kLanes,
            k.a.codes + (first * k.a.table_rows + row) * kBytes * kTableBytes,
            w.tiles * w.words * kLanes,
            w.words * kLanes,
            k.a.table_rows * kBytes * kTableBytes,
            0};
  typename V::Lanes a[T * R];
  for (int i = 0; i < T * R; ++i) a[i] = V::load(acc + i * kLanes);
  for (; s < end; ++s) {
    const core::Segment segment = w.segments[s];
    const int64_t scales = (tile * w.groups + segment.group) * kLanes;
    // The word that is read `distance` words later: in this block, or in the same block of the next tiles.
    const bool inside = segment.first - first + distance < block;
    at.ahead = (inside ? distance : T * w.words + distance - block) * kLanes;
    typename V::Lanes c[T * R];
    for (int i = 0; i < T * R; ++i) c[i] = V::zero();
    int64_t b = 0;
    for (; w.bases - b >= B; b += B) {
      if (segment.words == 4) {  // groups of 128
        add_byte_bases<V, kBytes, R, B, T, 4>(w, at, b, 4, scales, c);
      } else {
        add_byte_bases<V, kBytes, R, B, T, 0>(w, at, b, segment.words, scales, c);
      }
    }
    if constexpr (B > 1) {
      for (; b < w.bases; ++b) add_byte_bases<V, kBytes, R, 1, T, 0>(w, at, b, segment.words, scales, c);
    }
    at.words += segment.words * kLanes;
    at.tables += segment.words * at.table_stride;
    if (w.offset != nullptr) {
      for (int i = 0; i < T * R; ++i) {
        const typename V::Lanes z = V::load(w.offset + scales + i / R * w.groups * kLanes);
        const float total = static_cast<float>(k.a.totals[s * k.M + row + i % R]) * (kBytes == 1 ? 0x1p-8f : 1);
        c[i] = V::fma(z, V::splat(total), c[i]);
      }
    }
    for (int i = 0; i < T * R; ++i) a[i] = V::fma(c[i], V::splat(k.a.steps[s * k.M + row + i % R]), a[i]);
  }
  for (int i = 0; i < T * R; ++i) V::store(acc + i * kLanes, a[i]);
}

// R rows of X times all tiles of the block.
template <class V, int kBytes, int R, int B, int T = 1>
QBB_NOINLINE void run_byte_rows(const Block& k, int64_t row) {
  constexpr int kWords = (R == 1 ? kRowTableBytes : kBlockTableBytes) / (R * kBytes * kTableBytes);
  alignas(64) float acc[core::kMaxTaskTiles * R * kLanes];
  for (int64_t i = 0; i < k.tiles * R * kLanes; ++i) acc[i] = 0;
  for (int64_t s = 0, end = 0; s < k.w->num_segments; s = end) {
    for (int64_t words = 0; end < k.w->num_segments && (end == s || words < kWords); ++end) {
      words += k.w->segments[end].words;
    }
    int64_t i = 0;
    for (; k.tiles - i >= T; i += T) {
      add_byte_tiles<V, kBytes, R, B, T>(k, row, k.tile + i, s, end, acc + i * R * kLanes);
    }
    if constexpr (T > 1) {
      for (; i < k.tiles; ++i) add_byte_tiles<V, kBytes, R, B, 1>(k, row, k.tile + i, s, end, acc + i * R * kLanes);
    }
  }
  for (int64_t i = 0; i < k.tiles; ++i) {
    for (int r = 0; r < R; ++r) finish_tile<V>(k, row + r, k.tile + i, acc + (i * R + r) * kLanes);
  }
}

// R rows of X: the bases side by side, as many as the registers hold. Beside a single row and basis that is a second
// tile, which pays where tables come from L2.
template <class V, int kBytes, int R>
QBB_INLINE void run_byte_row(const Block& k, int64_t row) {
  constexpr int kFit = V::kByteSums / (R * kBytes);
  if constexpr (kFit >= 4) {
    if (k.w->bases >= 4) return run_byte_rows<V, kBytes, R, 4>(k, row);
  }
  if constexpr (kFit >= 3) {
    if (k.w->bases >= 3) return run_byte_rows<V, kBytes, R, 3>(k, row);
  }
  if constexpr (kFit >= 2) {
    if (k.w->bases >= 2) return run_byte_rows<V, kBytes, R, 2>(k, row);
  }
  if constexpr (R == 1 && kFit >= 2) {
    if (k.w->words * kBytes * kTableBytes > kBlockTableBytes) return run_byte_rows<V, kBytes, R, 1, 2>(k, row);
  }
  run_byte_rows<V, kBytes, R, 1>(k, row);
}

template <class V, int kBytes, int kRows>
QBB_INLINE void run_byte_blocks(const Block& k) {
  // Tiles whose weights stay in L2 until the last block of rows has passed.
  const int64_t fit = kWeightBytes / (k.w->bases * k.w->words * kLanes * 4);
  const int64_t step = k.rows <= kRows ? k.tiles : fit < 1 ? 1 : fit;
  Block part = k;
  for (int64_t tile = 0; tile < k.tiles; tile += step) {
    part.tile = k.tile + tile;
    part.tiles = k.tiles - tile < step ? k.tiles - tile : step;
    in_blocks<kRows>(k.row, k.row + k.rows, [&](auto rows, int64_t row) {
      run_byte_row<V, kBytes, decltype(rows)::value>(part, row);
    });
  }
}

template <class V, int kBytes>
QBB_INLINE void run_byte_tables(const Block& k) {
  constexpr int kRows = V::kByteRows;
  if constexpr (kRows > 4) {  // long rows: the tables of fewer of them fit L2
    if (k.w->words * kRows * kBytes * kTableBytes > kAllTableBytes) return run_byte_blocks<V, kBytes, 4>(k);
  }
  run_byte_blocks<V, kBytes, kRows>(k);
}

}  // namespace
}  // namespace qbb::cpu
