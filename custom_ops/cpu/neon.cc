// 64-bit Arm: every such CPU has these instructions.
#include "cpu/neon_bytes.h"

namespace qbb::cpu {
namespace {

struct NeonProduct : NeonBytes {
  static constexpr int kByteProductRows = 4, kByteProductTiles = 1;

  // Registers 2 i and 2 i + 1: the first two and the last two bytes of rows 8 i .. 8 i + 7, as signed bytes.
  static QBB_INLINE void store_bytes(uint8_t* to, const Bytes& a) {
    const uint8x16_t top = vdupq_n_u8(128);
    for (int i = 0; i < 4; i += 2, to += 32) {
      const uint16x8_t low = vreinterpretq_u16_u8(veorq_u8(a.v[i], top));
      const uint16x8_t high = vreinterpretq_u16_u8(veorq_u8(a.v[i + 1], top));
      vst1q_u8(to, vreinterpretq_u8_u16(vuzp1q_u16(low, high)));
      vst1q_u8(to + 16, vreinterpretq_u8_u16(vuzp2q_u16(low, high)));
    }
  }
  // Sums of two products fit 16 bits: 2 * 127 * 127.
  static QBB_INLINE int16x8_t low_rows(int8x16_t w01, int8x16_t w23, int8x16_t x01, int8x16_t x23) {
    return vmlal_s8(vmull_s8(vget_low_s8(w01), vget_low_s8(x01)), vget_low_s8(w23), vget_low_s8(x23));
  }
  static QBB_INLINE int16x8_t high_rows(int8x16_t w01, int8x16_t w23, int8x16_t x01, int8x16_t x23) {
    return vmlal_high_s8(vmull_high_s8(w01, x01), w23, x23);
  }
  static QBB_INLINE Dots dot(const Dots& sum, const Bytes& w, Fours four) {
    const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(four));
    const int8x16_t x01 = vreinterpretq_s8_s16(vdupq_lane_s16(x, 0)), x23 = vreinterpretq_s8_s16(vdupq_lane_s16(x, 1));
    const int8x16_t a01 = vreinterpretq_s8_u8(w.v[0]), a23 = vreinterpretq_s8_u8(w.v[1]);
    const int8x16_t b01 = vreinterpretq_s8_u8(w.v[2]), b23 = vreinterpretq_s8_u8(w.v[3]);
    return {{vpadalq_s16(sum.v[0], low_rows(a01, a23, x01, x23)),
             vpadalq_s16(sum.v[1], high_rows(a01, a23, x01, x23)),
             vpadalq_s16(sum.v[2], low_rows(b01, b23, x01, x23)),
             vpadalq_s16(sum.v[3], high_rows(b01, b23, x01, x23))}};
  }
};

}  // namespace

void run_floats_neon(const Block& block);
void run_floats_neon(const Block& block) { run_floats<Neon>(block); }

void prepare_neon(const Block& block);
void prepare_neon(const Block& block) { prepare_bytes<NeonProduct>(block); }

void run_bytes_neon(const Block& block);
void run_bytes_neon(const Block& block) { run_bytes<NeonProduct>(block); }

}  // namespace qbb::cpu
