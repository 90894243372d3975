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

// Where plane g of an eight and word t of a chunk lie, lane = 4g + t: each chunk has another order of planes, so that the
// lanes that make planes of eight chunks write to different banks.
__device__ __forceinline__ int place_of_plane(int lane, int chunk) { return lane ^ ((chunk & 7) << 2); }

// A thread makes the planes of 16 inputs: a half of a word, bits 16p .. 16p + 16, which are the inputs of input_of_bit.
constexpr int kHalfWord = 16;
__device__ __forceinline__ constexpr int input_of_half(int bit) { return 4 * (bit / 8) + bit % 4 + (bit % 8 < 4 ? 0 : 8); }

// Inputs k .. k + 8 and k + 16 .. k + 24 of a row, 0 where there are none.
__device__ __forceinline__ void load_inputs(float (&v)[kHalfWord], const Rows& rows, int row, int k, int K, bool aligned) {
  const int64_t at = static_cast<int64_t>(row) * K + k;
  if (row >= rows.M || !aligned || k + kHalfWord + kHalfWord / 2 > K) {
#pragma unroll
    for (int i = 0; i < kHalfWord; ++i) v[i] = row < rows.M && k + i + i / 8 * 8 < K ? load_x(rows, at + i + i / 8 * 8) : 0.0f;
    return;
  }
  if (rows.type == kFloat32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(rows.x) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = from[i + i / 2 * 2];
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
    return;
  }
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(rows.x) + at);
  const uint4 raw[2] = {from[0], from[2]};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint4& eight = raw[i / 4];
    const uint32_t two = i % 4 == 0 ? eight.x : i % 4 == 1 ? eight.y : i % 4 == 2 ? eight.z : eight.w;
    const float2 pair = rows.type == kFloat16
                            ? to_floats(two)
                            : make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

// 16 whole numbers of 16 bits, two in a register (i and i + 8 in the i-th), to 16 planes of 16 bits, two in a register
// likewise: exchanges at distances 8, 4, 2, 1 (Hacker's Delight, 7-3).
__device__ __forceinline__ void transpose(uint32_t (&r)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) r[i] = __byte_perm(r[i], 0, 0x3120);
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const uint32_t mask = step == 4 ? 0x0f0f0f0fu : step == 2 ? 0x33333333u : 0x55555555u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & step) continue;
      const uint32_t a = r[i], b = r[i + step];
      r[i] = (a & mask) | ((b << step) & ~mask);
      r[i + step] = ((a >> step) & mask) | (b & ~mask);
    }
  }
}

// Planes of all of X as count_shared_bits wants them, [kRows][chunks][kBits / 8][32] with place_of_plane, and for each chunk
// of each row its step and half of its inputs' total. Made by the first kThreads threads; eight neighbours make a chunk.
template <int kBits, int kRows, int kThreads>
__device__ __forceinline__ void make_planes(uint32_t* planes, float2* steps, const Weights& w, const Rows& rows,
                                            int chunks, int thread) {
  constexpr int kTiles = kBits / 8, kParts = 2 * kChunkWords;
  constexpr float kLargest = kBits == 8 ? 127.0f : 32767.0f;
  constexpr float kMagic = 12582912.0f;  // 1.5·2^23: a sum with it has the rounded number in its last bits
  const bool aligned = w.K % (rows.type == kFloat32 ? 4 : 8) == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
  const int items = kRows * chunks * kParts;
  for (int first = 0; first < items; first += kThreads) {
    if (first + thread / 32 * 32 >= items) break;  // the whole warp
    const int item = first + thread, place = item / kParts, word = item % kParts / 2, part = item % 2;
    const int row = kRows == 1 ? 0 : place / chunks, chunk = kRows == 1 ? place : place % chunks;
    float v[kHalfWord];
    const int k = (chunk * kChunkWords + word) * QBB_WORD_BITS + part * (kHalfWord / 2);
    load_inputs(v, rows, item < items ? row : rows.M, k, w.K, aligned);
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < kHalfWord; ++i) m = fmaxf(m, fabsf(v[i]));
#pragma unroll
    for (int other = 1; other < kParts; other *= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, other));
    const float inverse = m > kSmallest ? kLargest / m : 0.0f;
    uint32_t total = 0, r[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t a = __float_as_uint(fmaf(v[input_of_half(i)], inverse, kMagic));
      const uint32_t b = __float_as_uint(fmaf(v[input_of_half(i + 8)], inverse, kMagic));
      total += a + b;
      r[i] = __byte_perm(a, b, 0x5410);
    }
    total -= kHalfWord * __float_as_uint(kMagic);
#pragma unroll
    for (int other = 1; other < kParts; other *= 2) total += __shfl_xor_sync(kAllLanes, total, other);
    transpose(r);
    if (item >= items) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      auto* to = reinterpret_cast<uint16_t*>(planes + place * kTiles * 32 + place_of_plane(i * 4 + word, chunk)) + part;
      to[0] = static_cast<uint16_t>(r[i]);
      if constexpr (kTiles == 2) to[64] = static_cast<uint16_t>(r[i] >> 16);
    }
    if (item % kParts == 0) {
      const float half = 0.5f * static_cast<float>(static_cast<int>(total));
      steps[place] = make_float2(m > kSmallest ? m * (1.0f / kLargest) : 0.0f, half);
    }
  }
}

// Planes 2t and 2t + 1 (and 8 + 2t, 9 + 2t) of a count, in units of 4^t. The last plane is that of the sign.
__device__ __forceinline__ int weigh(int c0, int c1, int last) { return c0 + last * c1; }
__device__ __forceinline__ int weigh(int c0, int c1, int d0, int d1, int last) {
  return c0 + 2 * c1 + 256 * d0 + 256 * last * d1;
}

// What a lane needs of X's planes for one chunk.
template <int kBits, int kRows>
struct PlanesOfChunk {
  static constexpr int kTiles = kBits / 8;  // of eight planes
  uint32_t planes[kRows][kTiles];
  float2 step[kRows];  // with half of the inputs' total

  // `turn`: the chunk's number, or another one that is the same modulo 8.
  __device__ __forceinline__ PlanesOfChunk(const uint32_t* all, const float2* steps, int chunk, int chunks, int lane,
                                           int turn) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int place = r * chunks + chunk;
      step[r] = steps[place];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) planes[r][i] = all[(place * kTiles + i) * 32 + place_of_plane(lane, turn)];
    }
  }
};

// One chunk of a tile times up to kRows rows of X, added to `sums` (rows 2g and 2g + 1 of the tile) in units of 4^t / 2.
template <int kBases, int kBits, int kRows>
__device__ __forceinline__ void add_chunk_of_planes(float (&sums)[kRows][2], const Chunk<kBases>& weights,
                                                    const PlanesOfChunk<kBits, kRows>& x, int lane) {
  const int t = lane % 4, sign = t == 3 ? -2 : 2;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float half_total = t == 0 ? x.step[r].y : 0.0f;
    float part[2] = {weights.offset.x * half_total, weights.offset.y * half_total};
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      int c[4], d[4];
      count_shared_bits(c, weights.words[b].x, weights.words[b].y, x.planes[r][0]);
      int first, second;
      if constexpr (kBits == 8) {
        first = weigh(c[0], c[1], sign);
        second = weigh(c[2], c[3], sign);
      } else {
        count_shared_bits(d, weights.words[b].x, weights.words[b].y, x.planes[r][1]);
        first = weigh(c[0], c[1], d[0], d[1], sign);
        second = weigh(c[2], c[3], d[2], d[3], sign);
      }
      const float2 scale = to_floats(weights.scales[b]);
      part[0] = fmaf(scale.x, static_cast<float>(first) - half_total, part[0]);
      part[1] = fmaf(scale.y, static_cast<float>(second) - half_total, part[1]);
    }
    sums[r][0] = fmaf(x.step[r].x, part[0], sums[r][0]);
    sums[r][1] = fmaf(x.step[r].x, part[1], sums[r][1]);
  }
}

}  // namespace qbb::cuda
