// Few rows of X (decoding) on Hopper and later: a kernel that lives as long as one read of the weights.
//
// Each block owns some tiles of 16 rows of the matrix and takes them stage by stage, 16 chunks of a tile at a time. One of
// its warps asks for the stages, in few large copies, as far ahead as shared memory allows; most multiply, a chunk of each
// stage; and one adds up their sums of a tile, in a fixed order, so that no other has to wait for that. Two blocks fit
// a multiprocessor: the second one is the next kernel's, whose ring fills while this one ends.
#pragma once

#include "cuda/barriers.cuh"
#include "cuda/planes.cuh"

namespace qbb::cuda {

constexpr int kBulkWarps = 16;                       // that multiply, each a chunk of a stage
constexpr int kBulkThreads = (kBulkWarps + 2) * 32;  // and one that copies, and one that adds up
constexpr int kStageChunks = kBulkWarps;
constexpr int kMostStages = 16;

// A stage in shared memory: [bases][16 chunks][4 words][16 rows], then [bases][16 groups at most][16] float16 scales, then as
// many float32 offsets where there are any.
__host__ __device__ constexpr int bulk_words() { return kStageChunks * kChunkWords * QBB_TILE_ROWS * 4; }  // bytes of a basis
__host__ __device__ constexpr int bulk_scales() { return kStageChunks * QBB_TILE_ROWS * 2; }
__host__ __device__ constexpr int bulk_stage(int bases, bool offset) {
  return bases * (bulk_words() + bulk_scales()) + (offset ? 2 * bulk_scales() : 0);
}

// Bytes of shared memory beside the stages: planes and steps of X, sums of two tiles, barriers.
inline int64_t bulk_fixed(int words, int bits, int rows) {
  const int64_t chunks = (words + kChunkWords - 1) / kChunkWords;
  return rows * (chunks * (bits * 16 + 8) + 2 * kBulkWarps * QBB_TILE_ROWS * 4) + (2 * kMostStages + 4) * 8;
}

// How many stages fit. Two blocks share a multiprocessor's memory (each costs 1 KB more), unless X is too long for that.
inline int bulk_stages(int words, int bases, bool offset, int bits, int rows, int64_t memory) {
  const int64_t fixed = bulk_fixed(words, bits, rows), stage = bulk_stage(bases, offset);
  int64_t fit = ((memory + 1024) / 2 - 1024 - fixed) / stage;
  if (fit < 3) fit = (memory - fixed) / stage;
  return static_cast<int>(fit < kMostStages ? fit : kMostStages);
}

inline size_t bulk_memory(int words, int bases, bool offset, int bits, int rows, int stages) {
  return static_cast<size_t>(bulk_fixed(words, bits, rows) + int64_t{stages} * bulk_stage(bases, offset));
}

// Where a ring of stages is.
struct Slot {
  int number = 0, parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++number == stages) {
      number = 0;
      parity ^= 1;
    }
  }
};

// Asks for chunks first .. first + 16 of a tile.
template <int kBases>
__device__ __forceinline__ void copy_stage(char* to, uint64_t* full, const Weights& w, int tile, int first) {
  const int word = first * kChunkWords, words = min(w.words - word, kStageChunks * kChunkWords);
  const int last = first + (words + kChunkWords - 1) / kChunkWords - 1;
  const int group = first >> w.group_shift, groups = min(last >> w.group_shift, w.groups - 1) - group + 1;
  const auto of_words = static_cast<uint32_t>(words * QBB_TILE_ROWS * 4);
  const auto of_scales = static_cast<uint32_t>(groups * QBB_TILE_ROWS * 2);
  arrive_expecting(full, kBases * (of_words + of_scales) + (w.offset != nullptr ? 2 * of_scales : 0));
  const char* planes = reinterpret_cast<const char*>(w.planes) + static_cast<int64_t>(tile) * w.tile_bytes +
                       int64_t{word} * (QBB_TILE_ROWS * 4);
  const int64_t at = static_cast<int64_t>(tile) * w.groups + group;
  const char* scales = static_cast<const char*>(w.scales) + at * (QBB_TILE_ROWS * 2);
#pragma unroll
  for (int b = 0; b < kBases; ++b) {
    copy_bulk(to + b * bulk_words(), planes + b * w.plane_bytes, of_words, full);
    copy_bulk(to + kBases * bulk_words() + b * bulk_scales(), scales + b * w.scale_bytes, of_scales, full);
  }
  if (w.offset != nullptr) {
    copy_bulk(to + kBases * (bulk_words() + bulk_scales()), w.offset + at * QBB_TILE_ROWS, 2 * of_scales, full);
  }
}

// Where a lane's part of its warp's chunk lies in each stage, in bytes.
template <int kBases>
struct PlaceInStage {
  int words, scales, offset;

  // A stage begins with a group, or all of it is of one.
  __device__ __forceinline__ PlaceInStage(const Weights& w, int warp, int lane) {
    const int group = warp >> w.group_shift;
    words = (warp * kChunkWords + lane % 4) * (QBB_TILE_ROWS * 4) + lane / 4 * 8;
    scales = kBases * bulk_words() + group * (QBB_TILE_ROWS * 2) + lane / 4 * 4;
    offset = kBases * (bulk_words() + bulk_scales()) + group * (QBB_TILE_ROWS * 4) + lane / 4 * 8;
  }

  __device__ __forceinline__ Chunk<kBases> take(const char* stage, bool has_offset) const {
    Chunk<kBases> to;
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      to.words[b] = *reinterpret_cast<const uint2*>(stage + words + b * bulk_words());
      to.scales[b] = *reinterpret_cast<const uint32_t*>(stage + scales + b * bulk_scales());
    }
    to.offset = has_offset ? *reinterpret_cast<const float2*>(stage + offset) : make_float2(0.0f, 0.0f);
    return to;
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBulkBlocks = 1;  // nothing is in it there
#else
constexpr int kBulkBlocks = 2;  // that fit a multiprocessor
#endif

// float16 scales; groups that are 2^n chunks, or whole rows; rows.M <= kRows; rows.block stages.
template <int kBases, int kBits, int kRows>
__global__ void __launch_bounds__(kBulkThreads, kBulkBlocks) decode_bulk(const Weights w, const Rows rows) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), warp = uniform(thread / 32), lane = thread % 32;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords, steps_of_tile = (chunks + kStageChunks - 1) / kStageChunks;
  const int stage_bytes = bulk_stage(kBases, w.offset != nullptr), stages = rows.block;
  auto* full = reinterpret_cast<uint64_t*>(block_memory());
  uint64_t *empty = full + kMostStages, *summed = empty + kMostStages, *taken = summed + 2;
  char* ring = reinterpret_cast<char*>(taken + 2);
  auto* planes = reinterpret_cast<uint32_t*>(ring + stages * stage_bytes);
  auto* steps = reinterpret_cast<float2*>(planes + kRows * chunks * kBits * 4);
  auto* partial = reinterpret_cast<float*>(steps + kRows * chunks);  // [2][kBulkWarps][kRows][16]
  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int first = share(static_cast<int>(blockIdx.x)), end = share(static_cast<int>(blockIdx.x) + 1);
  if (thread == 0) {
    for (int s = 0; s < stages; ++s) {
      init_barrier(&full[s], 1);
      init_barrier(&empty[s], kBulkWarps * 32);  // all that read
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&summed[i], kBulkWarps * 8);  // all that store sums
      init_barrier(&taken[i], 32);               // all that read them
    }
    show_barriers();
  }
  __syncthreads();
  if (warp == kBulkWarps) {
    const bool elected = elect_lane();
    Slot slot{0, 1};
    for (int tile = first, asked = 0; tile < end; ++tile) {
      for (int step = 0; step < steps_of_tile; ++step, ++asked) {
        if (asked >= stages) wait_for(&empty[slot.number], slot.parity);
        if (elected) copy_stage<kBases>(ring + slot.number * stage_bytes, &full[slot.number], w, tile, step * kStageChunks);
        slot.advance(stages);
      }
    }
    return;
  }

  wait_for_previous_kernel();
  const auto sums_of = [&](int tile) { return partial + (tile - first) % 2 * (kBulkWarps * kRows * QBB_TILE_ROWS); };
  if (warp > kBulkWarps) {
    constexpr int kHalf = kBulkWarps / 2;  // of the warps: a lane adds up those of one half for an output
    for (int tile = first; tile < end; ++tile) {
      const int turn = tile - first;
      wait_for(&summed[turn % 2], turn / 2 % 2);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float* from = sums_of(tile) + lane / QBB_TILE_ROWS * kHalf * kRows * QBB_TILE_ROWS;
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < kHalf; ++v) sum += from[(v * kRows + r) * QBB_TILE_ROWS + lane % QBB_TILE_ROWS];
        sum += __shfl_xor_sync(kAllLanes, sum, QBB_TILE_ROWS);
        const int out = tile * QBB_TILE_ROWS + lane;
        if (lane >= QBB_TILE_ROWS || r >= rows.M || out >= w.N) continue;
        store_y(rows, static_cast<int64_t>(r) * w.N + out, w.bias == nullptr ? sum : sum + w.bias[out]);
      }
      arrive(&taken[turn % 2]);
    }
    return;
  }

  make_planes<kBits, kRows, kBulkWarps * 32>(planes, steps, w, rows, chunks, thread);
  sync_threads(1, kBulkWarps * 32);
  const PlaceInStage<kBases> place(w, warp, lane);
  const bool has_offset = w.offset != nullptr;
  const char* stage = ring;
  Slot slot;
  for (int tile = first; tile < end; ++tile) {
    float sums[kRows][2] = {};
    for (int chunk = warp; chunk < steps_of_tile * kStageChunks; chunk += kStageChunks) {
      if (chunk < chunks) {
        const PlanesOfChunk<kBits, kRows> x(planes, steps, chunk, chunks, lane, warp);
        wait_for(&full[slot.number], slot.parity);
        add_chunk_of_planes<kBases, kBits, kRows>(sums, place.take(stage, has_offset), x, lane);
      } else {
        wait_for(&full[slot.number], slot.parity);  // so that no warp is a whole round of stages ahead
      }
      arrive(&empty[slot.number]);
      stage += stage_bytes;
      slot.advance(stages);
      if (slot.number == 0) stage = ring;
    }
    const int turn = tile - first;
    if (turn >= 2) wait_for(&taken[turn % 2], turn / 2 % 2 ^ 1);
    float* of_warp = sums_of(tile) + warp * kRows * QBB_TILE_ROWS;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v = sums[r][i] * static_cast<float>(2 << (2 * (lane % 4)));
        v += __shfl_xor_sync(kAllLanes, v, 1);
        v += __shfl_xor_sync(kAllLanes, v, 2);
        if (lane % 4 == 0) of_warp[r * QBB_TILE_ROWS + lane / 4 * 2 + i] = v;
      }
    }
    if (lane % 4 == 0) arrive(&summed[turn % 2]);
  }
#endif
}

}  // namespace qbb::cuda
