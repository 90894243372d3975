// Many rows of X: the weights of a block become floats once, for all rows, and a plain matrix product follows.
//
// Lane = output row, as in table_kernel.h. Numerics, which every ISA follows to the bit:
//   1. weight   w = s_0 + s_1 + ... (each with its sign), then + z
//   2. block    p = fma(x_k, w_k, p) over 128 inputs, from 0; then acc = acc + p
//   3. acc + bias, rounded once to the type of Y
// Here a product is not rounded before it is added: fma is one instruction on CPUs that have it and exact elsewhere.
#pragma once

#include "cpu/table_kernel.h"

namespace qbb::cpu {
namespace {

constexpr int kBlockWords = 4;  // words of K at a time: weights of two tiles take 16 KB, 128 rows of X 64 KB
constexpr int kBlockInputs = kBlockWords * QBB_WORD_BITS;

// Input i of a word is this bit of it (layout 1, format.h).
constexpr int bit_of(int i) { return 8 * (i % 16 / 4) + i / 16 * 4 + i % 4; }

// Floats of inputs i..31 of one word of one tile, `stride` floats apart.
template <class V, int B, int i = 0>
QBB_INLINE void expand_word(const typename V::Words* words, const typename V::Lanes* scales, const typename V::Lanes* z,
                            float* out, int64_t stride) {
  if constexpr (i < QBB_WORD_BITS) {
    typename V::Lanes w = V::template with_sign<bit_of(i)>(words[0], scales[0]);
    for (int b = 1; b < B; ++b) w = V::add(w, V::template with_sign<bit_of(i)>(words[b], scales[b]));
    if (z != nullptr) w = V::add(w, *z);
    V::store(out + i * stride, w);
    expand_word<V, B, i + 1>(words, scales, z, out, stride);
  }
}

// Words first_word .. first_word + words of one tile as floats: [words * 32, stride].
template <class V, int B>
QBB_NOINLINE void expand_tile(const core::Tiled& w, int64_t tile, int64_t first_word, int words, float* out,
                              int64_t stride) {
  typename V::Lanes scales[B], z = V::zero();
  for (int b = 0; b < B; ++b) scales[b] = z;
  int64_t loaded = -1;
  for (int i = 0; i < words; ++i) {
    const int64_t group = (first_word + i) / w.group_words;
    typename V::Words word[B] = {};
    for (int b = 0; b < B; ++b) {
      const int64_t at = b * w.tiles + tile;
      word[b] = V::load_words(w.planes + (at * w.words + first_word + i) * kLanes);
      if (group != loaded) scales[b] = load_scales<V>(w, (at * w.groups + group) * kLanes);
    }
    if (group != loaded && w.offset != nullptr) z = V::load(w.offset + (tile * w.groups + group) * kLanes);
    loaded = group;
    expand_word<V, B>(word, scales, w.offset == nullptr ? nullptr : &z, out + i * QBB_WORD_BITS * stride, stride);
  }
}

template <class V>
void expand(const core::Tiled& w, int64_t tile, int64_t first_word, int words, float* out, int64_t stride) {
  switch (w.bases) {
    case 1: return expand_tile<V, 1>(w, tile, first_word, words, out, stride);
    case 2: return expand_tile<V, 2>(w, tile, first_word, words, out, stride);
    case 3: return expand_tile<V, 3>(w, tile, first_word, words, out, stride);
    case 4: return expand_tile<V, 4>(w, tile, first_word, words, out, stride);
    case 5: return expand_tile<V, 5>(w, tile, first_word, words, out, stride);
    case 6: return expand_tile<V, 6>(w, tile, first_word, words, out, stride);
    case 7: return expand_tile<V, 7>(w, tile, first_word, words, out, stride);
    default: return expand_tile<V, 8>(w, tile, first_word, words, out, stride);
  }
}

// acc [R, T, 16] += x [R, kBlockInputs] times weights [inputs, T, 16]; rows of acc are `acc_stride` floats apart.
template <class V, int R, int T>
QBB_INLINE void multiply(const float* x, const float* weights, int inputs, float* acc, int64_t acc_stride) {
  using Lanes = typename V::Lanes;
  Lanes a[R][T];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) a[r][t] = V::zero();
  }
  for (int k = 0; k < inputs; ++k, weights += T * kLanes) {
    Lanes w[T];
    for (int t = 0; t < T; ++t) w[t] = V::load(weights + t * kLanes);
    for (int r = 0; r < R; ++r) {
      const Lanes x_k = V::splat(x[r * kBlockInputs + k]);
      for (int t = 0; t < T; ++t) a[r][t] = V::fma(x_k, w[t], a[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      float* sum = acc + r * acc_stride + t * kLanes;
      V::store(sum, V::add(V::load(sum), a[r][t]));
    }
  }
}

template <class V, int T>
QBB_NOINLINE void multiply_rows(const float* x, const float* weights, int inputs, int64_t rows, float* acc,
                                int64_t acc_stride) {
  int64_t r = 0;
  for (; rows - r >= V::kProductRows; r += V::kProductRows) {
    multiply<V, V::kProductRows, T>(x + r * kBlockInputs, weights, inputs, acc + r * acc_stride, acc_stride);
  }
  for (; r < rows; ++r) multiply<V, 1, T>(x + r * kBlockInputs, weights, inputs, acc + r * acc_stride, acc_stride);
}

template <class V>
QBB_NOINLINE void run_many_rows(const Block& k) {
  constexpr int T = V::kProductTiles;
  const core::Tiled& w = *k.w;
  const int64_t acc_stride = k.tiles * kLanes;
  alignas(64) float acc[core::kManyTaskRows * core::kManyTaskTiles * kLanes];  // [rows, tiles, 16]
  alignas(64) float x[core::kManyTaskRows * kBlockInputs];
  alignas(64) float weights[kBlockInputs * T * kLanes];
  for (int64_t i = 0; i < k.rows * acc_stride; ++i) acc[i] = 0;
  for (int64_t first = 0; first < w.words; first += kBlockWords) {
    const int words = static_cast<int>(w.words - first < kBlockWords ? w.words - first : kBlockWords);
    for (int64_t r = 0; r < k.rows; ++r) {
      for (int i = 0; i < words; ++i) {
        load_inputs<V>(k, k.row + r, first + i, x + r * kBlockInputs + i * QBB_WORD_BITS);
      }
    }
    int64_t tile = 0;
    for (; k.tiles - tile >= T; tile += T) {
      for (int t = 0; t < T; ++t) expand<V>(w, k.tile + tile + t, first, words, weights + t * kLanes, T * kLanes);
      multiply_rows<V, T>(x, weights, words * QBB_WORD_BITS, k.rows, acc + tile * kLanes, acc_stride);
    }
    for (; tile < k.tiles; ++tile) {
      expand<V>(w, k.tile + tile, first, words, weights, kLanes);
      multiply_rows<V, 1>(x, weights, words * QBB_WORD_BITS, k.rows, acc + tile * kLanes, acc_stride);
    }
  }
  for (int64_t r = 0; r < k.rows; ++r) {
    for (int64_t t = 0; t < k.tiles; ++t) finish_tile<V>(k, k.row + r, k.tile + t, acc + r * acc_stride + t * kLanes);
  }
}

template <class V>
QBB_INLINE void run(const Block& k) {
  if (k.many_rows) {
    run_many_rows<V>(k);
  } else {
    run_block<V>(k);
  }
}

}  // namespace
}  // namespace qbb::cpu
