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

// The input that a bit of a word stands for (layout 1, format.h).
constexpr int input_of(int bit) { return bit / 8 * 4 + bit % 4 + bit / 4 % 2 * 16; }

// Words first_word .. first_word + words of one tile as floats: [words * 32, stride].
template <class V>
QBB_NOINLINE void expand(const core::Tiled& w, int64_t tile, int64_t first_word, int words, float* out,
                         int64_t stride) {
  for (int i = 0; i < words; ++i, out += QBB_WORD_BITS * stride) {
    const int64_t group = (first_word + i) / w.group_words;
    for (int64_t b = 0; b < w.bases; ++b) {
      const int64_t at = b * w.tiles + tile;
      const typename V::Lanes scale = load_scales<V>(w, (at * w.groups + group) * kLanes);
      typename V::Words word = V::load_words(w.planes + (at * w.words + first_word + i) * kLanes);
      for (int bit = QBB_WORD_BITS - 1; bit >= 0; --bit) {  // the bit of interest moves to the top
        float* to = out + input_of(bit) * stride;
        const typename V::Lanes weight = V::with_top_sign(word, scale);
        V::store(to, b == 0 ? weight : V::add(V::load(to), weight));
        word = V::shift_left(word);
      }
    }
    if (w.offset == nullptr) continue;
    const typename V::Lanes z = V::load(w.offset + (tile * w.groups + group) * kLanes);
    for (int k = 0; k < QBB_WORD_BITS; ++k) V::store(out + k * stride, V::add(V::load(out + k * stride), z));
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

// The function of cpu/<isa>.cc.
template <class V>
QBB_INLINE void run_floats(const Block& k) {
  if (k.path == Path::kFloatProduct) {
    run_many_rows<V>(k);
  } else {
    run_block<V>(k);
  }
}

}  // namespace
}  // namespace qbb::cpu
