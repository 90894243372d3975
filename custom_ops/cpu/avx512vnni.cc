// AVX-512 with VBMI and VNNI: vpermb looks up four tables at once, and vpdpbusd with ones adds the four bytes of a row.
#include "cpu/avx512_lanes.h"
#include "cpu/byte_product_kernel.h"

namespace qbb::cpu {
namespace {

struct Avx512Vnni : Avx512 {
  using Ints = __m512i;   // int32 sums of 16 rows
  using Dots = __m512i;
  using Bytes = __m512i;  // four bytes of each of 16 rows
  struct Indexes {
    __m512i low, high;
  };
  static constexpr int kByteRows = 8;
  static constexpr int kByteSums = 16;  // rows times bases times bytes: what registers hold beside the indexes
  static constexpr int kByteProductRows = 12, kByteProductTiles = 2;  // 24 sums, 2 weights and an input of 32 registers

  static QBB_INLINE Lanes quad_sums(Lanes a) {
    const __m512 pairs = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    return _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
  }
  static QBB_INLINE float largest(Lanes a) { return _mm512_reduce_max_ps(a); }
  static QBB_INLINE bool all_zero(Lanes a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_EQ_OQ) == 0xffff; }
  static QBB_INLINE void store_rounded(int16_t* to, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
  }
  static QBB_INLINE void store_rounded_by_bit(int8_t* to, Lanes a) {
    const __m512i by_bit = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i codes = _mm512_permutexvar_epi32(by_bit, _mm512_cvtps_epi32(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
  }

  // The sums of two quads as 16 bits, and of the other two: bit c of an entry's number says the sign of x_c.
  static QBB_INLINE __m512i quad_tables(__m512i signed_x, int first_quad) {
    __m512i sum = _mm512_setzero_si512();
    const __m512i lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                          11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i quad = _mm512_srli_epi16(_mm512_and_si512(lane, _mm512_set1_epi16(16)), 2);
    for (int c = 0; c < 4; ++c) {  // x_c lies at c, -x_c at 16 + c; all but the last line are constants
      const __mmask32 minus = _mm512_testn_epi16_mask(lane, _mm512_set1_epi16(static_cast<int16_t>(1 << c)));
      const __m512i plus = _mm512_add_epi16(quad, _mm512_set1_epi16(static_cast<int16_t>(first_quad * 4 + c)));
      const __m512i from = _mm512_mask_add_epi16(plus, minus, plus, _mm512_set1_epi16(16));
      sum = _mm512_add_epi16(sum, _mm512_permutexvar_epi16(from, signed_x));
    }
    return sum;
  }
  template <int kBytes>
  static QBB_INLINE void byte_tables(const int16_t* x, uint8_t* high, uint8_t* low) {
    const __m256i plus = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i minus = _mm256_sub_epi16(_mm256_setzero_si256(), plus);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(plus), minus, 1);
    for (int half = 0; half < 2; ++half) {
      const __m512i t = quad_tables(both, half * 2);
      const __m512i rounding = _mm512_set1_epi16(kBytes == 1 ? 128 : 0);
      const __m512i top = _mm512_srai_epi16(_mm512_add_epi16(t, rounding), 8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(high) + half, _mm512_cvtepi16_epi8(top));
      if (kBytes == 2) _mm256_store_si256(reinterpret_cast<__m256i*>(low) + half, _mm512_cvtepi16_epi8(t));
    }
  }

  static QBB_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
  // Nibbles as places in a 64-byte table: byte j of a word starts at j * 16.
  static QBB_INLINE Indexes indexes(Words word) {
    constexpr int kSelect = 0xea;  // (word & nibble) | place
    const __m512i nibble = _mm512_set1_epi32(0x0f0f0f0f), place = _mm512_set1_epi32(0x30201000);
    return {_mm512_ternarylogic_epi32(word, nibble, place, kSelect),
            _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4), nibble, place, kSelect)};
  }
  static QBB_INLINE __m512i look_up_bytes(__m512i index, const uint8_t* table) {
    return _mm512_permutexvar_epi8(index, _mm512_load_si512(table));
  }
  static QBB_INLINE Ints add_signed(Ints sum, const Indexes& index, const uint8_t* table) {
    const __m512i ones = _mm512_set1_epi8(1);
    return dot(dot(sum, ones, look_up_bytes(index.low, table)), ones, look_up_bytes(index.high, table + 64));
  }
  static QBB_INLINE Ints add_unsigned(Ints sum, const Indexes& index, const uint8_t* table) {
    const __m512i ones = _mm512_set1_epi8(1);
    return dot(dot(sum, look_up_bytes(index.low, table), ones), look_up_bytes(index.high, table + 64), ones);
  }
  static QBB_INLINE Lanes to_float(Ints a) { return _mm512_cvtepi32_ps(a); }

  static QBB_INLINE Bytes bytes_of(Lanes a) {  // the lowest byte of the whole number in a lane, four times
    const __m512i byte = _mm512_and_si512(_mm512_cvtps_epi32(a), _mm512_set1_epi32(0xff));
    return _mm512_mullo_epi32(byte, _mm512_set1_epi32(0x01010101));
  }
  static QBB_INLINE Bytes add_where(Bytes sum, Words word, int bit, Bytes d) {
    return _mm512_mask_add_epi8(sum, _mm512_test_epi8_mask(word, _mm512_set1_epi8(static_cast<char>(1 << bit))), sum, d);
  }
  static QBB_INLINE void store_bytes(uint8_t* to, Bytes a) { _mm512_store_si512(to, a); }
  static QBB_INLINE Bytes load_bytes(const uint8_t* from) { return _mm512_load_si512(from); }
  // Weights come as w' + 128, because one factor of vpdpbusd has no sign.
  static QBB_INLINE Dots dots_from(int32_t total) { return _mm512_set1_epi32(-128 * total); }
  using Fours = __m512i;
  static QBB_INLINE Fours fours(int32_t four) { return _mm512_set1_epi32(four); }
  static QBB_INLINE Dots dot(Dots sum, Bytes w, Fours x) {
    // Not the intrinsic: around it GCC 12 copies every sum and runs out of registers.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
  static QBB_INLINE Lanes dots_to_float(Dots a) { return _mm512_cvtepi32_ps(a); }
};

}  // namespace

void prepare_avx512vnni(const Block& block);
void prepare_avx512vnni(const Block& block) { prepare_bytes<Avx512Vnni>(block); }

void run_bytes_avx512vnni(const Block& block);
void run_bytes_avx512vnni(const Block& block) { run_bytes<Avx512Vnni>(block); }

}  // namespace qbb::cpu
