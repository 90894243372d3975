// AVX2 + F16C: 16 rows are two registers, a table is two registers, and bit 3 of the nibble picks between their look-ups.
#include <immintrin.h>

#include "cpu/byte_product_kernel.h"
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
  static constexpr int kExpandBases = 2;
  static constexpr int kFloatSums = 1;
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

  static QBB_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static QBB_INLINE Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static QBB_INLINE Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static QBB_INLINE Lanes abs(Lanes a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
  static QBB_INLINE Lanes round(Lanes a) {
    constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kNearestEven), _mm256_round_ps(a.hi, kNearestEven)};
  }
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

  // Integer modes. vpshufb looks up one table per 128 bits, so bytes of one table are brought together first: byte j of
  // all 16 rows. The rows then lie in the order 0-3, 8-11, 4-7, 12-15.
  struct Indexes {
    __m256i low01, low23, high01, high23;  // nibbles of bytes 0 | 1 and of bytes 2 | 3
  };
  struct Ints {
    __m256i first, second;  // int16 sums of eight rows each; bytes 0, 2 | bytes 1, 3
  };
  struct Dots {
    __m256i lo, hi;
  };
  using Bytes = Words;
  static constexpr int kByteRows = 2;
  static constexpr int kByteSums = 0;  // bases side by side would not fit
  static constexpr int kByteProductRows = 4, kByteProductTiles = 1;

  static QBB_INLINE __m256 half_quad_sums(__m256 a) {
    const __m256 pairs = _mm256_add_ps(a, _mm256_permute_ps(a, 0xb1));
    return _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0x4e));
  }
  static QBB_INLINE Lanes quad_sums(Lanes a) { return {half_quad_sums(a.lo), half_quad_sums(a.hi)}; }
  static QBB_INLINE float largest(Lanes a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_permute_ps(four, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(four, _mm_permute_ps(four, 0xb1)));
  }
  static QBB_INLINE bool all_zero(Lanes a) {
    const __m256 zero = _mm256_setzero_ps();
    return _mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(a.lo, zero, _CMP_EQ_OQ),
                                            _mm256_cmp_ps(a.hi, zero, _CMP_EQ_OQ))) == 0xff;
  }
  static QBB_INLINE __m256i rounded(Lanes a) {  // as int16
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    return _mm256_permute4x64_epi64(packed, 0xd8);
  }
  static QBB_INLINE void store_rounded(int16_t* to, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(a));
  }
  static QBB_INLINE void store_rounded_by_bit(int8_t* to, Lanes a) {
    const __m256i codes = rounded(a);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    const __m128i by_bit = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, by_bit));
  }
  static QBB_INLINE __m256i quad_table(const int16_t* x) {
    const __m256i sign0 = _mm256_set1_epi32(0x0001ffff);
    const __m256i sign1 = _mm256_set1_epi64x(0x00010001ffffffff);
    const __m256i sign2 = _mm256_setr_epi64x(-1, 0x0001000100010001, -1, 0x0001000100010001);
    const __m256i sign3 = _mm256_setr_epi64x(-1, -1, 0x0001000100010001, 0x0001000100010001);
    const __m256i x01 = _mm256_add_epi16(_mm256_sign_epi16(_mm256_set1_epi16(x[0]), sign0),
                                         _mm256_sign_epi16(_mm256_set1_epi16(x[1]), sign1));
    const __m256i x23 = _mm256_add_epi16(_mm256_sign_epi16(_mm256_set1_epi16(x[2]), sign2),
                                         _mm256_sign_epi16(_mm256_set1_epi16(x[3]), sign3));
    return _mm256_add_epi16(x01, x23);
  }
  template <int kBytes>
  static QBB_INLINE void byte_tables(const int16_t* x, uint8_t* high, uint8_t* low) {
    const __m256i rounding = _mm256_set1_epi16(kBytes == 1 ? 128 : 0);
    for (int half = 0; half < 2; ++half) {
      const __m256i a = quad_table(x + half * 8), b = quad_table(x + half * 8 + 4);
      const __m256i top = _mm256_packs_epi16(_mm256_srai_epi16(_mm256_add_epi16(a, rounding), 8),
                                             _mm256_srai_epi16(_mm256_add_epi16(b, rounding), 8));
      _mm256_store_si256(reinterpret_cast<__m256i*>(high) + half, _mm256_permute4x64_epi64(top, 0xd8));
      if (kBytes == 2) {
        const __m256i byte = _mm256_set1_epi16(255);
        const __m256i rest = _mm256_packus_epi16(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte));
        _mm256_store_si256(reinterpret_cast<__m256i*>(low) + half, _mm256_permute4x64_epi64(rest, 0xd8));
      }
    }
  }

  static QBB_INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static QBB_INLINE Indexes indexes(Words word) {
    const __m256i by_byte =
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i a = _mm256_shuffle_epi8(word.lo, by_byte), b = _mm256_shuffle_epi8(word.hi, by_byte);
    const __m256i bytes01 = _mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a, b), 0xd8);
    const __m256i bytes23 = _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a, b), 0xd8);
    const __m256i nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes01, nibble), _mm256_and_si256(bytes23, nibble),
            _mm256_and_si256(_mm256_srli_epi16(bytes01, 4), nibble),
            _mm256_and_si256(_mm256_srli_epi16(bytes23, 4), nibble)};
  }
  static QBB_INLINE __m256i look_up_bytes(const uint8_t* table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)), index);
  }
  template <bool kSigned>
  static QBB_INLINE __m256i add_pairs(__m256i sum, __m256i pairs) {
    const __m256i ones = _mm256_set1_epi8(1);
    return _mm256_add_epi16(sum, kSigned ? _mm256_maddubs_epi16(ones, pairs) : _mm256_maddubs_epi16(pairs, ones));
  }
  template <bool kSigned>
  static QBB_INLINE Ints add_entries(Ints sum, __m256i a, __m256i b) {
    return {add_pairs<kSigned>(sum.first, _mm256_unpacklo_epi8(a, b)),
            add_pairs<kSigned>(sum.second, _mm256_unpackhi_epi8(a, b))};
  }
  template <bool kSigned>
  static QBB_INLINE Ints add_word(Ints sum, const Indexes& index, const uint8_t* table) {
    sum = add_entries<kSigned>(sum, look_up_bytes(table, index.low01), look_up_bytes(table + 32, index.low23));
    return add_entries<kSigned>(sum, look_up_bytes(table + 64, index.high01), look_up_bytes(table + 96, index.high23));
  }
  static QBB_INLINE Ints add_signed(Ints sum, const Indexes& index, const uint8_t* table) {
    return add_word<true>(sum, index, table);
  }
  static QBB_INLINE Ints add_unsigned(Ints sum, const Indexes& index, const uint8_t* table) {
    return add_word<false>(sum, index, table);
  }
  // A segment has 64 quads: at most 64 * 255 in 16 bits.
  static QBB_INLINE __m256i eight_rows(__m256i sums) {
    return _mm256_cvtepi16_epi32(_mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
  }
  static QBB_INLINE Lanes to_float(Ints a) {
    const __m256i first = eight_rows(a.first), second = eight_rows(a.second);
    return {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(first, second, 0x20)),
            _mm256_cvtepi32_ps(_mm256_permute2x128_si256(first, second, 0x31))};
  }

  static QBB_INLINE __m256i half_bytes_of(__m256 a) {
    const __m256i byte = _mm256_and_si256(_mm256_cvtps_epi32(a), _mm256_set1_epi32(255));
    return _mm256_mullo_epi32(byte, _mm256_set1_epi32(0x01010101));
  }
  static QBB_INLINE Bytes bytes_of(Lanes a) { return {half_bytes_of(a.lo), half_bytes_of(a.hi)}; }
  static QBB_INLINE __m256i half_add_where(__m256i sum, __m256i word, __m256i bit, __m256i d) {
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit);
    return _mm256_add_epi8(sum, _mm256_and_si256(set, d));
  }
  static QBB_INLINE Bytes add_where(Bytes sum, Words word, int bit, Bytes d) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(1 << bit));
    return {half_add_where(sum.lo, word.lo, mask, d.lo), half_add_where(sum.hi, word.hi, mask, d.hi)};
  }
  static QBB_INLINE void store_bytes(uint8_t* to, Bytes a) {  // as signed bytes, see dot
    const __m256i top = _mm256_set1_epi8(-128);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_xor_si256(a.lo, top));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, _mm256_xor_si256(a.hi, top));
  }
  static QBB_INLINE Bytes load_bytes(const uint8_t* from) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i*>(from)),
            _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + 1)};
  }
  static QBB_INLINE Dots dots_from(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  // vpmaddubsw wants one factor without a sign and clips sums of two at 16 bits: 2 * 127 * 127 fits.
  static QBB_INLINE __m256i half_dot(__m256i sum, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  using Fours = __m256i;
  static QBB_INLINE Fours fours(int32_t four) { return _mm256_set1_epi32(four); }
  static QBB_INLINE Dots dot(Dots sum, Bytes w, Fours x) {
    return {half_dot(sum.lo, w.lo, x), half_dot(sum.hi, w.hi, x)};
  }
  static QBB_INLINE Lanes dots_to_float(Dots a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
};

}  // namespace

void run_floats_avx2(const Block& block);
void run_floats_avx2(const Block& block) { run_floats<Avx2>(block); }

void prepare_avx2(const Block& block);
void prepare_avx2(const Block& block) { prepare_bytes<Avx2>(block); }

void run_bytes_avx2(const Block& block);
void run_bytes_avx2(const Block& block) { run_bytes<Avx2>(block); }

}  // namespace qbb::cpu
