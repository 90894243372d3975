// AVX2 + F16C: 16 rows are two registers, a table is two registers, and bit 3 of the nibble picks between their look-ups.
#include <immintrin.h>

#include "cpu/expand_kernel.h"

namespace qbb::cpu {
namespace {

// Sign bits of x0..x3 for the entries of a table: set where the bit of the index is clear.
constexpr uint32_t kMinus = 0x80000000u;
alignas(32) constexpr uint32_t kSign0[8] = {kMinus, 0, kMinus, 0, kMinus, 0, kMinus, 0};
alignas(32) constexpr uint32_t kSign1[8] = {kMinus, kMinus, 0, 0, kMinus, kMinus, 0, 0};
alignas(32) constexpr uint32_t kSign2[8] = {kMinus, kMinus, kMinus, kMinus, 0, 0, 0, 0};

struct Avx2 {
  struct Lanes {
    __m256 lo, hi;
  };
  struct Words {
    __m256i lo, hi;
  };
  static constexpr int kMaxRows = 2;
  static constexpr int kMaxBases = 1;
  static constexpr int kProductRows = 6, kProductTiles = 1;  // 12 sums, 2 weights and an input of 16 registers

  static QBB_INLINE Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static QBB_INLINE Lanes splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static QBB_INLINE Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static QBB_INLINE Lanes load_half(const uint16_t* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
  }
  static QBB_INLINE Words load_words(const uint32_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8))};
  }
  static QBB_INLINE void store(float* to, Lanes a) {
    _mm256_storeu_ps(to, a.lo);
    _mm256_storeu_ps(to + 8, a.hi);
  }
  static QBB_INLINE void store_half(uint16_t* to, Lanes a) {
    constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a.lo, kNearestEven));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(a.hi, kNearestEven));
  }
  static QBB_INLINE Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static QBB_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }

  static QBB_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static QBB_INLINE Words shift_left(Words words) {
    return {_mm256_slli_epi32(words.lo, 1), _mm256_slli_epi32(words.hi, 1)};
  }
  static QBB_INLINE __m256 half_with_top_sign(__m256i words, __m256 a) {  // -a where the top bit is clear
    return _mm256_xor_ps(_mm256_andnot_ps(_mm256_castsi256_ps(words), _mm256_set1_ps(-0.0f)), a);
  }
  static QBB_INLINE Lanes with_top_sign(Words words, Lanes a) {
    return {half_with_top_sign(words.lo, a.lo), half_with_top_sign(words.hi, a.hi)};
  }

  static QBB_INLINE __m256 signed_splat(const float* x, const uint32_t* sign) {
    return _mm256_xor_ps(_mm256_broadcast_ss(x), _mm256_load_ps(reinterpret_cast<const float*>(sign)));
  }
  static QBB_INLINE Lanes table(const float* x) {
    const __m256 x01 = _mm256_add_ps(signed_splat(x, kSign0), signed_splat(x + 1, kSign1));
    const __m256 x2 = signed_splat(x + 2, kSign2);
    const __m256 x3 = _mm256_broadcast_ss(x + 3);
    return {_mm256_add_ps(x01, _mm256_sub_ps(x2, x3)), _mm256_add_ps(x01, _mm256_add_ps(x2, x3))};
  }

  template <int n>
  static QBB_INLINE __m256 look_up_half(__m256i word, const float* table) {
    const __m256i index = _mm256_srli_epi32(word, 4 * n);  // vpermps reads the low three bits
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), index);
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(word, 28 - 4 * n));  // blendv reads the sign bit
    return _mm256_blendv_ps(low, high, bit3);
  }
  template <int n>
  static QBB_INLINE Lanes look_up(Words word, const float* table) {
    return {look_up_half<n>(word.lo, table), look_up_half<n>(word.hi, table)};
  }
};

}  // namespace

void run_avx2(const Block& block);
void run_avx2(const Block& block) { run<Avx2>(block); }

}  // namespace qbb::cpu
