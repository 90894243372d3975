// Plain C++ for every CPU, and the reading of the algorithm that the others are compared with.
#include <cmath>

#include "cpu/expand_kernel.h"

namespace qbb::cpu {
namespace {

struct Scalar {
  struct Lanes {
    float f[kLanes];
  };
  struct Words {
    uint32_t u[kLanes];
  };
  static constexpr int kMaxRows = 1;
  static constexpr int kMaxBases = 1;
  static constexpr int kProductRows = 1, kProductTiles = 1;

  static Lanes zero() { return Lanes{}; }
  static Lanes splat(float value) {
    Lanes out;
    for (float& f : out.f) f = value;
    return out;
  }
  static Lanes load(const float* from) {
    Lanes out;
    memcpy(out.f, from, sizeof out.f);
    return out;
  }
  static Lanes load_half(const uint16_t* from) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = half_to_float(from[i]);
    return out;
  }
  static Words load_words(const uint32_t* from) {
    Words out;
    memcpy(out.u, from, sizeof out.u);
    return out;
  }
  static void store(float* to, const Lanes& a) { memcpy(to, a.f, sizeof a.f); }
  static void store_half(uint16_t* to, const Lanes& a) {
    for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(a.f[i]);
  }
  static Lanes add(const Lanes& a, const Lanes& b) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = a.f[i] + b.f[i];
    return out;
  }
  static Lanes mul(const Lanes& a, const Lanes& b) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = a.f[i] * b.f[i];
    return out;
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = std::fma(a.f[i], b.f[i], c.f[i]);
    return out;
  }
  static Words shift_left(const Words& words) {
    Words out;
    for (int i = 0; i < kLanes; ++i) out.u[i] = words.u[i] << 1;
    return out;
  }
  static Lanes with_top_sign(const Words& words, const Lanes& a) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = words.u[i] >> 31 != 0 ? a.f[i] : -a.f[i];
    return out;
  }
  static Lanes table(const float* x) {
    Lanes out;
    for (unsigned i = 0; i < 16; ++i) {
      const float x0 = i & 1u ? x[0] : -x[0];
      const float x1 = i & 2u ? x[1] : -x[1];
      const float x2 = i & 4u ? x[2] : -x[2];
      const float x3 = i & 8u ? x[3] : -x[3];
      out.f[i] = (x0 + x1) + (x2 + x3);
    }
    return out;
  }
  template <int n>
  static Lanes look_up(const Words& word, const float* table) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = table[(word.u[i] >> (4 * n)) & 15u];
    return out;
  }
};

}  // namespace

void run_scalar(const Block& block);
void run_scalar(const Block& block) { run<Scalar>(block); }

}  // namespace qbb::cpu
