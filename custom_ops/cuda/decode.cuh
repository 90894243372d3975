// Few rows of X (decoding): a kernel that lives as long as one read of the weights.
//
// Each block owns some tiles of 16 rows of the matrix. Its warps take turns at pieces of 256 inputs of a tile, so that
// they read one stream together; each keeps the next pieces in flight (ring.cuh). The planes of X are made once for each
// block while the first weights are on their way. Sums of the warps meet in shared memory, in a fixed order. Two blocks
// fit a multiprocessor: the second one is the next kernel's, whose weights come while this one ends.
#pragma once

#include "cuda/planes.cuh"
#include "cuda/ring.cuh"

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

// Pieces in flight for each warp: enough bytes in all to wait for memory as one.
__host__ __device__ constexpr int decode_depth(int bases) { return bases == 1 ? 5 : bases == 2 ? 3 : 2; }

template <int kBases>
using DecodeRing = Ring<kBases, kPieceChunks>;

// Bytes of shared memory: ring, planes, steps with totals, sums.
inline size_t decode_memory(int words, int bases, int bits, int rows) {
  const size_t chunks = static_cast<size_t>(decode_shape(words).pieces) * kPieceChunks;
  const size_t piece = bases == 1   ? DecodeRing<1>::kPiece
                       : bases == 2 ? DecodeRing<2>::kPiece
                       : bases == 3 ? DecodeRing<3>::kPiece
                                    : DecodeRing<4>::kPiece;
  return kDecodeWarps * static_cast<size_t>(decode_depth(bases)) * piece * 4 +
         static_cast<size_t>(rows) * (chunks * (static_cast<size_t>(bits) * 16 + 8) + kRoundTiles * kDecodeWarps * 64);
}

// Where a warp is: its pieces are kDecodeWarps apart.
struct Cursor {
  int tile, piece, slot;

  template <int kDepth>
  __device__ __forceinline__ void advance(int pieces) {
    piece += kDecodeWarps;
    while (piece >= pieces) {
      piece -= pieces;
      ++tile;
    }
    slot = slot + 1 == kDepth ? 0 : slot + 1;
  }
};

// float16 scales; groups that are 2^n chunks, or whole rows; rows.M <= kRows.
template <int kBases, int kBits, int kRows>
__global__ void __launch_bounds__(kDecodeWarps * 32, 2) decode(const Weights w, const Rows rows) {
  let_next_kernel_start();
  using Pieces = DecodeRing<kBases>;
  constexpr int kDepth = decode_depth(kBases);
  uint4* memory = block_memory();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const DecodeShape shape = decode_shape(w.words);
  const int chunks = shape.pieces * kPieceChunks;
  auto* ring = reinterpret_cast<uint32_t*>(memory) + warp * kDepth * Pieces::kPiece;
  auto* planes = reinterpret_cast<uint32_t*>(memory) + kDecodeWarps * kDepth * Pieces::kPiece;
  auto* steps = reinterpret_cast<float2*>(planes + kRows * chunks * kBits * 4);
  auto* partial = reinterpret_cast<float*>(steps + kRows * chunks);  // [kRoundTiles][kDecodeWarps][kRows][16]

  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int first = share(static_cast<int>(blockIdx.x)), end = share(static_cast<int>(blockIdx.x) + 1);
  bool ready = false;
  for (int tile = first; tile < end; tile += kRoundTiles) {
    const int tiles = min(end - tile, kRoundTiles), round_end = tile + tiles;
    Cursor next{tile, -kDecodeWarps + warp, -1};
    next.advance<kDepth>(shape.pieces);
    Cursor now = next;
    const auto fetch = [&]() {
      if (next.tile < round_end) {
        Pieces::fetch(ring + next.slot * Pieces::kPiece, w, next.tile, next.piece * kPieceChunks, lane);
      }
      end_copies();  // a set each time, so that the oldest of kDepth sets is always the next piece
      next.advance<kDepth>(shape.pieces);
    };
    for (int d = 0; d < kDepth; ++d) fetch();
    for (int i = static_cast<int>(threadIdx.x); i < tiles * kDecodeWarps * kRows * QBB_TILE_ROWS; i += kDecodeWarps * 32) {
      partial[i] = 0.0f;
    }
    if (!ready) {
      wait_for_previous_kernel();
      make_planes<kBits, kRows, kDecodeWarps * 32>(planes, steps, w, rows, chunks, static_cast<int>(threadIdx.x));
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
    for (; now.tile < round_end; now.advance<kDepth>(shape.pieces)) {
      if (now.tile != open) {
        close();
        open = now.tile;
      }
      wait_for_copies<kDepth - 1>();
      const uint32_t* piece = ring + now.slot * Pieces::kPiece;
#pragma unroll
      for (int u = 0; u < kPieceChunks; ++u) {
        const Chunk<kBases> weights = Pieces::take(piece, w, u, lane);
        const int chunk = now.piece * kPieceChunks + u;
        const PlanesOfChunk<kBits, kRows> x(planes, steps, chunk, chunks, lane, chunk);
        add_chunk_of_planes<kBases, kBits, kRows>(sums, weights, x, lane);
      }
      __syncwarp();  // all lanes have read the piece
      fetch();
    }
    if (open < round_end) close();
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
