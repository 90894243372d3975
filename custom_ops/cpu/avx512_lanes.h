// AVX-512 (F, BW, VL): 16 rows are one register, a table is one register, a look-up is one vpermps.
#pragma once

#include <immintrin.h>

#include "cpu/expand_kernel.h"

namespace qbb::cpu {
namespace {

// Sign bits of x0..x3 for the 16 entries of a table: set where the bit of the index is clear.
constexpr __mmask16 kPlus[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};

struct Avx512 {
  using Lanes = __m512;
  using Words = __m512i;
  static constexpr int kMaxRows = 8;
  static constexpr int kProductRows = 12, kProductTiles = 2;  // 24 sums, 2 weights and an input of 32 registers
  static constexpr int kExpandBases = 4;
  static constexpr int kFloatSums = 6;  // of look-ups, rows times bases: their chains of additions run side by side

  static QBB_INLINE Lanes zero() { return _mm512_setzero_ps(); }
  static QBB_INLINE Lanes splat(float value) { return _mm512_set1_ps(value); }
  static QBB_INLINE Lanes load(const float* from) { return _mm512_loadu_ps(from); }
  static QBB_INLINE Lanes load_half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static QBB_INLINE Words load_words(const uint32_t* from) {
    __m512i words = _mm512_loadu_si512(from);
    // Loads are the bottleneck: without this GCC reads the word again for each of its eight shifts.
    __asm__("" : "+v"(words));
    return words;
  }
  static QBB_INLINE void store(float* to, Lanes a) { _mm512_storeu_ps(to, a); }
  static QBB_INLINE void store_half(uint16_t* to, Lanes a) {
    constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, kNearestEven));
  }
  static QBB_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
  static QBB_INLINE Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }

  static QBB_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  static QBB_INLINE Words shift_left(Words words) { return _mm512_slli_epi32(words, 1); }
  static QBB_INLINE Lanes with_top_sign(Words words, Lanes a) {  // -a where the top bit is clear
    constexpr int kXorWithMinus = 0xa6;                          // (~words & sign bit) ^ a
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(a), kXorWithMinus));
  }

  static QBB_INLINE Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
  static QBB_INLINE Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
  static QBB_INLINE Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
  static QBB_INLINE Lanes abs(Lanes a) { return _mm512_abs_ps(a); }
  static QBB_INLINE Lanes round(Lanes a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static QBB_INLINE __m512 signed_splat(const float* x, __mmask16 plus) {
    const __m512i sign = _mm512_mask_set1_epi32(_mm512_set1_epi32(INT32_MIN), plus, 0);  // a constant, hoisted
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(*x)), sign));
  }
  static QBB_INLINE Lanes table(const float* x) {
    const __m512 x01 = add(signed_splat(x, kPlus[0]), signed_splat(x + 1, kPlus[1]));
    const __m512 x23 = add(signed_splat(x + 2, kPlus[2]), signed_splat(x + 3, kPlus[3]));
    return add(x01, x23);
  }

  template <int n>
  static QBB_INLINE Lanes look_up(Words word, const float* table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * n), _mm512_load_ps(table));  // reads the low four bits
  }
};

}  // namespace
}  // namespace qbb::cpu
