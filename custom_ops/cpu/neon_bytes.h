// Integer modes on 64-bit Arm: what does not depend on FEAT_DotProd. The classes that derive from it bring the product.
//
// Two bytes of a weight word at a time: their index bytes say by bit 4 which of two tables is meant, so one tbl on two
// registers gives both entries side by side, and sadalp adds them. That is less work than tbl on one register, where
// the bytes of a row come apart and each takes two widening additions, and than tbl on four with sdot: four count as
// several instructions on most CPUs. vld1q_u8_x2, because GCC copies registers to make a pair of them.
//
// Sums are 16 bits: a segment has 64 quads, at most 64 * 255.
#pragma once

#include "cpu/byte_product_kernel.h"
#include "cpu/neon_lanes.h"

namespace qbb::cpu {
namespace {

struct NeonBytes : Neon {
  struct Indexes {  // [bytes 0 and 1 | 2 and 3][rows 0-7 | 8-15], places in a table of 32 bytes
    uint8x16_t low[2][2], high[2][2];
  };
  struct Ints {  // int16 sums of eight rows each
    int16x8_t v[2];
  };
  struct Bytes {  // four bytes of each of 16 rows
    uint8x16_t v[4];
  };
  struct Dots {
    int32x4_t v[4];
  };
  using Fours = int32_t;  // the products splat it
  static QBB_INLINE Fours fours(int32_t four) { return four; }
  static constexpr int kByteRows = 4;
  static constexpr int kByteSums = 0;  // bases side by side would not fit

  template <class F>
  static QBB_INLINE Bytes bytes(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static QBB_INLINE Lanes quad_sums(const Lanes& a) {
    const float32x4_t sums = vpaddq_f32(vpaddq_f32(a.v[0], a.v[1]), vpaddq_f32(a.v[2], a.v[3]));
    return {{sums, sums, sums, sums}};
  }
  static QBB_INLINE float largest(const Lanes& a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
  }
  static QBB_INLINE bool all_zero(const Lanes& a) {
    const uint32x4_t low = vandq_u32(vceqzq_f32(a.v[0]), vceqzq_f32(a.v[1]));
    const uint32x4_t high = vandq_u32(vceqzq_f32(a.v[2]), vceqzq_f32(a.v[3]));
    return vminvq_u32(vandq_u32(low, high)) != 0;
  }
  static QBB_INLINE int16x8_t rounded(float32x4_t a, float32x4_t b) {
    return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(a)), vmovn_s32(vcvtnq_s32_f32(b)));
  }
  static QBB_INLINE void store_rounded(int16_t* to, const Lanes& a) {
    vst1q_s16(to, rounded(a.v[0], a.v[1]));
    vst1q_s16(to + 8, rounded(a.v[2], a.v[3]));
  }
  static QBB_INLINE void store_rounded_by_bit(int8_t* to, const Lanes& a) {
    constexpr uint8_t kByBit[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const int8x8_t low = vmovn_s16(rounded(a.v[0], a.v[1])), high = vmovn_s16(rounded(a.v[2], a.v[3]));
    vst1q_s8(to, vqtbl1q_s8(vcombine_s8(low, high), vld1q_u8(kByBit)));
  }

  template <int kBytes>
  static QBB_INLINE void byte_tables(const int16_t* x, uint8_t* high, uint8_t* low) {
    constexpr int16_t kSigns[3][8] = {{-1, 1, -1, 1, -1, 1, -1, 1}, {-1, -1, 1, 1, -1, -1, 1, 1},
                                      {-1, -1, -1, -1, 1, 1, 1, 1}};
    for (int j = 0; j < 4; ++j, x += 4, high += 16, low += 16) {
      int16x8_t x012 = vmulq_n_s16(vld1q_s16(kSigns[0]), x[0]);
      x012 = vmlaq_n_s16(x012, vld1q_s16(kSigns[1]), x[1]);
      x012 = vmlaq_n_s16(x012, vld1q_s16(kSigns[2]), x[2]);
      const int16x8_t x3 = vdupq_n_s16(x[3]), a = vsubq_s16(x012, x3), b = vaddq_s16(x012, x3);
      if (kBytes == 1) {
        vst1q_s8(reinterpret_cast<int8_t*>(high), vrshrn_high_n_s16(vrshrn_n_s16(a, 8), b, 8));  // (t + 128) >> 8
      } else {
        vst1q_s8(reinterpret_cast<int8_t*>(high), vshrn_high_n_s16(vshrn_n_s16(a, 8), b, 8));
        vst1q_s8(reinterpret_cast<int8_t*>(low), vmovn_high_s16(vmovn_s16(a), b));
      }
    }
  }

  static QBB_INLINE Ints zero_ints() { return {{vdupq_n_s16(0), vdupq_n_s16(0)}}; }
  static QBB_INLINE Indexes indexes(const Words& w) {
    const uint8x16_t place = vreinterpretq_u8_u16(vdupq_n_u16(0x1000)), nibble = vdupq_n_u8(15);
    Indexes out;
    for (int rows = 0; rows < 2; ++rows) {
      const uint16x8_t a = vreinterpretq_u16_u32(w.v[2 * rows]), b = vreinterpretq_u16_u32(w.v[2 * rows + 1]);
      const uint8x16_t pairs[2] = {vreinterpretq_u8_u16(vuzp1q_u16(a, b)), vreinterpretq_u8_u16(vuzp2q_u16(a, b))};
      for (int p = 0; p < 2; ++p) {
        out.low[p][rows] = vbslq_u8(nibble, pairs[p], place);
        out.high[p][rows] = vsriq_n_u8(place, pairs[p], 4);
      }
    }
    return out;
  }
  template <bool kSigned>
  static QBB_INLINE int16x8_t add_pairs(int16x8_t sum, uint8x16_t pairs) {
    if (kSigned) return vpadalq_s8(sum, vreinterpretq_s8_u8(pairs));
    return vreinterpretq_s16_u16(vpadalq_u8(vreinterpretq_u16_s16(sum), pairs));
  }
  template <bool kSigned>
  static QBB_INLINE Ints add_word(Ints sum, const Indexes& index, const uint8_t* table) {
    for (int p = 0; p < 2; ++p) {
      const uint8x16x2_t low = vld1q_u8_x2(table + 32 * p), high = vld1q_u8_x2(table + 64 + 32 * p);
      for (int rows = 0; rows < 2; ++rows) {
        sum.v[rows] = add_pairs<kSigned>(sum.v[rows], vqtbl2q_u8(low, index.low[p][rows]));
        sum.v[rows] = add_pairs<kSigned>(sum.v[rows], vqtbl2q_u8(high, index.high[p][rows]));
      }
    }
    return sum;
  }
  static QBB_INLINE Ints add_signed(const Ints& sum, const Indexes& index, const uint8_t* table) {
    return add_word<true>(sum, index, table);
  }
  static QBB_INLINE Ints add_unsigned(const Ints& sum, const Indexes& index, const uint8_t* table) {
    return add_word<false>(sum, index, table);
  }
  static QBB_INLINE Lanes to_float(const Ints& a) {
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(a.v[0]))), vcvtq_f32_s32(vmovl_high_s16(a.v[0])),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(a.v[1]))), vcvtq_f32_s32(vmovl_high_s16(a.v[1]))}};
  }

  static QBB_INLINE Bytes bytes_of(const Lanes& a) {  // the lowest byte of the whole number in a lane, four times
    constexpr uint8_t kLowest[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    return bytes([&](int i) {
      return vqtbl1q_u8(vreinterpretq_u8_s32(vcvtnq_s32_f32(a.v[i])), vld1q_u8(kLowest));
    });
  }
  static QBB_INLINE Bytes add_where(const Bytes& sum, const Words& word, int bit, const Bytes& d) {
    const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(1 << bit));
    return bytes([&](int i) {  // vtst gives -1 where the bit is set
      return vmlsq_u8(sum.v[i], vtstq_u8(vreinterpretq_u8_u32(word.v[i]), mask), d.v[i]);
    });
  }
  static QBB_INLINE Bytes load_bytes(const uint8_t* from) {
    return bytes([=](int i) { return vld1q_u8(from + 16 * i); });
  }
  static QBB_INLINE Dots dots_from(int32_t) {
    const int32x4_t none = vdupq_n_s32(0);
    return {{none, none, none, none}};
  }
  static QBB_INLINE Lanes dots_to_float(const Dots& a) {
    return lanes([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
};

}  // namespace
}  // namespace qbb::cpu
