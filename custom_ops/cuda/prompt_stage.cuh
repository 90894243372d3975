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

// Copies what a part needs of the weights, a chunk at a time, by the threads of a warpgroup. Addresses are multiples of 8, not
// always of 16.
template <int kBases>
struct WeightsCopy {
  static constexpr uint32_t kRow = QBB_TILE_ROWS * 4;
  static constexpr int kHalf = kPromptTiles / 2;  // of the tiles: a thread copies of two

  const char* words[2];             // of its tiles, the first basis
  const char *scales, *offsets;     // of its tile and its basis
  int thread, in_chunk;             // where in a chunk's words, in bytes
  bool has_scales;

  __device__ __forceinline__ WeightsCopy(const Weights& w, int first_tile, int own) : thread(own) {
    const int warp = own / 32, lane = own % 32;
    const auto tile_of = [&](int i) { return static_cast<int64_t>(min(first_tile + i, w.tiles - 1)); };
    in_chunk = lane / 8 * static_cast<int>(kRow);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[i] = reinterpret_cast<const char*>(w.planes) + tile_of(warp + i * kHalf) * w.tile_bytes + lane % 8 * 8;
    }
    has_scales = warp < kBases;
    scales = static_cast<const char*>(w.scales) + warp * w.scale_bytes + tile_of(lane / 4) * w.groups * (kRow / 2) + lane % 4 * 8;
    offsets = w.offset == nullptr || own >= kOffsetBytes / 8
                  ? nullptr
                  : reinterpret_cast<const char*>(w.offset) + tile_of(own / 8) * w.groups * kRow + own % 8 * 8;
  }

  __device__ __forceinline__ void start(char* to, const Weights& w, int chunk) const {
    // Past the last word some word is copied: X is 0 there.
    constexpr int kStep = kRow;
    const auto at = static_cast<uint32_t>(min(chunk * kChunkWords * kStep + in_chunk, w.tile_bytes - kStep));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* from = words[i] + at;
#pragma unroll
      for (int b = 0; b < kBases; ++b) {
        copy_async<8>(to + b * kWordBytes + i * kHalf * 256 + thread * 8, from);
        from += w.plane_bytes;
      }
    }
    to += kBases * kWordBytes;
    const auto group = static_cast<uint32_t>(min(chunk >> w.group_shift, w.groups - 1));
    if (has_scales) copy_async<8>(to + thread * 8, scales + group * (kRow / 2));
    if (offsets != nullptr) copy_async<8>(to + kBases * kScaleBytes + thread * 8, offsets + group * kRow);
  }
};

// Copies kTokens rows of X, of which there are `here`, a chunk at a time; 0 past their end. aligned: pieces of 8 inputs are.
// Pieces of 16 bytes change places within a row's 128 bytes, as the 128-byte swizzle wants it.
template <int kTokens>
struct RowsCopy {
  static constexpr int kPieces = 16, kStep = kWarpgroup / kPieces;  // of a row; rows at a time

  const uint16_t* from;
  int row, here, K, k, place;
  bool aligned;

  __device__ __forceinline__ RowsCopy(const uint16_t* x, int count, int inputs, bool in_pieces, int own)
      : here(count), K(inputs), aligned(in_pieces) {
    const int piece = own % kPieces;
    row = own / kPieces;
    k = piece * 8;
    from = x + static_cast<int64_t>(row) * K + k;
    place = piece / 8 * kTokens * kRowBytes + row * kRowBytes + (piece % 8 ^ row % 8) * 16;
  }

  __device__ __forceinline__ void start(char* stage, int chunk) const {
    const uint16_t* at = from + chunk * kChunk;
    char* to = stage + place;
    const int64_t stride = static_cast<int64_t>(kStep) * K;
    if (aligned) {
      const uint32_t address = shared_address(to);
      if (here == kTokens && (chunk + 1) * kChunk <= K) {
#pragma unroll 16
        for (int r = 0; r < kTokens; r += kStep) {
          copy_piece(address + static_cast<uint32_t>(r * kRowBytes), at, true);
          at += stride;
        }
        return;
      }
      const int end = chunk * kChunk + k < K ? here : 0;
#pragma unroll 8
      for (int r = 0; r < kTokens; r += kStep) {
        copy_piece(address + static_cast<uint32_t>(r * kRowBytes), at, row + r < end);
        at += stride;
      }
      return;
    }
    for (int r = 0; r < kTokens; r += kStep) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto bits = [&](int j) -> uint32_t { return row + r < here && chunk * kChunk + k + j < K ? at[j] : 0; };
        pairs[i] = bits(2 * i) | bits(2 * i + 1) << 16;
      }
      *reinterpret_cast<uint4*>(to + r * kRowBytes) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      at += stride;
    }
  }
};

#endif

}  // namespace qbb::cuda
