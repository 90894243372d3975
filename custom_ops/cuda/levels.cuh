// Weights as float16, made in registers from packed bits: the A operand of a matrix product.
//
// The bits of all bases at one place form a code; a group of a row has as many levels as there are codes. Lane (g, t) of
// a warp owns rows 2g and 2g + 1 and word t of each chunk of four words, and wants its 32 weights in pairs. `prmt` looks
// four bytes up at a time: low and high bytes of the levels lie in registers of their own, codes in the nibbles of the
// selector.
//
// Step s = 2i + h of eight gives the inputs i + 8h, i + 8h + 16 (first pair) and i + 8h + 4, i + 8h + 20 (second pair) of
// the word, i < 4, h < 2. Activations are put into the same order (`batch.cuh`).
#pragma once

#include "cuda/device.cuh"

namespace qbb::cuda {

// Levels of up to three bases of one row, by code, as float16 in units of Weights::unit.
struct Levels {
  uint32_t low[2], high[2];  // bytes of levels 0..3 and 4..7
};

__device__ __forceinline__ uint32_t pack(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}

__device__ __forceinline__ void set_bytes(Levels& to, int i, uint32_t l01, uint32_t l23) {
  to.low[i] = __byte_perm(l01, l23, 0x6420);
  to.high[i] = __byte_perm(l01, l23, 0x7531);
}

// `s`: scales divided by the unit; `z`: the offset, divided, too.
template <int kBases>
__device__ __forceinline__ Levels make_levels(const float (&s)[kBases], float z) {
  Levels levels;
  if constexpr (kBases == 1) {
    set_bytes(levels, 0, pack(z - s[0], z + s[0]), 0);
  } else if constexpr (kBases == 2) {
    const float sum = s[0] + s[1], difference = s[0] - s[1];
    set_bytes(levels, 0, pack(z - sum, z + difference), pack(z - difference, z + sum));
  } else {
    static_assert(kBases == 3, "a byte look-up has eight entries");
    const float sum = s[0] + s[1], difference = s[0] - s[1];
    const float l4 = s[2] - sum, l5 = s[2] + difference, l6 = s[2] - difference, l7 = s[2] + sum;
    set_bytes(levels, 0, pack(z - l7, z - l6), pack(z - l5, z - l4));
    set_bytes(levels, 1, pack(z + l4, z + l5), pack(z + l6, z + l7));
  }
  return levels;
}

// Codes of the bits i, i + 4, …, i + 28 of a word, one in each nibble.
template <int kBases>
__device__ __forceinline__ uint32_t codes(const uint32_t (&words)[kBases], int i) {
  uint32_t code = (words[0] >> i) & 0x11111111u;
  if constexpr (kBases > 1) code |= (i >= 1 ? words[1] >> (i - 1) : words[1] << 1) & 0x22222222u;
  if constexpr (kBases > 2) code |= (i >= 2 ? words[2] >> (i - 2) : words[2] << (2 - i)) & 0x44444444u;
  return code;
}

// The weights of step 2i + h as two pairs.
template <int kBases>
__device__ __forceinline__ void look_up(uint32_t& first, uint32_t& second, const Levels& levels, uint32_t code, int h) {
  const uint32_t selector = h == 0 ? code : shift_right<16>(code);
  const uint32_t low = look_up_bytes(levels.low[0], kBases > 2 ? levels.low[1] : 0, selector);
  const uint32_t high = look_up_bytes(levels.high[0], kBases > 2 ? levels.high[1] : 0, selector);
  first = __byte_perm(low, high, 0x5140);
  second = __byte_perm(low, high, 0x7362);
}

// The same where X keeps its order (`prompt.cuh`): lane t wants the inputs 8c + 2t + e of a word, c < 4, e < 2. Turned right
// by turn_of(t), the word has them as bits 0 and 1 (c = 0), 4 and 5 (c = 2), 16 and 17 (c = 1), 20 and 21 (c = 3).
__device__ __forceinline__ uint32_t turn_of(uint32_t t) { return 8 * (t / 2) + 2 * (t % 2); }

// Codes of those eight: c = 0, 2 of e = 0, then of e = 1 in the low half, c = 1, 3 in the high half.
template <int kBases>
__device__ __forceinline__ uint32_t codes_in_order(const uint32_t (&words)[kBases], uint32_t turn) {
  uint32_t even = 0, odd = 0;
#pragma unroll
  for (uint32_t b = 0; b < kBases; ++b) {
    const uint32_t turned = __funnelshift_r(words[b], words[b], turn - b);
    even |= turned & (0x00110011u << b);
    odd |= turned & (0x00220022u << b);
  }
  return even | odd << 7;
}

// Pairs of inputs c = 0 (h = 0) or 1 and c = 2 or 3: the even and the odd of two steps of a product.
template <int kBases>
__device__ __forceinline__ void look_up_in_order(uint32_t& even, uint32_t& odd, const Levels& levels, uint32_t code, int h) {
  const uint32_t selector = h == 0 ? code : code >> 16;
  const uint32_t low = look_up_bytes(levels.low[0], kBases > 2 ? levels.low[1] : 0, selector);
  const uint32_t high = look_up_bytes(levels.high[0], kBases > 2 ? levels.high[1] : 0, selector);
  even = __byte_perm(low, high, 0x6240);
  odd = __byte_perm(low, high, 0x7351);
}

// Four bases are two matrices, whose weights are added.
__device__ __forceinline__ void add_pairs(uint32_t (&a)[4][4], const uint32_t (&b)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a[s][i]), *reinterpret_cast<const __half2*>(&b[s][i]));
      a[s][i] = *reinterpret_cast<const uint32_t*>(&sum);
    }
  }
}

// All codes of a word: to[i] has those of the bits i, i + 4, …, i + 28, one in each nibble. Words change places bit by bit,
// which is cheaper than four times `codes`.
template <int kBases>
__device__ __forceinline__ void all_codes(uint32_t (&to)[4], const uint32_t* words) {
  if constexpr (kBases == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = (words[0] >> i) & 0x11111111u;
    return;
  }
  constexpr uint32_t kOne = 0x55555555u, kTwo = 0x33333333u;
  const uint32_t even = choose_bits<kOne>(words[0], words[1] << 1), odd = choose_bits<kOne>(shift_right<1>(words[0]), words[1]);
  if constexpr (kBases == 2) {
    to[0] = even & kTwo;
    to[1] = odd & kTwo;
    to[2] = shift_right<2>(even) & kTwo;
    to[3] = shift_right<2>(odd) & kTwo;
  } else {
    const uint32_t top_even = words[2] & kOne, top_odd = shift_right<1>(words[2]) & kOne;
    to[0] = choose_bits<kTwo>(even, top_even << 2);
    to[1] = choose_bits<kTwo>(odd, top_odd << 2);
    to[2] = choose_bits<kTwo>(shift_right<2>(even), top_even);
    to[3] = choose_bits<kTwo>(shift_right<2>(odd), top_odd);
  }
}

}  // namespace qbb::cuda
