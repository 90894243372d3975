// Many rows of X in int8 mode: the weights of a segment become bytes once, all bases in one, and a product of bytes
// follows.
//
// Numerics, for each segment (the inputs of a group, at most 256):
//   1. of X     step = largest |x| / 127;  x' = x * (127 / largest |x|), rounded to the nearest whole number
//   2. of W     step = (|s_0| + |s_1| + ... + |z|) / 124;  d_b = 2 s_b / step, rounded;
//               w' = e + sum of d_b over the bases whose bit is set, where e stands for z - s_0 - s_1 - ... and is
//               rounded last, so that half of the errors of d_b cancel. |w'| <= 127
//   3. p = sum of x' w', exact;  acc = fma(p * step of X, step of W, acc); in the end acc + bias, rounded once
//
// Four inputs of a row are one 32-bit word, what one instruction multiplies and adds. They are those of one bit in each
// byte of a weight word, so weights need no shuffle:
//
//     bit of the byte         0               1               ...  4                ...
//     inputs of the word   0 4 8 12        1 5 9 13                16 20 24 28
#pragma once

#include "cpu/byte_table_kernel.h"

namespace qbb::cpu {
namespace {

constexpr float kWeightCodes = 124;  // leaves 3 for roundings: 1/2, and 1/4 for each of 8 bases
constexpr int kStepBytes = 4 * kLanes;  // weights of a tile for four inputs
constexpr int kSegmentInputs = core::kSegmentWords * QBB_WORD_BITS;

// int8 activations of the segments of a block, for its rows.
template <class V>
QBB_NOINLINE void quantize_rows(const Block& k) {
  alignas(64) float x[kSegmentInputs];
  for (int64_t s = k.segment; s < k.segment + k.segments; ++s) {
    const core::Segment& segment = k.w->segments[s];
    const int inputs = segment.words * QBB_WORD_BITS;
    for (int64_t row = k.row; row < k.row + k.rows; ++row) {
      const Step step = load_segment<V, false>(k, row, segment, 127, x);
      auto* codes = reinterpret_cast<int8_t*>(k.a.codes) + segment.first * QBB_WORD_BITS * k.M + row * inputs;
      const typename V::Lanes inverse = V::splat(step.inverse);
      for (int i = 0; i < inputs; i += kLanes) {
        if (step.inverse != 0) {
          V::store_rounded_by_bit(codes + i, V::mul(V::load(x + i), inverse));
        } else {
          memset(codes + i, 0, kLanes);
        }
      }
      int32_t total = 0;
      for (int i = 0; i < inputs; ++i) total += codes[i];
      k.a.steps[s * k.M + row] = step.value;
      k.a.totals[s * k.M + row] = total;
    }
  }
}

// The weights of one tile and segment: w' + 128 as [words * 8, stride], and their steps [16].
template <class V>
QBB_NOINLINE void expand_bytes(const core::Tiled& w, int64_t tile, const core::Segment& segment, uint8_t* out,
                               int stride, float* steps) {
  using Lanes = typename V::Lanes;
  const int64_t plane = w.tiles * w.words * kLanes;
  Lanes scales[QBB_MAX_BASES];
  Lanes most = V::zero(), base = V::zero();
  for (int64_t b = 0; b < w.bases; ++b) {
    scales[b] = load_scales<V>(w, ((tile + b * w.tiles) * w.groups + segment.group) * kLanes);
    most = V::add(most, V::abs(scales[b]));
    base = V::sub(base, scales[b]);
  }
  if (w.offset != nullptr) {
    const Lanes z = V::load(w.offset + (tile * w.groups + segment.group) * kLanes);
    most = V::add(most, V::abs(z));
    base = V::add(base, z);
  }
  most = V::max(most, V::splat(kTiny));  // scales of 0 stay 0
  const Lanes inverse = V::div(V::splat(kWeightCodes), most);
  V::store(steps, V::div(most, V::splat(kWeightCodes)));
  Lanes e = V::mul(base, inverse);
  typename V::Bytes d[QBB_MAX_BASES];
  for (int64_t b = 0; b < w.bases; ++b) {
    const Lanes exact = V::mul(V::add(scales[b], scales[b]), inverse);
    const Lanes rounded = V::round(exact);
    e = V::add(e, V::mul(V::splat(0.5f), V::sub(exact, rounded)));
    d[b] = V::bytes_of(rounded);
  }
  const typename V::Bytes start = V::bytes_of(V::add(V::round(e), V::splat(128)));
  const uint32_t* words = w.planes + (tile * w.words + segment.first) * kLanes;
  for (int i = 0; i < segment.words; ++i, words += kLanes) {
    typename V::Words word[QBB_MAX_BASES];
    for (int64_t b = 0; b < w.bases; ++b) word[b] = V::load_words(words + b * plane);
    for (int bit = 0; bit < 8; ++bit, out += stride) {
      typename V::Bytes sum = start;
      for (int64_t b = 0; b < w.bases; ++b) sum = V::add_where(sum, word[b], bit, d[b]);
      V::store_bytes(out, sum);
    }
  }
}

// acc [R, T, 16] += codes [R, inputs] times weights [inputs / 4, T, 64].
template <class V, int R, int T>
QBB_INLINE void multiply_bytes(const int8_t* codes, int inputs, const uint8_t* weights, const float* x_steps,
                               const int32_t* totals, const float* w_steps, float* acc, int64_t acc_stride) {
  typename V::Dots a[R * T];
  unrolled<R * T>(QBB_EACH(i) { a[i.value] = V::dots_from(totals[i.value / T]); });
  for (int k = 0; k < inputs; k += 4, weights += T * kStepBytes) {
    typename V::Bytes w[T];
    unrolled<T>(QBB_EACH(t) { w[t.value] = V::load_bytes(weights + t.value * kStepBytes); });
    unrolled<R>(QBB_EACH(r) {
      int32_t four;
      memcpy(&four, codes + r.value * inputs + k, sizeof four);
      const typename V::Fours x = V::fours(four);
      unrolled<T>(QBB_EACH(t) {
        constexpr int i = r.value * T + t.value;
        a[i] = V::dot(a[i], w[t.value], x);
      });
    });
  }
  unrolled<R * T>(QBB_EACH(i) {
    constexpr int r = i.value / T, t = i.value % T;
    float* sum = acc + r * acc_stride + t * kLanes;
    const typename V::Lanes p = V::mul(V::dots_to_float(a[i.value]), V::splat(x_steps[r]));
    V::store(sum, V::fma(p, V::load(w_steps + t * kLanes), V::load(sum)));
  });
}

// All rows of the block times T tiles of a segment.
template <class V, int T>
QBB_NOINLINE void multiply_byte_rows(const Block& k, int64_t s, const uint8_t* weights, const float* w_steps,
                                     float* acc, int64_t acc_stride) {
  const core::Segment& segment = k.w->segments[s];
  const int inputs = segment.words * QBB_WORD_BITS;
  const auto* codes = reinterpret_cast<const int8_t*>(k.a.codes) + segment.first * QBB_WORD_BITS * k.M;
  const float* steps = k.a.steps + s * k.M;
  const int32_t* totals = k.a.totals + s * k.M;
  in_blocks<V::kByteProductRows>(k.row, k.row + k.rows, [&](auto rows, int64_t r) {
    multiply_bytes<V, decltype(rows)::value, T>(codes + r * inputs, inputs, weights, steps + r, totals + r, w_steps,
                                                acc + (r - k.row) * acc_stride, acc_stride);
  });
}

template <class V>
QBB_NOINLINE void run_byte_product(const Block& k) {
  constexpr int T = V::kByteProductTiles;
  const core::Tiled& w = *k.w;
  const int64_t acc_stride = k.tiles * kLanes;
  alignas(64) float acc[core::kManyTaskRows * core::kManyTaskTiles * kLanes];  // [rows, tiles, 16]
  alignas(64) uint8_t weights[kSegmentInputs / 4 * T * kStepBytes];
  alignas(64) float steps[T * kLanes];
  for (int64_t i = 0; i < k.rows * acc_stride; ++i) acc[i] = 0;
  for (int64_t s = 0; s < w.num_segments; ++s) {
    int64_t tile = 0;
    for (; k.tiles - tile >= T; tile += T) {
      for (int t = 0; t < T; ++t) {
        expand_bytes<V>(w, k.tile + tile + t, w.segments[s], weights + t * kStepBytes, T * kStepBytes,
                        steps + t * kLanes);
      }
      multiply_byte_rows<V, T>(k, s, weights, steps, acc + tile * kLanes, acc_stride);
    }
    for (; tile < k.tiles; ++tile) {
      expand_bytes<V>(w, k.tile + tile, w.segments[s], weights, kStepBytes, steps);
      multiply_byte_rows<V, 1>(k, s, weights, steps, acc + tile * kLanes, acc_stride);
    }
  }
  for (int64_t r = 0; r < k.rows; ++r) {
    for (int64_t t = 0; t < k.tiles; ++t) finish_tile<V>(k, k.row + r, k.tile + t, acc + r * acc_stride + t * kLanes);
  }
}

// The two functions of cpu/<isa>.cc.
template <class V>
QBB_INLINE void prepare_bytes(const Block& k) {
  switch (k.path) {
    case Path::kByteTables: return build_byte_tables<V, 1>(k);
    case Path::kWordTables: return build_byte_tables<V, 2>(k);
    default: return quantize_rows<V>(k);
  }
}

template <class V>
QBB_INLINE void run_bytes(const Block& k) {
  switch (k.path) {
    case Path::kByteTables: return run_byte_tables<V, 1>(k);
    case Path::kWordTables: return run_byte_tables<V, 2>(k);
    default: return run_byte_product<V>(k);
  }
}

}  // namespace
}  // namespace qbb::cpu
