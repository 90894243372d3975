// The algorithm, once; cpu/<isa>.cc instantiates it with a class V of vector operations on 16 lanes.
//
// Lane = output row. Four inputs x0..x3 have only 16 sums +-x0+-x1+-x2+-x3, so those are tabulated, and a nibble of a
// weight word is the index of its sum:
//
//     tables of one word                 T0         T1          T2         T3      ...    T7
//     (16 floats each)               x[0..3]   x[16..19]     x[4..7]   x[20..23]       x[28..31]
//                                        ^          ^
//     weight words of 16 rows    bits 0..3      4..7  ...                           (layout 1, format.h)
//
// Numerics, which every ISA follows to the bit (see the comments "order:"):
//   1. table entry  (+-x0 +-x1) + (+-x2 +-x3)
//   2. one word     ((T0+T1) + (T2+T3)) + ((T4+T5) + (T6+T7))
//   3. a segment    p = 0 + word + word + ...; it ends with its group or at a multiple of 8 words, so a block of K
//                   never cuts one
//   4. acc = acc + scale_b * p_b for b = 0, 1, ...; then acc = acc + z * (sum of the segment's inputs)
//   5. acc + bias, rounded once to the type of Y
// All in float32, every product rounded before it is added (no fma). A sum that starts at +0 is never -0, so the sign
// of a zero in a table changes nothing. Inputs at or past K are 0 in the tables: padding bits cannot matter.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/half.h"
#include "cpu/kernel.h"

#define QBB_INLINE inline __attribute__((always_inline))
#define QBB_NOINLINE __attribute__((noinline))  // keeps the stack of one row count from adding to that of another

namespace qbb::cpu {
namespace {

constexpr int kLanes = QBB_TILE_ROWS;
constexpr int kNibbles = QBB_WORD_BITS / 4;
constexpr int kWordTables = kNibbles * 16;  // floats that the tables of one word take
constexpr int kSegmentWords = core::kSegmentWords;
constexpr int kTableWords = 64;  // 32 KB of tables: they stay in a 48 KB L1 next to the weights that stream past
constexpr int kPrefetchWords = 24;  // of each basis: hardware alone does not keep up with 1..8 streams that end at tiles

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<0>), ..., f(Constant<N - 1>). Where f keeps sums in an array, GCC unrolls an ordinary loop too late to see
// that they fit registers, and stores all of them in every step.
template <int N, class F>
QBB_INLINE void unrolled(F f) {
  if constexpr (N > 1) unrolled<N - 1>(f);
  f(Constant<N - 1>{});
}
#define QBB_EACH(i) [&](auto i) __attribute__((always_inline))

// f(Constant<count>), count being 1..kMost.
template <int kMost, class F>
QBB_INLINE void with_constant(int64_t count, F f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, f);
  }
  f(Constant<kMost>{});
}

// f(rows, first) for blocks of rows from `row` to `end`, as even as can be and none above kMost: one more row never
// costs less, because no block is so low that it waits for its own sums.
template <int kMost, class F>
QBB_INLINE void in_blocks(int64_t row, int64_t end, F f) {
  for (int64_t blocks = (end - row + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int64_t count = (end - row + blocks - 1) / blocks;
    with_constant<kMost>(count, [&](auto rows) { f(rows, row); });
    row += count;
  }
}

struct Segment {
  int first, count;  // words, counted within the block of K
  int64_t group;
};

// A block of K for R rows of X: at most kTableWords / R words.
template <int R>
struct Tables {
  static constexpr int kWords = kTableWords / R / kSegmentWords * kSegmentWords;
  static_assert(kWords > 0, "a block of K ends where a segment ends");
  alignas(64) float sums[kTableWords * kWordTables];  // [kWords, R, 8, 16]
  float totals[kTableWords];                          // [segments, R] sums of a segment's inputs
  Segment segments[kWords];
  int num_segments;
  int words;
};

// 32 inputs of one row as float32, zero at or past K.
template <class V>
QBB_INLINE void load_inputs(const Block& k, int64_t row, int64_t word, float* out) {
  const int64_t first = word * QBB_WORD_BITS;
  const int64_t left = k.w->K - first;
  const int count = left < QBB_WORD_BITS ? static_cast<int>(left) : QBB_WORD_BITS;
  const int64_t at = row * k.w->K + first;
  const bool whole = count == QBB_WORD_BITS;
  if (k.half) {
    const uint16_t* from = static_cast<const uint16_t*>(k.x) + at;
    uint16_t padded[QBB_WORD_BITS];
    if (!whole) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, from, static_cast<size_t>(count) * sizeof *padded);
      from = padded;
    }
    for (int i = 0; i < QBB_WORD_BITS; i += kLanes) V::store(out + i, V::load_half(from + i));
  } else {
    const float* from = static_cast<const float*>(k.x) + at;
    if (whole) {
      for (int i = 0; i < QBB_WORD_BITS; i += kLanes) V::store(out + i, V::load(from + i));
    } else {
      memset(out, 0, QBB_WORD_BITS * sizeof *out);
      memcpy(out, from, static_cast<size_t>(count) * sizeof *out);
    }
  }
}

// The entry of V::table with four plus signs. A V whose tables have a form of their own says here where it is.
template <class V>
QBB_INLINE float all_plus(const float* table) {
  return table[15];
}

template <class V, int R>
QBB_NOINLINE void build_tables(const Block& k, int64_t row, int64_t first_word, int words, Tables<R>& t) {
  t.num_segments = 0;
  t.words = words;
  for (int w = 0; w < words;) {
    const int64_t group = (first_word + w) / k.w->group_words;
    const int64_t group_end = (group + 1) * k.w->group_words - first_word;
    int end = (w / kSegmentWords + 1) * kSegmentWords;
    if (end > words) end = words;
    if (end > group_end) end = static_cast<int>(group_end);
    t.segments[t.num_segments++] = Segment{w, end - w, group};
    w = end;
  }
  for (int s = 0; s < t.num_segments; ++s) {
    const Segment& segment = t.segments[s];
    for (int r = 0; r < R; ++r) {
      float total = 0;
      for (int w = segment.first; w < segment.first + segment.count; ++w) {
        alignas(64) float x[QBB_WORD_BITS];
        load_inputs<V>(k, row + r, first_word + w, x);
        float* table = t.sums + (w * R + r) * kWordTables;
        for (int n = 0; n < kNibbles; ++n) V::store(table + n * 16, V::table(x + (n & 1) * 16 + (n >> 1) * 4));
        float sum[kNibbles];  // order: as for the words of a segment
        for (int n = 0; n < kNibbles; ++n) sum[n] = all_plus<V>(table + n * 16);
        total += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
      }
      t.totals[s * R + r] = total;
    }
  }
}

template <class V>
QBB_INLINE typename V::Lanes load_scales(const core::Tiled& w, int64_t at) {
  return w.half_scales ? V::load_half(static_cast<const uint16_t*>(w.scales) + at)
                       : V::load(static_cast<const float*>(w.scales) + at);
}

// Sum of `count` (a power of two) tables of one word from table n on; order: halves first, so additions form a tree.
template <class V, int n = 0, int count = kNibbles>
QBB_INLINE typename V::Lanes sum_word(const typename V::Words& word, const float* tables) {
  if constexpr (count == 1) {
    return V::template look_up<n>(word, tables + n * 16);
  } else {
    const typename V::Lanes low = sum_word<V, n, count / 2>(word, tables);
    return V::add(low, sum_word<V, n + count / 2, count / 2>(word, tables));
  }
}

// Adds `B` bases of one segment to the accumulators of one tile. Bases share the tables, rows share the words.
template <class V, int R, int B>
QBB_INLINE void add_bases(const core::Tiled& w, int64_t row, const Segment& segment, int64_t first_word,
                          const float* tables, int64_t ahead, typename V::Lanes* a) {
  using Lanes = typename V::Lanes;
  const int64_t plane = w.tiles * w.words * kLanes;
  const uint32_t* words = w.planes + (row * w.words + first_word + segment.first) * kLanes;
  Lanes p[B][R];
  for (int b = 0; b < B; ++b) {
    for (int r = 0; r < R; ++r) p[b][r] = V::zero();
  }
  for (int i = 0; i < segment.count; ++i, words += kLanes, tables += R * kWordTables) {
    typename V::Words word[B];
    for (int b = 0; b < B; ++b) {
      word[b] = V::load_words(words + b * plane);
      __builtin_prefetch(words + b * plane + ahead);
    }
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) p[b][r] = V::add(p[b][r], sum_word<V>(word[b], tables + r * kWordTables));
    }
  }
  for (int b = 0; b < B; ++b) {
    const Lanes scale = load_scales<V>(w, ((row + b * w.tiles) * w.groups + segment.group) * kLanes);
    for (int r = 0; r < R; ++r) a[r] = V::add(a[r], V::mul(scale, p[b][r]));
  }
}

// Adds one block of K to the accumulators [R, 16] of one tile.
template <class V, int R>
QBB_INLINE void add_tile(const core::Tiled& w, int64_t tile, int64_t first_word, const Tables<R>& t, float* acc) {
  using Lanes = typename V::Lanes;
  const int64_t distance = t.words < kPrefetchWords ? t.words : kPrefetchWords;
  Lanes a[R];
  for (int r = 0; r < R; ++r) a[r] = V::load(acc + r * kLanes);
  for (int s = 0; s < t.num_segments; ++s) {
    const Segment segment = t.segments[s];
    const float* tables = t.sums + segment.first * R * kWordTables;
    // The word that is read `distance` words later: in this block, or in the same block of the next tile.
    int64_t ahead = segment.first + distance < t.words ? distance : w.words + distance - t.words;
    ahead = tile + 1 == w.tiles ? 0 : ahead * kLanes;
    int64_t b = 0;
    if constexpr (V::kFloatSums >= 3 * R) {
      for (; w.bases - b >= 3; b += 3) add_bases<V, R, 3>(w, b * w.tiles + tile, segment, first_word, tables, ahead, a);
    }
    if constexpr (V::kFloatSums >= 2 * R) {
      while (w.bases - b >= 2) {
        add_bases<V, R, 2>(w, b * w.tiles + tile, segment, first_word, tables, ahead, a);
        b += 2;
      }
    }
    for (; b < w.bases; ++b) add_bases<V, R, 1>(w, b * w.tiles + tile, segment, first_word, tables, ahead, a);
    if (w.offset != nullptr) {
      const Lanes z = V::load(w.offset + (tile * w.groups + segment.group) * kLanes);
      for (int r = 0; r < R; ++r) a[r] = V::add(a[r], V::mul(z, V::splat(t.totals[s * R + r])));
    }
  }
  for (int r = 0; r < R; ++r) V::store(acc + r * kLanes, a[r]);
}

// Bias, rounding to the type of Y; rows at or past N are dropped here.
template <class V>
QBB_INLINE void finish_tile(const Block& k, int64_t row, int64_t tile, const float* acc) {
  const core::Tiled& w = *k.w;
  const int64_t n = tile * kLanes;
  const int64_t left = w.N - n;
  const auto count = static_cast<size_t>(left < kLanes ? left : kLanes);
  typename V::Lanes y = V::load(acc);
  if (w.bias != nullptr) {
    alignas(64) float bias[kLanes] = {};
    memcpy(bias, w.bias + n, count * sizeof *bias);
    y = V::add(y, V::load(bias));
  }
  if (k.half) {
    alignas(64) uint16_t out[kLanes];
    V::store_half(out, y);
    memcpy(static_cast<uint16_t*>(k.y) + row * w.N + n, out, count * sizeof *out);
  } else {
    alignas(64) float out[kLanes];
    V::store(out, y);
    memcpy(static_cast<float*>(k.y) + row * w.N + n, out, count * sizeof *out);
  }
}

// R rows of X times all tiles of the block.
template <class V, int R>
QBB_NOINLINE void run_rows(const Block& k, int64_t row) {
  Tables<R> tables;
  alignas(64) float acc[core::kMaxTaskTiles * R * kLanes];
  for (int64_t i = 0; i < k.tiles * R * kLanes; ++i) acc[i] = 0;
  for (int64_t first = 0; first < k.w->words; first += Tables<R>::kWords) {
    const int64_t left = k.w->words - first;
    const int words = left < Tables<R>::kWords ? static_cast<int>(left) : Tables<R>::kWords;
    build_tables<V, R>(k, row, first, words, tables);
    for (int64_t i = 0; i < k.tiles; ++i) add_tile<V, R>(*k.w, k.tile + i, first, tables, acc + i * R * kLanes);
  }
  for (int64_t i = 0; i < k.tiles; ++i) {
    for (int r = 0; r < R; ++r) finish_tile<V>(k, row + r, k.tile + i, acc + (i * R + r) * kLanes);
  }
}

// Several rows of X share the look-up of weights and indexes; V::kMaxRows is what fits the registers.
template <class V>
QBB_INLINE void run_block(const Block& k) {
  in_blocks<V::kMaxRows>(k.row, k.row + k.rows, [&](auto rows, int64_t row) {
    run_rows<V, decltype(rows)::value>(k, row);
  });
}

}  // namespace
}  // namespace qbb::cpu
