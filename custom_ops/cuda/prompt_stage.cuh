// Chunks of X, and of the weights that meet them, on their way into shared memory for `prompt.cuh`.
#pragma once

#include "cuda/device.cuh"
#include "cuda/warpgroup.cuh"

namespace qbb::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPromptTiles = 8;  // of 16 outputs: four for each of two warpgroups
constexpr int kRowBytes = 128;   // of a row of half a chunk of X, which is as far as the swizzle goes

// Chunks on their way or in use: as many as fit.
template <int kTokens>
constexpr int kPromptStages = kTokens <= 128 ? 5 : 3;

// Shared memory: X of all stages, each two halves of a chunk; then weights of all stages, each
// words [bases, tiles, 4, 16], float16 scales [bases, tiles, 16], offsets [tiles, 16].
template <int kTokens>
constexpr int kStageBytes = kTokens * 2 * kRowBytes;

constexpr int kWordBytes = kPromptTiles * kChunkWords * QBB_TILE_ROWS * 4;  // of a basis
constexpr int kScaleBytes = kPromptTiles * QBB_TILE_ROWS * 2;
constexpr int kOffsetBytes = kPromptTiles * QBB_TILE_ROWS * 4;

template <int kBases>
constexpr int kStageWeights = kBases * (kWordBytes + kScaleBytes) + kOffsetBytes;

template <int kTokens>
constexpr size_t kPromptMemory = size_t{kPromptStages<kTokens>} * (kStageBytes<kTokens> + kStageWeights<4>) +
                                 1024;  // and room to align it

#if QBB_WARPGROUP_PRODUCTS

// `thread` of the warpgroup that copies; `to`: a stage's weights. Their addresses are multiples of 8, not always of 16.
template <int kBases>
__device__ __forceinline__ void copy_weights(char* to, const Weights& w, int first_tile, int chunk, int thread) {
  constexpr uint32_t kRow = QBB_TILE_ROWS * 4;
  const int warp = thread / 32, lane = thread % 32;
  const auto tile_of = [&](int i) { return min(first_tile + i, w.tiles - 1); };
  const auto part_of_tile = [&](int i, uint32_t bytes) {
    const int group = min(chunk >> w.group_shift, w.groups - 1);
    return static_cast<uint32_t>(tile_of(i) * w.groups + group) * bytes;
  };
  // Past the last word some word is copied: X is 0 there.
  const uint32_t word = static_cast<uint32_t>(min(chunk * kChunkWords + lane / 8, w.words - 1));
#pragma unroll
  for (int i = 0; i < kPromptTiles; i += 4) {
    const uint32_t at = static_cast<uint32_t>(tile_of(warp + i)) * static_cast<uint32_t>(w.tile_bytes) + word * kRow +
                        static_cast<uint32_t>(lane % 8 * 8);
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      copy_async<8>(to + b * kWordBytes + i * 256 + thread * 8,
                reinterpret_cast<const char*>(w.planes) + b * w.plane_bytes + at);
    }
  }
  to += kBases * kWordBytes;
  if (warp < kBases) {
    copy_async<8>(to + thread * 8, static_cast<const char*>(w.scales) + warp * w.scale_bytes +
                                                          part_of_tile(lane / 4, kRow / 2) + lane % 4 * 8);
  }
  to += kBases * kScaleBytes;
  if (w.offset != nullptr && thread < kOffsetBytes / 8) {
    copy_async<8>(to + thread * 8,
              reinterpret_cast<const char*>(w.offset) + part_of_tile(thread / 8, kRow) + thread % 8 * 8);
  }
}

// A chunk of X, 0 past its end; x: the block's first row, of which there are `here`. aligned: pieces of 8 inputs are.
// Pieces of 16 bytes change places within a row's 128 bytes, as the 128-byte swizzle wants it.
template <int kTokens>
__device__ __forceinline__ void copy_rows(char* to, const uint16_t* x, int chunk, int here, int K, bool aligned,
                                          int thread) {
  constexpr int kPieces = 16, kStep = kWarpgroup / kPieces;  // of a row; rows at a time
  const int piece = thread % kPieces, row = thread / kPieces, k = chunk * kChunk + piece * 8;
  to += piece / 8 * kTokens * kRowBytes + row * kRowBytes + (piece % 8 ^ row % 8) * 16;
  const uint16_t* from = x + static_cast<int64_t>(row) * K + k;
  if (aligned) {
    const int end = k < K ? here : 0;
    const uint32_t address = shared_address(to);
    const int64_t stride = static_cast<int64_t>(kStep) * K;
#pragma unroll 8
    for (int r = 0; r < kTokens; r += kStep) {
      copy_piece(address + static_cast<uint32_t>(r * kRowBytes), from, row + r < end);
      from += stride;
    }
    return;
  }
  for (int r = 0; r < kTokens; r += kStep) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto bits = [&](int j) -> uint32_t { return row + r < here && k + j < K ? from[j] : 0; };
      pairs[i] = bits(2 * i) | bits(2 * i + 1) << 16;
    }
    *reinterpret_cast<uint4*>(to + r * kRowBytes) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    from += static_cast<int64_t>(kStep) * K;
  }
}

#endif

}  // namespace qbb::cuda
