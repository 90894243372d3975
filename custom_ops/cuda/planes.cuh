// Activations as bit planes, and the product of bits with bits.
//
// 128 inputs of one row of X are rounded to whole numbers of 16 (or 8) bits of a common step. Plane j holds bit j of all
// of them, so a sum over the inputs whose weight bit is set is Σ_j 2^j · popcount(weights & plane_j): tensor cores
// count 16 rows times 8 planes at once, from the packed weights as they lie in memory.
//
//     Σ sign·x  =  2·Σ_{bit set} x − Σ x
#pragma once

#include "cuda/device.cuh"

namespace qbb::cuda {

// Inputs 4·lane … 4·lane + 3 of a chunk, as stored.
struct RawInputs {
  uint4 bits;
};

__device__ __forceinline__ RawInputs load_raw(const Weights& w, const Rows& rows, int row, int chunk, int lane,
                                              bool aligned) {
  const int k = chunk * kChunk + 4 * lane, size = rows.type == kFloat32 ? 4 : 2;
  const char* x = static_cast<const char*>(rows.x) + (static_cast<int64_t>(row) * w.K + k) * size;
  RawInputs raw{};
  if (row >= rows.M || k >= w.K) return raw;
  if (aligned) {
    if (rows.type == kFloat32) {
      raw.bits = *reinterpret_cast<const uint4*>(x);
    } else {
      const uint2 four = *reinterpret_cast<const uint2*>(x);
      raw.bits.x = four.x;
      raw.bits.y = four.y;
    }
    return raw;
  }
  const auto element = [&](int i) -> uint32_t {
    if (k + i >= w.K) return 0;
    return size == 4 ? reinterpret_cast<const uint32_t*>(x)[i] : reinterpret_cast<const uint16_t*>(x)[i];
  };
  if (size == 4) {
    raw.bits = make_uint4(element(0), element(1), element(2), element(3));
  } else {
    raw.bits.x = element(0) | element(1) << 16;
    raw.bits.y = element(2) | element(3) << 16;
  }
  return raw;
}

__device__ __forceinline__ float4 to_float4(const RawInputs& raw, Type type) {
  if (type == kFloat32) {
    return make_float4(__uint_as_float(raw.bits.x), __uint_as_float(raw.bits.y), __uint_as_float(raw.bits.z),
                       __uint_as_float(raw.bits.w));
  }
  if (type == kBFloat16) {
    return make_float4(__uint_as_float(raw.bits.x << 16), __uint_as_float(raw.bits.x & 0xffff0000u),
                       __uint_as_float(raw.bits.y << 16), __uint_as_float(raw.bits.y & 0xffff0000u));
  }
  const float2 a = to_floats(raw.bits.x), b = to_floats(raw.bits.y);
  return make_float4(a.x, a.y, b.x, b.y);
}

// Planes of a chunk: a lane has plane_of(lane) (planes[0]) and plane_of(lane) + 8 (planes[1]) of word lane / 8.
struct Planes {
  uint32_t planes[2];
  float step;
  int total;  // of the lane's four whole numbers
};

__device__ __forceinline__ int plane_of(int lane) { return (lane & 2) * 2 + (lane & 1) * 2 + (lane & 4) / 4; }
__device__ __forceinline__ int lane_of_plane(int plane) { return (plane & 4) / 2 + (plane & 2) / 2 + (plane & 1) * 4; }

// Whether all rows of X can be read four elements at a time.
__device__ __forceinline__ bool in_fours(const Weights& w, const Rows& rows) {
  return w.K % 4 == 0 && reinterpret_cast<uintptr_t>(rows.x) % (rows.type == kFloat32 ? 16 : 8) == 0;
}

template <int kBits>
__device__ __forceinline__ Planes to_planes(float4 v, int lane) {
  constexpr float kLargest = kBits == 8 ? 127.0f : 32767.0f;
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23: a sum with it has the rounded number in its last bits
  const float m = max_of_lanes(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  Planes p;
  const bool some = m > kSmallest;
  p.step = some ? m / kLargest : 0.0f;
  const float inverse = some ? kLargest / m : 0.0f;
  const auto rounded = [&](float x) { return __float_as_uint(fmaf(x, inverse, kMagic)); };
  const uint32_t q0 = rounded(v.x), q1 = rounded(v.y), q2 = rounded(v.z), q3 = rounded(v.w);
  p.total = static_cast<int>(q0 + q1 + q2 + q3 - 4 * __float_as_uint(kMagic));
  // Four numbers of 16 bits to 16 planes of four bits: pairs, then fours.
  const uint32_t r0 = __byte_perm(q0, q2, 0x5410), r1 = __byte_perm(q1, q3, 0x5410);
  const auto fours = [](uint32_t pairs) {  // from planes j, j + 2, …: nibbles of j, j + 4, …, then those of j + 2, …
    const uint32_t x = __byte_perm(pairs, 0, 0x1010), y = __byte_perm(pairs, 0, 0x3232);
    return (x & 0x00003333u) | ((x >> 2) & 0x33330000u) | ((y << 2) & 0x0000ccccu) | (y & 0xcccc0000u);
  };
  const uint32_t even = fours((r0 & 0x55555555u) | ((r1 << 1) & 0xaaaaaaaau));
  const uint32_t odd = fours(((r0 >> 1) & 0x55555555u) | (r1 & 0xaaaaaaaau));
  // Lanes i and i + 4 of eight have the nibbles of a byte of each plane; one takes the even planes, the other the odd ones.
  const bool second = (lane & 4) != 0;
  const uint32_t other = __shfl_xor_sync(kAllLanes, second ? even : odd, 4);
  const uint32_t low = second ? other : even, high = second ? odd : other;
  const uint32_t bytes0 = (low & 0x0f0f0f0fu) | ((high & 0x0f0f0f0fu) << 4);
  const uint32_t bytes1 = ((low >> 4) & 0x0f0f0f0fu) | (high & 0xf0f0f0f0u);
  // Four lanes have a byte each of eight planes. After this each has two bytes of four planes, and then two whole words.
  const bool upper = (lane & 2) != 0;
  const uint32_t own = upper ? bytes1 : bytes0;
  const uint32_t theirs = __shfl_xor_sync(kAllLanes, upper ? bytes0 : bytes1, 2);
  const uint32_t first = upper ? theirs : own, last = upper ? own : theirs;  // bytes j and j + 2 of a word
  const uint32_t p01 = __byte_perm(first, last, 0x5140), p23 = __byte_perm(first, last, 0x7362);
  const bool right = (lane & 1) != 0;
  const uint32_t kept = right ? p23 : p01;
  const uint32_t got = __shfl_xor_sync(kAllLanes, right ? p01 : p23, 1);
  const uint32_t left = right ? got : kept, rest = right ? kept : got;  // bytes 0, 2 and bytes 1, 3 of two words
  p.planes[0] = __byte_perm(left, rest, 0x5140);
  p.planes[1] = __byte_perm(left, rest, 0x7362);
  return p;
}

// Planes 2t and 2t + 1 (and 8 + 2t, 9 + 2t) of a count, in units of 4^t. The last plane is that of the sign.
__device__ __forceinline__ int weigh(int c0, int c1, int last) { return c0 + last * c1; }
__device__ __forceinline__ int weigh(int c0, int c1, int d0, int d1, int last) {
  return c0 + 2 * c1 + 256 * d0 + 256 * last * d1;
}

}  // namespace qbb::cuda
