// 64-bit Arm with FEAT_DotProd: sdot multiplies four bytes of each of four rows and adds them up.
#include "cpu/neon_bytes.h"

namespace qbb::cpu {
namespace {

struct NeonDot : NeonBytes {
  static constexpr int kByteProductRows = 6, kByteProductTiles = 1;  // 24 sums, 4 weights and an input of 32 registers

  static QBB_INLINE void store_bytes(uint8_t* to, const Bytes& a) {  // as signed bytes
    const uint8x16_t top = vdupq_n_u8(128);
    for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, veorq_u8(a.v[i], top));
  }
  static QBB_INLINE Dots dot(Dots sum, const Bytes& w, Fours four) {
    const int8x8_t x = vcreate_s8(static_cast<uint32_t>(four));
    for (int i = 0; i < 4; ++i) sum.v[i] = vdotq_lane_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), x, 0);
    return sum;
  }
};

}  // namespace

void prepare_neondot(const Block& block);
void prepare_neondot(const Block& block) { prepare_bytes<NeonDot>(block); }

void run_bytes_neondot(const Block& block);
void run_bytes_neondot(const Block& block) { run_bytes<NeonDot>(block); }

}  // namespace qbb::cpu
