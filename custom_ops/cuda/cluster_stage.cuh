// Shared memory of cluster.cuh, and what brings X and weights there.
#pragma once

#include "cuda/cluster_piece.cuh"

namespace qbb::cuda {

constexpr int kWarpgroupThreads = 128;

// What was found to be fast, and may be changed.
template <int kWarpgroupsOfPlan, int kStagesOfPlan, int kPieceOfPlan, int kBlocksOfPlan>
struct ClusterPlan {
  static constexpr int kWarpgroups = kWarpgroupsOfPlan;  // that multiply; one more copies weights
  static constexpr int kStages = kStagesOfPlan;          // pieces of weights on their way or in use
  static constexpr int kPiece = kPieceOfPlan;            // chunks of a piece
  static constexpr int kBlocks = kBlocksOfPlan;          // that fit a multiprocessor
  static constexpr int kMultiply = kWarpgroups * kWarpgroupThreads, kThreads = kMultiply + kWarpgroupThreads;
  // Registers of a thread: at first, of one that copies, of one that multiplies. They are exchanged where that gains some.
  static constexpr int kEqual = 65536 / kBlocks / kThreads / 8 * 8, kFew = kBlocks == 1 ? 56 : 32;
  static constexpr int kMany = (kEqual * kThreads - kFew * kWarpgroupThreads) / kMultiply / 8 * 8;
  static constexpr bool kExchange = kEqual < kMany && kMany <= 240;
  // A warpgroup that has a stage has it every time: it must not ask for one whose last copy somebody else waits for.
  static_assert(kPiece % 2 == 0 && kStages % kWarpgroups == 0, "");
};

// For `cluster` as it is launched: as many stages as leave room for X, as many warpgroups as leave registers for sums.
template <int kTokens, int kBases>
struct UsualPlan {
  using Plan = ClusterPlan<3, 6, 4, 1>;
};
template <>
struct UsualPlan<8, 4> {
  using Plan = ClusterPlan<4, 8, 2, 1>;
};
template <>
struct UsualPlan<16, 4> {
  using Plan = ClusterPlan<2, 4, 4, 1>;
};
template <int kBases>
struct UsualPlan<32, kBases> {
  using Plan = ClusterPlan<2, 8, 2, 1>;
};
template <int kBases>
struct UsualPlan<64, kBases> {
  using Plan = ClusterPlan<kBases < 4 ? 2 : 1, 4, 2, 1>;
};

// Where things are, in bytes: stages; sums of all warpgroups of the cluster, twice; levels of each warp; barriers; X
// [chunks of a block][...], see cluster_bits.cuh and cluster_halves.cuh; numbers [chunks][kTokens] of X, if any. A stage: words
// [kBases][4 tiles][kPiece][4][16], float16 scales [kBases][4][kPiece][16], offsets [4][kPiece][16].
template <class How, int kBases, class Plan>
struct ClusterMemory {
  static constexpr int kTokens = How::kTokens;
  static constexpr int kChunks = Plan::kPiece;  // of a stage
  static constexpr int kChunkBytes = kTokens * kChunk * How::kInputBytes;
  static constexpr int kTileWords = Plan::kPiece * kChunkWords * QBB_TILE_ROWS * 4;
  static constexpr int kTileScales = Plan::kPiece * QBB_TILE_ROWS * 2;
  static constexpr int kTileOffsets = Plan::kPiece * QBB_TILE_ROWS * 4;
  static constexpr int kScales = kBases * kClusterTiles * kTileWords;  // in a stage
  static constexpr int kOffsets = kScales + kBases * kClusterTiles * kTileScales;
  static constexpr int kStage = kOffsets + kClusterTiles * kTileOffsets;
  static constexpr int kSumBytes = Plan::kMultiply * kTokens / 2 * 4;
  static constexpr int kSums = Plan::kStages * kStage;
  static constexpr int kLevels = kSums + 2 * kSumBytes;
  static constexpr int kBarriers =
      kLevels + (How::kTables ? Plan::kWarpgroups * kClusterTiles * Plan::kPiece * QBB_TILE_ROWS * 16 : 0);
  static constexpr int kAlign = 1024;
  static constexpr int kX = (kBarriers + (2 * Plan::kStages + 2) * 8 + kAlign - 1) / kAlign * kAlign;

  // Of `block` chunks of X, and room to align all.
  static __host__ __device__ constexpr int64_t bytes(int block) {
    return kX + int64_t{block} * (kChunkBytes + (How::kNumbers ? kTokens * 8 : 0)) + kAlign;
  }
};

// The chunks of a block: whole pieces, so that X is 0 where the last one has no more weights.
template <class Plan>
__host__ __device__ constexpr int cluster_block(int words, int cluster) {
  const int chunks = (words + kChunkWords - 1) / kChunkWords, each = (chunks + cluster - 1) / cluster;
  return (each + Plan::kPiece - 1) / Plan::kPiece * Plan::kPiece;
}

#if QBB_WARPGROUP_PRODUCTS

// Copies weights of a tile of a set, a piece at a time.
template <class Memory, int kBases>
struct TileCopy {
  const char *words, *scales, *offsets;  // of the tile's first basis
  int tile;                              // of the set

  static constexpr int kWordBytes = QBB_TILE_ROWS * 4, kScaleBytes = QBB_TILE_ROWS * 2, kOffsetBytes = QBB_TILE_ROWS * 4;

  __device__ __forceinline__ TileCopy(const Weights& w, int set, int of_set) : tile(of_set) {
    const int64_t at = min(set * kClusterTiles + tile, w.tiles - 1);
    words = reinterpret_cast<const char*>(w.planes) + at * w.tile_bytes;
    scales = static_cast<const char*>(w.scales) + at * w.groups * kScaleBytes;
    offsets = reinterpret_cast<const char*>(w.offset) + at * w.groups * kOffsetBytes;
  }

  // Chunks first .. end to the stage `to`.
  __device__ __forceinline__ void start(char* to, uint64_t* full, const Weights& w, int first, int end) const {
    const uint32_t word_bytes = static_cast<uint32_t>(min(end * kChunkWords, w.words) - first * kChunkWords) * kWordBytes;
    const int group = min(first >> w.group_shift, w.groups - 1);
    const auto count = static_cast<uint32_t>(min((end - 1) >> w.group_shift, w.groups - 1) - group + 1);
    const uint32_t scale_bytes = count * kScaleBytes, offset_bytes = w.offset == nullptr ? 0 : count * kOffsetBytes;
    arrive_expecting(full, kBases * (word_bytes + scale_bytes) + offset_bytes);
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      const int place = b * kClusterTiles + tile;
      const char* from = words + b * w.plane_bytes + first * (kChunkWords * kWordBytes);
      copy_bulk(to + place * Memory::kTileWords, from, word_bytes, full);
      from = scales + b * w.scale_bytes + group * kScaleBytes;
      copy_bulk(to + Memory::kScales + place * Memory::kTileScales, from, scale_bytes, full);
    }
    if (offset_bytes == 0) return;
    copy_bulk(to + Memory::kOffsets + tile * Memory::kTileOffsets, offsets + group * kOffsetBytes, offset_bytes, full);
  }
};

// Rows row .. row + kTokens of X, chunks first .. end, as products want them; then zeros up to `block` chunks.
template <class How, int kThreads>
__device__ __forceinline__ void stage_rows(char* to, float2* numbers, const Weights& w, const Rows& rows, int row, int first,
                                           int end, int block, int thread) {
  constexpr int kTokens = How::kTokens, kRaw = How::kRawPieces;
  const bool aligned = w.K % (rows.type == kFloat32 ? 4 : 8) == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
  const int here = min(rows.M - row, kTokens), items = block * kTokens * kChunkWords;
  const auto load = [&](uint4 (&raw)[kRaw], int i) {
    const int token = i / kChunkWords % kTokens, chunk = first + i / kChunkWords / kTokens;
#pragma unroll
    for (int v = 0; v < kRaw; ++v) raw[v] = make_uint4(0, 0, 0, 0);
    if (token < here && chunk < end) {
      How::load(raw, rows, row + token, chunk * kChunk + i % kChunkWords * QBB_WORD_BITS, w.K, aligned);
    }
  };
  uint4 raw[kRaw];
  if (thread < items) load(raw, thread);
  for (int i = thread; i < items; i += kThreads) {
    uint4 now[kRaw];
#pragma unroll
    for (int v = 0; v < kRaw; ++v) now[v] = raw[v];
    if (i + kThreads < items) load(raw, i + kThreads);
    const int place = i / kChunkWords, chunk = place / kTokens;
    How::stage(to + chunk * kTokens * kChunk * How::kInputBytes, numbers + place, now, rows.type, place % kTokens,
               i % kChunkWords);
  }
}

#endif

}  // namespace qbb::cuda
