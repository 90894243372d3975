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

// Adds B bases of one word of a tile to out [32, stride]; kFirst: out holds nothing yet. z: the offset, or NULL.
template <class V, int B, bool kFirst>
QBB_INLINE void expand_bases(const uint32_t* words, int64_t plane, const typename V::Lanes* scales,
                             const typename V::Lanes* z, float* out, int64_t stride) {
  typename V::Words word[B];
  for (int b = 0; b < B; ++b) word[b] = V::load_words(words + b * plane);
  for (int nibble = kNibbles - 1; nibble >= 0; --nibble) {  // layout 1, format.h; the bit of interest moves to the top
    float* four = out + (nibble / 2 * 4 + nibble % 2 * 16) * stride;
    for (int i = 3; i >= 0; --i) {
      float* to = four + i * stride;
      typename V::Lanes weight = V::with_top_sign(word[0], scales[0]);
      if constexpr (!kFirst) weight = V::add(V::load(to), weight);
      word[0] = V::shift_left(word[0]);
      for (int b = 1; b < B; ++b) {
        weight = V::add(weight, V::with_top_sign(word[b], scales[b]));
        word[b] = V::shift_left(word[b]);
      }
      if (z != nullptr) weight = V::add(weight, *z);
      V::store(to, weight);
    }
  }
}

template <class V, bool kFirst>
QBB_INLINE void expand_some(int64_t bases, const uint32_t* words, int64_t plane, const typename V::Lanes* scales,
                            const typename V::Lanes* z, float* out, int64_t stride) {
  if constexpr (V::kExpandBases >= 4) {
    if (bases == 4) return expand_bases<V, 4, kFirst>(words, plane, scales, z, out, stride);
    if (bases == 3) return expand_bases<V, 3, kFirst>(words, plane, scales, z, out, stride);
  }
  if constexpr (V::kExpandBases >= 2) {
    if (bases == 2) return expand_bases<V, 2, kFirst>(words, plane, scales, z, out, stride);
  }
  expand_bases<V, 1, kFirst>(words, plane, scales, z, out, stride);
}

// Words first_word .. first_word + words of one tile as floats: [words * 32, stride].
template <class V>
QBB_NOINLINE void expand(const core::Tiled& w, int64_t tile, int64_t first_word, int words, float* out,
                         int64_t stride) {
  constexpr int64_t B = V::kExpandBases;
  const int64_t plane = w.tiles * w.words * kLanes;
  for (int i = 0; i < words; ++i, out += QBB_WORD_BITS * stride) {
    const int64_t group = (first_word + i) / w.group_words;
    typename V::Lanes z = V::zero();
    if (w.offset != nullptr) z = V::load(w.offset + (tile * w.groups + group) * kLanes);
    const uint32_t* from = w.planes + (tile * w.words + first_word + i) * kLanes;
    for (int64_t b = 0; b < w.bases; b += B, from += B * plane) {
      const int64_t count = w.bases - b < B ? w.bases - b : B;
      typename V::Lanes scales[B];
      for (int64_t j = 0; j < count; ++j) {
        scales[j] = load_scales<V>(w, (((b + j) * w.tiles + tile) * w.groups + group) * kLanes);
      }
      const typename V::Lanes* last = w.offset != nullptr && b + count == w.bases ? &z : nullptr;
      if (b == 0) {
        expand_some<V, true>(count, from, plane, scales, last, out, stride);
      } else {
        expand_some<V, false>(count, from, plane, scales, last, out, stride);
      }
    }
  }
}

// acc [R, T, 16] += x [R, kBlockInputs] times weights [inputs, T, 16]; rows of acc are `acc_stride` floats apart.
template <class V, int R, int T>
QBB_INLINE void multiply(const float* x, const float* weights, int inputs, float* acc, int64_t acc_stride) {
  using Lanes = typename V::Lanes;
  Lanes a[R * T];
  unrolled<R * T>(QBB_EACH(i) { a[i.value] = V::zero(); });
  for (int k = 0; k < inputs; ++k, weights += T * kLanes) {
    Lanes w[T];
    unrolled<T>(QBB_EACH(t) { w[t.value] = V::load(weights + t.value * kLanes); });
    unrolled<R>(QBB_EACH(r) {
      const Lanes x_k = V::splat(x[r.value * kBlockInputs + k]);
      unrolled<T>(QBB_EACH(t) {
        constexpr int i = r.value * T + t.value;
        a[i] = V::fma(x_k, w[t.value], a[i]);
      });
    });
  }
  unrolled<R * T>(QBB_EACH(i) {
    float* sum = acc + i.value / T * acc_stride + i.value % T * kLanes;
    V::store(sum, V::add(V::load(sum), a[i.value]));
  });
}

template <class V, int T>
QBB_NOINLINE void multiply_rows(const float* x, const float* weights, int inputs, int64_t rows, float* acc,
                                int64_t acc_stride) {
  in_blocks<V::kProductRows>(0, rows, [&](auto count, int64_t r) {
    multiply<V, decltype(count)::value, T>(x + r * kBlockInputs, weights, inputs, acc + r * acc_stride, acc_stride);
  });
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
