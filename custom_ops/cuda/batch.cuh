// More rows of X, float16: weights become float16 in registers and meet X on the tensor cores.
//
// Making weights costs more than multiplying them, and costs the same for one row of X as for 32. Each warp owns 16 rows
// of the matrix and a share of its chunks; X lies in shared memory, in the order of levels.cuh. Sums of the warps that
// share a tile meet in shared memory, in a fixed order.
#pragma once

#include "cuda/levels.cuh"

namespace qbb::cuda {

constexpr int kBatchWarps = 8;
constexpr int kColumn = 8;         // rows of X that one product takes
constexpr int kRowStride = 20;     // 16-byte pieces from row to row of X: 16, and 4 that spread them over all banks
constexpr int kBatchDepth = 2;     // chunks of weights in flight

// Chunks of X in shared memory at a time.
template <int kColumns>
constexpr int kBlockChunks = 32 / kColumns;

// Bytes of shared memory: X, and a power of two for each chunk of each of its rows.
constexpr size_t kBatchMemory = size_t{32} * kColumn * (kRowStride * 16 + 4);

// Inputs k .. k + 32 of a row of X, as stored, in pairs; 0 past the end.
__device__ __forceinline__ void load_word(uint32_t (&r)[16], const uint16_t* x, int k, int K, bool aligned) {
  if (aligned && k + QBB_WORD_BITS <= K) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(x + k) + i);
      r[4 * i] = v.x;
      r[4 * i + 1] = v.y;
      r[4 * i + 2] = v.z;
      r[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto bits = [&](int at) -> uint32_t { return at < K ? x[at] : 0; };
      r[i] = bits(k + 2 * i) | bits(k + 2 * i + 1) << 16;
    }
  }
}

// bfloat16 to float16, divided by a power of two that makes the largest of the chunk about 2^13: bfloat16 has a larger
// range, but fewer digits. Four neighbouring lanes hold the words of a chunk. Returns the power.
__device__ __forceinline__ float to_half(uint32_t (&r)[16]) {
  uint32_t largest = 0;  // magnitudes of bfloat16 are in the order of their bits
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = max(largest, max(r[i] & 0x7fffu, (r[i] >> 16) & 0x7fffu));
  largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  const int exponent = min(max(static_cast<int>(largest >> 7) - 13, 27), 227);  // of the power, and of its reciprocal
  const float power = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
  const float reciprocal = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float low = __uint_as_float(r[i] << 16), high = __uint_as_float(r[i] & 0xffff0000u);
    r[i] = pack(low * reciprocal, high * reciprocal);
  }
  return power;
}

// Word t of a chunk of one row of X, as four pieces: i holds the pairs (i + 4j, i + 4j + 16), j < 4.
__device__ __forceinline__ void stage_word(uint4* to, const uint32_t (&r)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = [&](int j) {
      return __byte_perm(r[i / 2 + 2 * j], r[i / 2 + 2 * j + 8], i % 2 == 0 ? 0x5410 : 0x7632);
    };
    to[4 * i] = make_uint4(pair(0), pair(1), pair(2), pair(3));
  }
}

// Bases kFrom .. kFrom + kPart of a chunk times X, added to `sums`.
template <int kFrom, int kPart, int kBases, int kColumns>
__device__ __forceinline__ void add_part(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float inverse, float2 z,
                                         const uint4* x) {
  float s0[kPart], s1[kPart];
  uint32_t w0[kPart], w1[kPart];
#pragma unroll
  for (int b = 0; b < kPart; ++b) {
    const float2 s = to_floats(chunk.scales[kFrom + b]);
    s0[b] = s.x * inverse;
    s1[b] = s.y * inverse;
    w0[b] = chunk.words[kFrom + b].x;
    w1[b] = chunk.words[kFrom + b].y;
  }
  const Levels l0 = make_levels<kPart>(s0, z.x), l1 = make_levels<kPart>(s1, z.y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t c0 = codes<kPart>(w0, i), c1 = codes<kPart>(w1, i);
    uint4 b[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) b[n] = x[n * kColumn * kRowStride + 4 * i];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t a[4];
      look_up<kPart>(a[0], a[2], l0, c0, h);
      look_up<kPart>(a[1], a[3], l1, c1, h);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) multiply(sums[n], a, h == 0 ? b[n].x : b[n].z, h == 0 ? b[n].y : b[n].w);
    }
  }
}

template <int kBases, int kColumns>
__device__ __forceinline__ void add_chunk(float (&sums)[kColumns][4], const Chunk<kBases>& chunk, float inverse,
                                          const uint4* x) {
  const float2 z = make_float2(chunk.offset.x * inverse, chunk.offset.y * inverse);
  if constexpr (kBases == 4) {  // a look-up has eight entries, so four bases are two matrices
    add_part<0, 2>(sums, chunk, inverse, z, x);
    add_part<2, 2>(sums, chunk, inverse, make_float2(0.0f, 0.0f), x);
  } else {
    add_part<0, kBases>(sums, chunk, inverse, z, x);
  }
}

// X in shared memory: chunks [first, first + count) of rows [0, here) of it, rows up to kRows zero.
template <int kRows, bool kBrain>
__device__ __forceinline__ void stage(uint4* memory, float* powers, const uint16_t* x, int first, int count, int here,
                                      int K, bool aligned) {
  for (int i = static_cast<int>(threadIdx.x); i < count * kRows * kChunkWords; i += kBatchWarps * 32) {
    const int word = i % kChunkWords, row = i / kChunkWords % kRows, chunk = i / kChunkWords / kRows;
    uint32_t r[16] = {};
    if (row < here) {
      const int k = (first + chunk) * kChunk + word * QBB_WORD_BITS;
      load_word(r, x + static_cast<int64_t>(row) * K, k, K, aligned);
    }
    if constexpr (kBrain) {
      const float power = to_half(r);
      if (word == 0) powers[chunk * kRows + row] = power;
    }
    stage_word(memory + (chunk * kRows + row) * kRowStride + word, r);
  }
}

// float16 scales; groups that are 2^n chunks, or whole rows. X float16, or bfloat16 (kBrain). blockIdx.y: blocks of
// 8·kColumns rows of X.
template <int kBases, int kColumns, bool kBrain>
__global__ void __launch_bounds__(kBatchWarps * 32, 2) batch(const Weights w, const Rows rows) {
  uint4* memory = block_memory();
  constexpr int kRows = kColumns * kColumn, kBlock = kBlockChunks<kColumns>;
  auto* powers = reinterpret_cast<float*>(memory + kBlock * kRows * kRowStride);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const int row = static_cast<int>(blockIdx.y) * kRows, here = min(rows.M - row, kRows);
  const auto* x = static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * w.K;
  const bool aligned = w.K % 8 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
  const float inverse = 1.0f / w.unit;
  const Lane own = lane_of(lane);
  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int end = share(static_cast<int>(blockIdx.x) + 1);
  bool ready = false;
  for (int tile = share(static_cast<int>(blockIdx.x)); tile < end; tile += kBatchWarps) {
    const int tiles = min(end - tile, kBatchWarps), split = kBatchWarps / tiles;
    const int mine = tile + warp / split, part = warp % split;  // warps past the last tile only help to stage X
    const bool busy = mine < tile + tiles;
    Chunk<kBases> next[kBatchDepth][1];
#pragma unroll
    for (int d = 0; d < kBatchDepth; ++d) {
      if (busy && part + d * split < chunks) load_chunks(next[d], w, own, mine, part + d * split);
    }
    if (!ready) wait_for_previous_kernel();
    ready = true;
    float sums[kColumns][4] = {};
    int at = part;
    for (int block = 0; block < chunks; block += kBlock) {
      const int block_end = min(chunks, block + kBlock);
      __syncthreads();
      stage<kRows, kBrain>(memory, powers, x, block, block_end - block, here, w.K, aligned);
      __syncthreads();
      while (busy && at < block_end) {
        const Chunk<kBases> now = next[0][0];
#pragma unroll
        for (int d = 0; d + 1 < kBatchDepth; ++d) next[d][0] = next[d + 1][0];
        const int ahead = at + kBatchDepth * split;
        if (ahead < chunks) load_chunks(next[kBatchDepth - 1], w, own, mine, ahead);
        const int place = (at - block) * kRows;
        const uint4* from = memory + (place + lane / 4) * kRowStride + lane % 4;
        if constexpr (kBrain) {
          float part_sums[kColumns][4] = {};
          add_chunk<kBases, kColumns>(part_sums, now, inverse, from);
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[n][i] = fmaf(part_sums[n][i], powers[place + n * kColumn + lane % 4 * 2 + i % 2], sums[n][i]);
            }
          }
        } else {
          add_chunk<kBases, kColumns>(sums, now, inverse, from);
        }
        at += split;
      }
    }
    let_next_kernel_start();
    __syncthreads();
    auto* partial = reinterpret_cast<float*>(memory);  // [kBatchWarps][kRows][16]
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = n * kColumn + lane % 4 * 2 + i % 2, o = lane / 4 * 2 + i / 2;
        partial[(warp * kRows + r) * QBB_TILE_ROWS + o] = sums[n][i];
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tiles * here * QBB_TILE_ROWS; i += kBatchWarps * 32) {
      const int o = i % QBB_TILE_ROWS, r = i / QBB_TILE_ROWS % here, t = i / QBB_TILE_ROWS / here;
      const int out = (tile + t) * QBB_TILE_ROWS + o;
      if (out >= w.N) continue;
      float sum = 0.0f;
      for (int s = 0; s < split; ++s) sum += partial[((t * split + s) * kRows + r) * QBB_TILE_ROWS + o];
      store_y(rows, static_cast<int64_t>(row + r) * w.N + out, fmaf(sum, w.unit, w.bias == nullptr ? 0.0f : w.bias[out]));
    }
  }
}

}  // namespace qbb::cuda
