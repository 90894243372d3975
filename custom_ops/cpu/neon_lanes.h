// 64-bit Arm, ARMv8.0: 16 rows are four registers.
//
// A table is kept as four planes of 16 bytes: byte 0 of all entries, byte 1, ... With 16 indexes in a register, one tbl
// gives one byte of 16 rows, and zips put the bytes of each float together. tbl on four registers would take the floats
// as they are, but it counts as several instructions on most CPUs, wants an index for every byte, and GCC 12 writes its
// operands to the stack again and again.
#pragma once

#include <arm_neon.h>

#include "cpu/expand_kernel.h"

namespace qbb::cpu {
namespace {

struct Neon {
  struct Lanes {
    float32x4_t v[4];
  };
  struct Words {
    uint32x4_t v[4];
  };
  static constexpr int kMaxRows = 2;
  static constexpr int kExpandBases = 2;
  static constexpr int kFloatSums = 1;
  static constexpr int kProductRows = 5, kProductTiles = 1;  // with 6 rows GCC spills

  // f(i) for each register.
  template <class F>
  static QBB_INLINE Lanes lanes(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <class F>
  static QBB_INLINE Words words(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static QBB_INLINE Lanes zero() { return splat(0); }
  static QBB_INLINE Lanes splat(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return {{all, all, all, all}};
  }
  static QBB_INLINE Lanes load(const float* from) {
    return lanes([=](int i) { return vld1q_f32(from + 4 * i); });
  }
  static QBB_INLINE Lanes load_half(const uint16_t* from) {
    return lanes([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))); });
  }
  static QBB_INLINE Words load_words(const uint32_t* from) {
    return words([=](int i) { return vld1q_u32(from + 4 * i); });
  }
  static QBB_INLINE void store(float* to, const Lanes& a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.v[i]);
  }
  static QBB_INLINE void store_half(uint16_t* to, const Lanes& a) {
    for (int i = 0; i < 4; ++i) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
  }
  static QBB_INLINE Lanes add(const Lanes& a, const Lanes& b) {
    return lanes([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static QBB_INLINE Lanes mul(const Lanes& a, const Lanes& b) {
    return lanes([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static QBB_INLINE Lanes sub(const Lanes& a, const Lanes& b) {
    return lanes([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static QBB_INLINE Lanes div(const Lanes& a, const Lanes& b) {
    return lanes([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static QBB_INLINE Lanes max(const Lanes& a, const Lanes& b) {
    return lanes([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
  }
  static QBB_INLINE Lanes abs(const Lanes& a) {
    return lanes([&](int i) { return vabsq_f32(a.v[i]); });
  }
  static QBB_INLINE Lanes round(const Lanes& a) {
    return lanes([&](int i) { return vrndnq_f32(a.v[i]); });
  }
  static QBB_INLINE Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return lanes([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }

  static QBB_INLINE Words shift_left(const Words& w) {
    return words([&](int i) { return vshlq_n_u32(w.v[i], 1); });
  }
  static QBB_INLINE Lanes with_top_sign(const Words& w, const Lanes& a) {  // -a where the top bit is clear
    const uint32x4_t top = vdupq_n_u32(0x80000000u);
    return lanes([&](int i) {
      return vreinterpretq_f32_u32(veorq_u32(vbicq_u32(top, w.v[i]), vreinterpretq_u32_f32(a.v[i])));
    });
  }

  // Byte i of 16 words of 32 bits, for i = 0..3.
  struct Planes {
    uint8x16_t v[4];
  };
  static QBB_INLINE Planes planes(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
    const uint8x16_t low02 = vuzp1q_u8(a, b), high02 = vuzp1q_u8(c, d);
    const uint8x16_t low13 = vuzp2q_u8(a, b), high13 = vuzp2q_u8(c, d);
    return {{vuzp1q_u8(low02, high02), vuzp1q_u8(low13, high13), vuzp2q_u8(low02, high02), vuzp2q_u8(low13, high13)}};
  }

  static QBB_INLINE Lanes table(const float* x) {
    const float minus_plus[2] = {-x[0], x[0]};
    const float32x2_t x0 = vld1_f32(minus_plus), x1 = vdup_n_f32(x[1]);
    const float32x4_t x01 = vcombine_f32(vsub_f32(x0, x1), vadd_f32(x0, x1));
    const float32x4_t x2 = vdupq_n_f32(x[2]), x3 = vdupq_n_f32(x[3]);
    const float32x4_t sum = vaddq_f32(x2, x3), difference = vsubq_f32(x2, x3);
    const float32x4_t t0 = vsubq_f32(x01, sum), t1 = vaddq_f32(x01, difference);
    const float32x4_t t2 = vsubq_f32(x01, difference), t3 = vaddq_f32(x01, sum);
    const Planes p = planes(vreinterpretq_u8_f32(t0), vreinterpretq_u8_f32(t1), vreinterpretq_u8_f32(t2),
                            vreinterpretq_u8_f32(t3));
    return lanes([&](int i) { return vreinterpretq_f32_u8(p.v[i]); });
  }

  template <int n>
  static QBB_INLINE Lanes look_up(const Words& w, const float* table) {
    const Planes p = planes(vreinterpretq_u8_u32(w.v[0]), vreinterpretq_u8_u32(w.v[1]), vreinterpretq_u8_u32(w.v[2]),
                            vreinterpretq_u8_u32(w.v[3]));  // the same for every n: compiled once
    const uint8x16_t index = n % 2 != 0 ? vshrq_n_u8(p.v[n / 2], 4) : vandq_u8(p.v[n / 2], vdupq_n_u8(15));
    const uint8_t* t = reinterpret_cast<const uint8_t*>(table);
    const uint8x16_t b0 = vqtbl1q_u8(vld1q_u8(t), index), b1 = vqtbl1q_u8(vld1q_u8(t + 16), index);
    const uint8x16_t b2 = vqtbl1q_u8(vld1q_u8(t + 32), index), b3 = vqtbl1q_u8(vld1q_u8(t + 48), index);
    const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low23 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
    const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1)), high23 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
    return {{vreinterpretq_f32_u16(vzip1q_u16(low01, low23)), vreinterpretq_f32_u16(vzip2q_u16(low01, low23)),
             vreinterpretq_f32_u16(vzip1q_u16(high01, high23)), vreinterpretq_f32_u16(vzip2q_u16(high01, high23))}};
  }
};

template <>
QBB_INLINE float all_plus<Neon>(const float* table) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table) + 15;
  const uint8_t entry[4] = {bytes[0], bytes[16], bytes[32], bytes[48]};
  float out;
  memcpy(&out, entry, sizeof out);
  return out;
}

}  // namespace
}  // namespace qbb::cpu
