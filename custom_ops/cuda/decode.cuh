// Few rows of X (decoding): a kernel that lives as long as one read of the weights.
//
// Each block owns some tiles of 16 rows of the matrix. Its warps take turns at pieces of 256 inputs of a tile, so that
// they read one stream together; each keeps the next pieces in flight. The planes of X are made once for each block
// while the first weights are on their way. Sums of the warps meet in shared memory, in a fixed order.
#pragma once

#include "cuda/planes.cuh"

namespace qbb::cuda {

constexpr int kDecodeWarps = 16;
constexpr int kPieceChunks = 2;   // chunks of 128 inputs in a piece
constexpr int kRoundTiles = 16;   // tiles whose sums are kept at a time

struct DecodeShape {
  int chunks;  // of a row
  int pieces;  // of a tile
};

__host__ __device__ inline DecodeShape decode_shape(int words) {
  const int chunks = (words + kChunkWords - 1) / kChunkWords;
  return DecodeShape{chunks, (chunks + kPieceChunks - 1) / kPieceChunks};
}

// Bytes of shared memory: planes, steps with totals, sums.
inline size_t decode_memory(int words, int bits, int rows) {
  const size_t chunks = static_cast<size_t>(decode_shape(words).pieces) * kPieceChunks;
  return static_cast<size_t>(rows) * (chunks * (static_cast<size_t>(bits) * 16 + 8) + kRoundTiles * kDecodeWarps * 64);
}

// Pieces in flight for each warp: enough bytes in all to wait for memory as one.
template <int kBases>
constexpr int kDepth = kBases == 1 ? 4 : kBases == 2 ? 3 : 2;

template <int kBases>
using Piece = Chunk<kBases>[kPieceChunks];

// Where a warp is: its pieces are kDecodeWarps apart.
struct Cursor {
  int tile, piece;

  __device__ __forceinline__ void advance(int pieces) {
    piece += kDecodeWarps;
    while (piece >= pieces) {
      piece -= pieces;
      ++tile;
    }
  }
};

// One piece of a tile times up to kRows rows of X, added to `sums` (rows 2g and 2g + 1 of the tile) in units of 4^t / 2.
template <int kBases, int kBits, int kRows>
__device__ __forceinline__ void add_piece(float (&sums)[kRows][2], const Piece<kBases>& p, int first,
                                          const uint32_t* planes, const float2* steps, int chunks, int lane) {
  constexpr int kTiles = kBits / 8;  // of eight planes
  const int t = lane % 4, sign = t == 3 ? -2 : 2;
#pragma unroll
  for (int u = 0; u < kPieceChunks; ++u) {
    const int chunk = first + u;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int place = r * chunks + chunk;
      const float2 step = steps[place];  // with half of the inputs' total
      const float half_total = t == 0 ? step.y : 0.0f;
      uint32_t x[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) x[i] = planes[(place * kTiles + i) * 32 + lane];
      float part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int b = 0; b < kBases; ++b) {
        int c[4], d[4];
        count_shared_bits(c, p[u].words[b].x, p[u].words[b].y, x[0]);
        int first, second;
        if constexpr (kTiles == 1) {
          first = weigh(c[0], c[1], sign);
          second = weigh(c[2], c[3], sign);
        } else {
          count_shared_bits(d, p[u].words[b].x, p[u].words[b].y, x[1]);
          first = weigh(c[0], c[1], d[0], d[1], sign);
          second = weigh(c[2], c[3], d[2], d[3], sign);
        }
        const float2 scale = to_floats(p[u].scales[b]);
        part[0] = fmaf(scale.x, static_cast<float>(first) - half_total, part[0]);
        part[1] = fmaf(scale.y, static_cast<float>(second) - half_total, part[1]);
      }
      part[0] = fmaf(p[u].offset.x, half_total, part[0]);
      part[1] = fmaf(p[u].offset.y, half_total, part[1]);
      sums[r][0] = fmaf(step.x, part[0], sums[r][0]);
      sums[r][1] = fmaf(step.x, part[1], sums[r][1]);
    }
  }
}

// Planes of all of X, as count_shared_bits wants them, with steps and halves of totals.
template <int kBits, int kRows>
__device__ __forceinline__ void make_planes(uint32_t* planes, float2* steps, const Weights& w, const Rows& rows,
                                            int chunks, int warp, int lane) {
  constexpr int kTiles = kBits / 8;
  for (int i = warp; i < kRows * chunks; i += kDecodeWarps) {
    const int row = i / chunks, chunk = i % chunks;
    Inputs in{};
    if (row < rows.M) in = load_inputs(w, rows, row, chunk, lane);
    const Planes<kBits> p = to_planes<kBits>(in, lane);
    const int plane = lane % kBits;
    uint32_t* to = planes + (i * kTiles + plane / 8) * 32 + plane % 8 * 4;
#pragma unroll
    for (int r = 0; r < kTiles; ++r) to[r * 2 + lane / kBits] = p.planes[r];
    const int total = sum_of_lanes(p.q[0] + p.q[1] + p.q[2] + p.q[3]);
    if (lane == 0) steps[i] = make_float2(p.step, 0.5f * static_cast<float>(total));
  }
}

// float16 scales; groups that are 2^n chunks, or whole rows; rows.M <= kRows.
template <int kBases, int kBits, int kRows>
__global__ void __launch_bounds__(kDecodeWarps * 32, 1) decode(const Weights w, const Rows rows) {
  uint4* memory = block_memory();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const DecodeShape shape = decode_shape(w.words);
  const int chunks = shape.pieces * kPieceChunks;
  auto* planes = reinterpret_cast<uint32_t*>(memory);
  auto* steps = reinterpret_cast<float2*>(planes + kRows * chunks * kBits * 4);
  auto* partial = reinterpret_cast<float*>(steps + kRows * chunks);  // [kRoundTiles][kDecodeWarps][kRows][16]
  constexpr int kDeep = kDepth<kBases>;
  const Lane mine = lane_of(lane);

  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int first = share(static_cast<int>(blockIdx.x)), end = share(static_cast<int>(blockIdx.x) + 1);
  bool ready = false;
  for (int tile = first; tile < end; tile += kRoundTiles) {
    const int tiles = min(end - tile, kRoundTiles), round_end = tile + tiles;
    Cursor next{tile, -kDecodeWarps + warp};
    next.advance(shape.pieces);
    Cursor now = next;
    Piece<kBases> pieces[kDeep];
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      if (next.tile < round_end) load_chunks(pieces[d], w, mine, next.tile, next.piece * kPieceChunks);
      next.advance(shape.pieces);
    }
    for (int i = static_cast<int>(threadIdx.x); i < tiles * kDecodeWarps * kRows * QBB_TILE_ROWS; i += kDecodeWarps * 32) {
      partial[i] = 0.0f;
    }
    if (!ready) {
      wait_for_previous_kernel();
      make_planes<kBits, kRows>(planes, steps, w, rows, chunks, warp, lane);
      ready = true;
    }
    __syncthreads();

    float sums[kRows][2] = {};
    int open = now.tile;
    const auto close = [&]() {  // the warp's part of a tile is complete
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float v = sums[r][i] * static_cast<float>(2 << (2 * (lane % 4)));
          v += __shfl_xor_sync(kAllLanes, v, 1);
          v += __shfl_xor_sync(kAllLanes, v, 2);
          if (lane % 4 == 0) {
            partial[(((open - tile) * kDecodeWarps + warp) * kRows + r) * QBB_TILE_ROWS + lane / 4 * 2 + i] = v;
          }
          sums[r][i] = 0.0f;
        }
      }
    };
    while (now.tile < round_end) {
#pragma unroll
      for (int d = 0; d < kDeep; ++d) {
        if (now.tile >= round_end) break;
        if (now.tile != open) {
          close();
          open = now.tile;
        }
        add_piece<kBases, kBits, kRows>(sums, pieces[d], now.piece * kPieceChunks, planes, steps, chunks, lane);
        if (next.tile < round_end) load_chunks(pieces[d], w, mine, next.tile, next.piece * kPieceChunks);
        next.advance(shape.pieces);
        now.advance(shape.pieces);
      }
    }
    if (open < round_end) close();
    let_next_kernel_start();
    __syncthreads();

    for (int i = static_cast<int>(threadIdx.x); i < tiles * kRows * QBB_TILE_ROWS; i += kDecodeWarps * 32) {
      const int n = i % QBB_TILE_ROWS, r = i / QBB_TILE_ROWS % kRows, at = i / QBB_TILE_ROWS / kRows;
      const int out = (tile + at) * QBB_TILE_ROWS + n;
      if (r >= rows.M || out >= w.N) continue;
      float sum = w.bias == nullptr ? 0.0f : w.bias[out];
      for (int v = 0; v < kDecodeWarps; ++v) sum += partial[((at * kDecodeWarps + v) * kRows + r) * QBB_TILE_ROWS + n];
      store_y(rows, static_cast<int64_t>(r) * w.N + out, sum);
    }
    __syncthreads();
  }
}

}  // namespace qbb::cuda
