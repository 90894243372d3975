// More rows of X. Each warp owns 16 rows of the matrix and a share of its chunks; X lies in shared memory, as the products want
// it (Halves, Bytes). Sums of the warps that share a tile meet in shared memory, in a fixed order.
#pragma once

#include "cuda/bytes.cuh"
#include "cuda/halves.cuh"

namespace qbb::cuda {

constexpr int kBatchWarps = 8;
constexpr int kBatchDepth = 2;  // chunks of weights in flight

// Chunks of X in shared memory at a time.
template <int kColumns>
constexpr int kBlockChunks = 32 / kColumns;

// Bytes of shared memory: X, and numbers for each chunk of each of its rows.
constexpr size_t kBatchMemory = size_t{32} * kColumn * (kRowStride * 16 + 8);

// float16 scales; groups that are 2^n chunks, or whole rows. How: Halves or Bytes. blockIdx.y: blocks of 8·kColumns rows of
// X.
template <class How, int kBases, int kColumns>
__global__ void __launch_bounds__(kBatchWarps * 32, 2) batch(const Weights w, const Rows rows) {
  uint4* memory = block_memory();
  constexpr int kRows = kColumns * kColumn, kBlock = kBlockChunks<kColumns>;
  auto* numbers = reinterpret_cast<float2*>(memory + kBlock * kRows * kRowStride);  // of each chunk of each row
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const int row = static_cast<int>(blockIdx.y) * kRows, here = min(rows.M - row, kRows);
  const int per_load = rows.type == kFloat32 ? 4 : 8;
  const bool aligned = w.K % per_load == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
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
      for (int i = static_cast<int>(threadIdx.x); i < (block_end - block) * kRows * kChunkWords; i += kBatchWarps * 32) {
        const int word = i % kChunkWords, r = i / kChunkWords % kRows, place = i / kChunkWords;
        const int k = (block + place / kRows) * kChunk + word * QBB_WORD_BITS;
        How::stage(memory + place * kRowStride + word, numbers + place, rows, row + r, k, w.K, aligned, r < here);
      }
      __syncthreads();
      while (busy && at < block_end) {
        const Chunk<kBases> now = next[0][0];
#pragma unroll
        for (int d = 0; d + 1 < kBatchDepth; ++d) next[d][0] = next[d + 1][0];
        const int ahead = at + kBatchDepth * split;
        if (ahead < chunks) load_chunks(next[kBatchDepth - 1], w, own, mine, ahead);
        const int place = (at - block) * kRows;
        const uint4* from = memory + (place + lane / 4) * kRowStride + lane % 4;
        How::template add<kBases, kColumns>(sums, now, inverse, from, numbers + place, lane % 4);
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
      store_y(rows, static_cast<int64_t>(row + r) * w.N + out, fmaf(sum, How::last_factor(w), w.bias == nullptr ? 0.0f : w.bias[out]));
    }
  }
}

}  // namespace qbb::cuda
