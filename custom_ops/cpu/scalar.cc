// Plain C++ for every CPU, and the reading of the algorithm that the others are compared with.
#include <cmath>

#include "cpu/byte_product_kernel.h"
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
  static constexpr int kExpandBases = 1;
  static constexpr int kFloatSums = 1;
  static constexpr int kProductRows = 1, kProductTiles = 1;

  template <class F>
  static Lanes map(F f) {
    Lanes out;
    for (int i = 0; i < kLanes; ++i) out.f[i] = f(i);
    return out;
  }
  static Lanes zero() { return Lanes{}; }
  static Lanes splat(float value) {
    return map([&](int) { return value; });
  }
  static Lanes load(const float* from) {
    Lanes out;
    memcpy(out.f, from, sizeof out.f);
    return out;
  }
  static Lanes load_half(const uint16_t* from) {
    uint16_t halves[kLanes];
    memcpy(halves, from, sizeof halves);  // X may lie at any address
    return map([&](int i) { return half_to_float(halves[i]); });
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
    return map([&](int i) { return a.f[i] + b.f[i]; });
  }
  static Lanes mul(const Lanes& a, const Lanes& b) {
    return map([&](int i) { return a.f[i] * b.f[i]; });
  }
  static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return map([&](int i) { return std::fma(a.f[i], b.f[i], c.f[i]); });
  }
  static Words shift_left(const Words& words) {
    Words out;
    for (int i = 0; i < kLanes; ++i) out.u[i] = words.u[i] << 1;
    return out;
  }
  static Lanes with_top_sign(const Words& words, const Lanes& a) {
    return map([&](int i) { return words.u[i] >> 31 != 0 ? a.f[i] : -a.f[i]; });
  }
  static Lanes sub(const Lanes& a, const Lanes& b) {
    return map([&](int i) { return a.f[i] - b.f[i]; });
  }
  static Lanes div(const Lanes& a, const Lanes& b) {
    return map([&](int i) { return a.f[i] / b.f[i]; });
  }
  static Lanes max(const Lanes& a, const Lanes& b) {
    return map([&](int i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; });
  }
  static Lanes abs(const Lanes& a) {
    return map([&](int i) { return std::fabs(a.f[i]); });
  }
  static Lanes round(const Lanes& a) {
    return map([&](int i) { return std::nearbyint(a.f[i]); });
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
    return map([&](int i) { return table[(word.u[i] >> (4 * n)) & 15u]; });
  }

  // Integer modes.
  using Indexes = Words;
  struct Ints {
    int32_t i[kLanes];
  };
  using Dots = Ints;
  struct Bytes {
    uint8_t u[kStepBytes];
  };
  static constexpr int kByteRows = 1;
  static constexpr int kByteSums = 0;
  static constexpr int kByteProductRows = 1, kByteProductTiles = 1;

  static int32_t to_int(float f) {  // padding may hold anything, even what does not fit
    return std::fabs(f) < 0x1p30f ? static_cast<int32_t>(std::nearbyint(f)) : 0;
  }
  static Lanes quad_sums(const Lanes& a) {
    return map([&](int i) {
      const float* x = a.f + i / 4 * 4;
      return (x[0] + x[1]) + (x[2] + x[3]);
    });
  }
  static float largest(const Lanes& a) {
    float most = 0;
    for (const float f : a.f) most = f > most ? f : most;
    return most;
  }
  static bool all_zero(const Lanes& a) {
    bool all = true;
    for (const float f : a.f) all = all && f == 0;
    return all;
  }
  static void store_rounded(int16_t* to, const Lanes& a) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int16_t>(to_int(a.f[i]));
  }
  static void store_rounded_by_bit(int8_t* to, const Lanes& a) {
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(to_int(a.f[i % 4 * 4 + i / 4]));
  }
  template <int kBytes>
  static void byte_tables(const int16_t* x, uint8_t* high, uint8_t* low) {
    for (int i = 0; i < 64; ++i) {
      int t = 0;
      for (int c = 0; c < 4; ++c) t += (i >> c & 1) != 0 ? x[i / 16 * 4 + c] : -x[i / 16 * 4 + c];
      high[i] = static_cast<uint8_t>((kBytes == 1 ? t + 128 : t) >> 8);
      if (kBytes == 2) low[i] = static_cast<uint8_t>(t);
    }
  }
  static Ints zero_ints() { return Ints{}; }
  static Indexes indexes(const Words& word) { return word; }
  template <class Entry>
  static Ints add_entries(Ints sum, const Indexes& index, const uint8_t* table) {
    for (int i = 0; i < kLanes; ++i) {
      for (int n = 0; n < kNibbles; ++n) {  // low nibbles of the four bytes have the first table, high ones the second
        const unsigned nibble = index.u[i] >> (4 * n) & 15u;
        sum.i[i] += static_cast<Entry>(table[(n & 1) * 64 + n / 2 * 16 + static_cast<int>(nibble)]);
      }
    }
    return sum;
  }
  static Ints add_signed(const Ints& sum, const Indexes& index, const uint8_t* table) {
    return add_entries<int8_t>(sum, index, table);
  }
  static Ints add_unsigned(const Ints& sum, const Indexes& index, const uint8_t* table) {
    return add_entries<uint8_t>(sum, index, table);
  }
  static Lanes to_float(const Ints& a) {
    return map([&](int i) { return static_cast<float>(a.i[i]); });
  }

  static Bytes bytes_of(const Lanes& a) {
    Bytes out;
    for (int i = 0; i < kStepBytes; ++i) out.u[i] = static_cast<uint8_t>(to_int(a.f[i / 4]));
    return out;
  }
  static Bytes add_where(Bytes sum, const Words& word, int bit, const Bytes& d) {
    for (int i = 0; i < kStepBytes; ++i) {
      if ((word.u[i / 4] >> (i % 4 * 8 + bit) & 1u) != 0) sum.u[i] = static_cast<uint8_t>(sum.u[i] + d.u[i]);
    }
    return sum;
  }
  static void store_bytes(uint8_t* to, const Bytes& a) { memcpy(to, a.u, sizeof a.u); }
  static Bytes load_bytes(const uint8_t* from) {
    Bytes out;
    memcpy(out.u, from, sizeof out.u);
    return out;
  }
  static Dots dots_from(int32_t) { return Dots{}; }
  struct Fours {
    int8_t x[4];
  };
  static Fours fours(int32_t four) {
    Fours out;
    memcpy(out.x, &four, sizeof out.x);
    return out;
  }
  static Dots dot(Dots sum, const Bytes& w, const Fours& fours) {
    for (int i = 0; i < kStepBytes; ++i) sum.i[i / 4] += (w.u[i] - 128) * fours.x[i % 4];
    return sum;
  }
  static Lanes dots_to_float(const Dots& a) { return to_float(a); }
};

}  // namespace

void run_floats_scalar(const Block& block);
void run_floats_scalar(const Block& block) { run_floats<Scalar>(block); }

void prepare_scalar(const Block& block);
void prepare_scalar(const Block& block) { prepare_bytes<Scalar>(block); }

void run_bytes_scalar(const Block& block);
void run_bytes_scalar(const Block& block) { run_bytes<Scalar>(block); }

}  // namespace qbb::cpu
