// custom_ops/cuda/instructions.cuh for emulate.h: what the instructions do, in C++.
#pragma once

#include "cuda/weights.h"
#include "emulate.h"

namespace qbb::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

inline uint4* block_memory() { return reinterpret_cast<uint4*>(emulate::now().block->memory_start); }

inline int sum_of_lanes(int v) {
  const auto bits = static_cast<uint32_t>(v);
  const emulate::Shown& all = emulate::show(&bits, 1);
  uint32_t sum = 0;
  for (const auto& lane : all) sum += lane[0];
  return static_cast<int>(sum);
}

inline float max_of_lanes(float v) {
  const uint32_t bits = __float_as_uint(v);
  const emulate::Shown& all = emulate::show(&bits, 1);
  float largest = 0;
  for (const auto& lane : all) largest = std::max(largest, __uint_as_float(lane[0]));
  return largest;
}

inline uint32_t look_up_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

template <uint32_t kMask>
inline uint32_t choose_bits(uint32_t a, uint32_t b) {
  return (a & kMask) | (b & ~kMask);
}

template <int kBits>
inline uint32_t shift_right(uint32_t v) {
  return v >> kBits;
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <int kBytes>
inline void copy_async(void* to, const void* from) {
  std::memcpy(to, from, kBytes);
}
inline void end_copies() {}
template <int kOpen>
inline void wait_for_copies() {
  __syncwarp();
}

inline void count_shared_bits(int c[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t mine[3] = {a0, a1, b};
  const emulate::Shown& all = emulate::show(mine, 3);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i) {  // rows g and g + 8, columns 2t and 2t + 1
    c[i] = 0;
    for (int k = 0; k < 4; ++k) {
      c[i] += __builtin_popcount(all[4 * g + k][i / 2] & all[4 * (2 * t + i % 2) + k][2]);
    }
  }
}

// Half `h` of a pair, as a float.
inline float half_of(uint32_t pair, int h) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * h));
  __half value;
  std::memcpy(&value, &bits, 2);
  return __half2float(value);
}

// a[r, k] of a 16×16 operand: rows g (registers 0, 2) and g + 8 (1, 3), pairs 2t (0, 1) and 2t + 8 (2, 3).
inline float element_of_a(const emulate::Shown& all, int r, int k) {
  return half_of(all[4 * (r % 8) + k % 8 / 2][r / 8 + k / 8 * 2], k % 2);
}

inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulate::Shown& all = emulate::show(mine, 6);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const float b = half_of(all[4 * (2 * t + i % 2) + k % 8 / 2][4 + k / 8], k % 2);
      c[i] += element_of_a(all, g + i / 2 * 8, k) * b;
    }
  }
}

template <bool kFirst>
inline void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulate::Shown& all = emulate::show(mine, 6);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  const auto byte = [](uint32_t word, int i) { return static_cast<int>(static_cast<int8_t>(word >> (8 * i))); };
  for (int i = 0; i < 4; ++i) {
    if (kFirst) c[i] = 0x4b400000;
    for (int k = 0; k < 32; ++k) {
      const int from = k % 16 / 4, r = g + i / 2 * 8;
      const int x = byte(all[4 * (r % 8) + from][r / 8 + k / 16 * 2], k % 4);
      const int y = byte(all[4 * (2 * t + i % 2) + from][4 + k / 16], k % 4);
      c[i] += x * y;
    }
  }
}

}  // namespace qbb::cuda
