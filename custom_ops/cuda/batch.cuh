// More rows of X. Each warp owns 16 rows of the matrix and a share of its chunks, which come as in decode.cuh; X lies in
// shared memory, as the products want it (Halves, Bytes). Levels are made once for each row and chunk, one by each lane, and
// kept as tables for look-ups. Sums of the warps that share a tile meet in shared memory, in a fixed order.
#pragma once

#include "cuda/bytes.cuh"
#include "cuda/halves.cuh"
#include "cuda/ring.cuh"

namespace qbb::cuda {

constexpr int kBatchWarps = 16;
constexpr int kBatchPiece = 2;  // chunks: 32 rows and chunks of levels, one for each lane

// Pieces of weights in flight for each warp.
__host__ __device__ constexpr int batch_depth(int bases) { return bases == 1 ? 4 : bases == 2 ? 3 : 2; }

// Bytes of shared memory: pieces, levels, sums, and X with the numbers of each chunk of each of its rows.
template <int kBases>
constexpr int64_t kBatchFixed =
    kBatchWarps * (int64_t{batch_depth(kBases)} * Ring<kBases, kBatchPiece>::kPiece * 4 + 32 * 16) +
    int64_t{kBatchWarps} * kColumn * QBB_TILE_ROWS * 4;

constexpr int64_t batch_fixed(int bases) {
  return bases == 1 ? kBatchFixed<1> : bases == 2 ? kBatchFixed<2> : bases == 3 ? kBatchFixed<3> : kBatchFixed<4>;
}

constexpr int64_t kStagedRow = kRowStride * 16 + 8;  // bytes of a chunk of a row of X

// How many chunks of `rows` rows of X fit into `memory` bytes beside the rest: whole pieces, and no more than there are.
inline int batch_block(int words, int bases, int rows, int64_t memory) {
  const int64_t fits = (memory - batch_fixed(bases)) / (rows * kStagedRow) / kBatchPiece * kBatchPiece;
  const int64_t chunks = (words + kChunkWords - 1) / kChunkWords;
  return static_cast<int>(fits < chunks + chunks % kBatchPiece ? fits : chunks + chunks % kBatchPiece);
}

inline size_t batch_memory(int bases, int rows, int block) {
  return static_cast<size_t>(batch_fixed(bases) + block * rows * kStagedRow);
}

// float16 scales; groups that are 2^n chunks, or whole rows. How: Halves or Bytes. blockIdx.y: blocks of 8·kColumns rows of
// X.
template <class How, int kBases, int kColumns>
__global__ void __launch_bounds__(kBatchWarps * 32, 1) batch(const Weights w, const Rows rows) {
  let_next_kernel_start();
  using Pieces = Ring<kBases, kBatchPiece>;
  constexpr int kDepth = batch_depth(kBases), kThreads = kBatchWarps * 32;
  constexpr int kRows = kColumns * kColumn, kUnroll = kColumns < 4 && kBases < 4 ? 2 : 1;  // there are 128 registers
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  uint4* memory = block_memory();
  uint4* tables = memory + warp * 32;
  auto* partial = reinterpret_cast<float*>(memory + kBatchWarps * 32);  // [kBatchWarps][kColumn][16]
  uint32_t* rings = reinterpret_cast<uint32_t*>(partial + kBatchWarps * kColumn * QBB_TILE_ROWS);
  uint32_t* ring = rings + warp * kDepth * Pieces::kPiece;
  uint4* staged = reinterpret_cast<uint4*>(rings + kBatchWarps * kDepth * Pieces::kPiece);
  auto* numbers = reinterpret_cast<float2*>(staged + rows.block * kRows * kRowStride);  // of each chunk of each row
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords, pieces = (chunks + kBatchPiece - 1) / kBatchPiece;
  const int row = static_cast<int>(blockIdx.y) * kRows, here = min(rows.M - row, kRows);
  const bool aligned = w.K % (rows.type == kFloat32 ? 4 : 8) == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int end = share(static_cast<int>(blockIdx.x) + 1);
  bool ready = false;
  int held = -1;  // the first chunk of X in shared memory
  for (int tile = share(static_cast<int>(blockIdx.x)); tile < end; tile += kBatchWarps) {
    const int tiles = min(end - tile, kBatchWarps), split = kBatchWarps / tiles;
    const int mine = min(tile + warp / split, end - 1), part = warp % split;
    const bool busy = warp / split < tiles;  // warps past the last tile only help to stage X
    int next = busy ? part : pieces, slot = 0, free = 0;
    const auto fetch = [&]() {
      if (next < pieces) Pieces::fetch(ring + free * Pieces::kPiece, w, mine, next * kBatchPiece, lane);
      end_copies();
      next += split;
      free = free + 1 == kDepth ? 0 : free + 1;
    };
    for (int d = 0; d < kDepth; ++d) fetch();
    const float own_inverse = How::inverse_of(w, mine * QBB_TILE_ROWS + lane % QBB_TILE_ROWS);
    const int pair = mine * QBB_TILE_ROWS + lane / 4 * 2;
    const float2 inverse = make_float2(How::inverse_of(w, pair), How::inverse_of(w, pair + 1));
    if (!ready) wait_for_previous_kernel();
    ready = true;
    float sums[kColumns][4] = {};
    int at = part;  // the next piece
    for (int block = 0; block < chunks; block += rows.block) {
      const int block_end = min(chunks, block + rows.block);
      if (held != block) {
        __syncthreads();
        const int items = (block_end - block) * kRows * kChunkWords;
        const auto load = [&](uint4 (&raw)[How::kRawPieces], int i) {
          const int r = i / kChunkWords % kRows;
          const int k = (block + i / kChunkWords / kRows) * kChunk + i % kChunkWords * QBB_WORD_BITS;
#pragma unroll
          for (int v = 0; v < How::kRawPieces; ++v) raw[v] = make_uint4(0, 0, 0, 0);
          if (r < here) How::load(raw, rows, row + r, k, w.K, aligned);
        };
        uint4 raw[How::kRawPieces];
        if (static_cast<int>(threadIdx.x) < items) load(raw, static_cast<int>(threadIdx.x));
        for (int i = static_cast<int>(threadIdx.x); i < items; i += kThreads) {
          uint4 now[How::kRawPieces];
#pragma unroll
          for (int v = 0; v < How::kRawPieces; ++v) now[v] = raw[v];
          if (i + kThreads < items) load(raw, i + kThreads);
          const int place = i / kChunkWords, word = i % kChunkWords;
          How::stage(staged + place * kRowStride + word, numbers + place, now, rows.type, word, How::correction(kBases));
        }
        __syncthreads();
        held = block;
      }
      for (; busy && at * kBatchPiece < block_end; at += split) {
        wait_for_copies<kDepth - 1>();
        const uint32_t* piece = ring + slot * Pieces::kPiece;
        float s[kBases];
        const float z = Pieces::scales_of_row(s, piece, w, lane);
        tables[lane] = How::template table<kBases>(s, z, own_inverse);
        __syncwarp();
#pragma unroll(kUnroll)
        for (int u = 0; u < kBatchPiece; ++u) {
          const int chunk = at * kBatchPiece + u;
          if (chunk >= block_end) break;
          const Chunk<kBases> weights = Pieces::take(piece, w, u, lane);
          const uint4* levels = tables + u * QBB_TILE_ROWS + lane / 4 * 2;
          const uint4 table[2] = {levels[0], levels[1]};
          const int place = (chunk - block) * kRows;
          const uint4* from = staged + (place + lane / 4) * kRowStride + lane % 4;
          How::template add<kBases, kColumns>(sums, weights, table, inverse, from, numbers + place, lane % 4);
        }
        __syncwarp();  // all lanes have read the piece and the levels
        slot = slot + 1 == kDepth ? 0 : slot + 1;
        fetch();
      }
    }
    // One column of eight rows of X at a time.
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if (n * kColumn >= here) break;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = lane % 4 * 2 + i % 2, o = lane / 4 * 2 + i / 2;
        partial[(warp * kColumn + r) * QBB_TILE_ROWS + o] = sums[n][i];
      }
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < tiles * kColumn * QBB_TILE_ROWS; i += kThreads) {
        const int o = i % QBB_TILE_ROWS, r = i / QBB_TILE_ROWS % kColumn, t = i / QBB_TILE_ROWS / kColumn;
        const int out = (tile + t) * QBB_TILE_ROWS + o, of_x = n * kColumn + r;
        if (out >= w.N || of_x >= here) continue;
        float sum = 0.0f;
        for (int s = 0; s < split; ++s) sum += partial[((t * split + s) * kColumn + r) * QBB_TILE_ROWS + o];
        const float bias = w.bias == nullptr ? 0.0f : w.bias[out];
        store_y(rows, static_cast<int64_t>(row + of_x) * w.N + out, fmaf(sum, How::last_factor(w, out), bias));
      }
    }
  }
}

}  // namespace qbb::cuda
