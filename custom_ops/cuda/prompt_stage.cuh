// Chunks of X, and of the weights that meet them, on their way into shared memory for `prompt.cuh`.
#pragma once

#include "cuda/device.cuh"
#include "cuda/warpgroup.cuh"

namespace qbb::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPromptTiles = 8;  // of 16 outputs: four for each of two warpgroups, a pair
constexpr int kPairTiles = 2 * kPromptTiles;
constexpr int kRowBytes = 128;   // of a row of half a chunk of X, which is as far as the swizzle goes

// Pairs of warpgroups that multiply; they take turns at the chunks. Where sums leave registers for it, two pairs make weights
// faster than one, which waits for each of its look-ups.
template <int kTokens>
constexpr int kPairs = kTokens == 64 ? 2 : 1;
template <int kTokens>
constexpr int kPromptMultiply = kPairs<kTokens> * 2 * kWarpgroup;
template <int kTokens>
constexpr int kPromptThreads = kPromptMultiply<kTokens> + kWarpgroup;
template <int kTokens>
constexpr int kPairSums = kPairs<kTokens> == 1 ? 0 : 2 * kWarpgroup * kTokens / 2 * 4;  // bytes that pass from pair to pair

// Chunks on their way or in use: as many as fit.
template <int kTokens>
constexpr int kPromptStages = kTokens == 64 ? 6 : kTokens == 128 ? 5 : 3;

// Shared memory: X of all stages, each two halves of a chunk; then weights of all stages, each
// words [bases, tiles, 4, 16], float16 scales [bases, tiles, 16], offsets [tiles, 16]; then sums of a pair of warpgroups.
template <int kTokens>
constexpr int kStageBytes = kTokens * 2 * kRowBytes;

constexpr int kWordBytes = kPromptTiles * kChunkWords * QBB_TILE_ROWS * 4;  // of a basis
constexpr int kScaleBytes = kPromptTiles * QBB_TILE_ROWS * 2;
constexpr int kOffsetBytes = kPromptTiles * QBB_TILE_ROWS * 4;

template <int kBases>
constexpr int kStageWeights = kBases * (kWordBytes + kScaleBytes) + kOffsetBytes;

template <int kTokens>
constexpr size_t kPromptMemory = size_t{kPromptStages<kTokens>} * (kStageBytes<kTokens> + kStageWeights<4>) +
                                 kPairSums<kTokens> + 1024 + 8 * (2 * kPromptStages<kTokens> + 1);  // room to align it, barriers

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

// A chunk of X, 0 past its end, to both blocks of a pair: of kTokens rows from `row` on the half that is this block's.
// `to` and `full` are at the same place in both.
template <int kTokens>
__device__ __forceinline__ void copy_rows(char* to, const CUtensorMap* x, int chunk, int row, int rank, uint64_t* full) {
  constexpr int kHalf = kTokens / 2, kInputs = kRowBytes / 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = rank % 2 * kHalf;
    copy_box(to + (i * kTokens + from) * kRowBytes, x, chunk * kChunk + i * kInputs, row + from, full, rank / 2 * 2);
  }
}

#endif

}  // namespace qbb::cuda
