// Few rows of X (decoding) on Hopper and later: a kernel that lives as long as one read of the weights.
//
// Each block owns some tiles of 16 rows of the matrix and takes them stage by stage, 16 chunks of a tile at a time. One of
// its warps asks for the stages, in few large copies, as far ahead as shared memory allows; the others multiply, two chunks
// of a stage each, and add up their sums of a tile in a fixed order. Two blocks fit a multiprocessor: the second one is the
// next kernel's, whose ring fills while this one ends, or, where there is much to read, another one of this kernel.
#pragma once

#include "cuda/barriers.cuh"
#include "cuda/planes.cuh"

namespace qbb::cuda {

constexpr int kBulkWarps = 8;                        // that multiply
constexpr int kBulkThreads = (kBulkWarps + 1) * 32;  // and one that copies
constexpr int kStageChunks = 16;
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
  return rows * (chunks * (bits * 16 + 8) + 2 * kBulkWarps * QBB_TILE_ROWS * 4) + 2 * kMostStages * 8;
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

// Blocks: one for each multiprocessor, or two where they take their tiles as evenly and read more than one ring holds.
inline int bulk_blocks(int words, int tiles, int stages, int multiprocessors) {
  const auto turns = [&](int blocks) { return (tiles + blocks - 1) / blocks; };
  const int once = tiles < multiprocessors ? tiles : multiprocessors;
  const int twice = tiles < 2 * multiprocessors ? tiles : 2 * multiprocessors;
  const int steps = (words + kStageChunks * kChunkWords - 1) / (kStageChunks * kChunkWords);
  const bool even = 20 * turns(once) * once >= 19 * turns(twice) * twice;
  return even && turns(twice) * steps > stages ? twice : once;
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

// A lane's part of one chunk of a stage; `group` counts from the stage's first.
template <int kBases>
__device__ __forceinline__ Chunk<kBases> take_chunk(const char* stage, const Weights& w, int chunk, int group, int lane) {
  const char* words = stage + (chunk * kChunkWords + lane % 4) * (QBB_TILE_ROWS * 4) + lane / 4 * 8;
  const char* scales = stage + kBases * bulk_words() + group * (QBB_TILE_ROWS * 2) + lane / 4 * 4;
  Chunk<kBases> to;
#pragma unroll
  for (int b = 0; b < kBases; ++b) {
    to.words[b] = *reinterpret_cast<const uint2*>(words + b * bulk_words());
    to.scales[b] = *reinterpret_cast<const uint32_t*>(scales + b * bulk_scales());
  }
  to.offset = make_float2(0.0f, 0.0f);
  if (w.offset != nullptr) {
    to.offset = *reinterpret_cast<const float2*>(stage + kBases * (bulk_words() + bulk_scales()) +
                                                 group * (QBB_TILE_ROWS * 4) + lane / 4 * 8);
  }
  return to;
}

// float16 scales; groups that are 2^n chunks, or whole rows; rows.M <= kRows; rows.block stages.
template <int kBases, int kBits, int kRows>
__global__ void __launch_bounds__(kBulkThreads, 2) decode_bulk(const Weights w, const Rows rows) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords, steps_of_tile = (chunks + kStageChunks - 1) / kStageChunks;
  const int stage_bytes = bulk_stage(kBases, w.offset != nullptr), stages = rows.block;
  auto* full = reinterpret_cast<uint64_t*>(block_memory());
  uint64_t* empty = full + kMostStages;
  char* ring = reinterpret_cast<char*>(empty + kMostStages);
  auto* planes = reinterpret_cast<uint32_t*>(ring + stages * stage_bytes);
  auto* steps = reinterpret_cast<float2*>(planes + kRows * chunks * kBits * 4);
  auto* partial = reinterpret_cast<float*>(steps + kRows * chunks);  // [2][kBulkWarps][kRows][16]
  const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(w.tiles) * i / gridDim.x); };
  const int first = share(static_cast<int>(blockIdx.x)), end = share(static_cast<int>(blockIdx.x) + 1);
  if (thread == 0) {
    for (int s = 0; s < stages; ++s) {
      init_barrier(&full[s], 1);
      init_barrier(&empty[s], kBulkWarps);
    }
    show_barriers();
  }
  __syncthreads();
  if (warp == kBulkWarps) {
    if (lane != 0) return;
    Slot slot{0, 1};
    for (int tile = first, asked = 0; tile < end; ++tile) {
      for (int step = 0; step < steps_of_tile; ++step, ++asked) {
        if (asked >= stages) wait_for(&empty[slot.number], slot.parity);
        copy_stage<kBases>(ring + slot.number * stage_bytes, &full[slot.number], w, tile, step * kStageChunks);
        slot.advance(stages);
      }
    }
    return;
  }

  wait_for_previous_kernel();
  make_planes<kBits, kRows, kBulkWarps * 32>(planes, steps, w, rows, chunks, thread);
  sync_threads(1, kBulkWarps * 32);
  Slot slot;
  for (int tile = first; tile < end; ++tile) {
    float sums[kRows][2] = {};
    for (int step = 0; step < steps_of_tile; ++step) {
      const int chunk = step * kStageChunks + warp, group = (step * kStageChunks) >> w.group_shift;
      const char* stage = ring + slot.number * stage_bytes;
      const auto add = [&](int here) {
        const int of_group = min((step * kStageChunks + here) >> w.group_shift, w.groups - 1) - group;
        const Chunk<kBases> weights = take_chunk<kBases>(stage, w, here, of_group, lane);
        add_chunk_of_planes<kBases, kBits, kRows>(sums, weights, step * kStageChunks + here, planes, steps, chunks, lane);
      };
      wait_for(&full[slot.number], slot.parity);
      if (chunk + kBulkWarps < chunks) {
        add(warp);
        add(warp + kBulkWarps);
      } else if (chunk < chunks) {
        add(warp);
      }
      __syncwarp();  // all lanes have read the stage
      if (lane == 0) arrive(&empty[slot.number]);
      slot.advance(stages);
    }
    float* of_warps = partial + (tile - first) % 2 * (kBulkWarps * kRows * QBB_TILE_ROWS);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v = sums[r][i] * static_cast<float>(2 << (2 * (lane % 4)));
        v += __shfl_xor_sync(kAllLanes, v, 1);
        v += __shfl_xor_sync(kAllLanes, v, 2);
        if (lane % 4 == 0) of_warps[(warp * kRows + r) * QBB_TILE_ROWS + lane / 4 * 2 + i] = v;
      }
    }
    sync_threads(1, kBulkWarps * 32);
    if (warp != (tile - first) % kBulkWarps) continue;  // it stores; the others go on
    for (int i = lane; i < kRows * QBB_TILE_ROWS; i += 32) {
      const int out = tile * QBB_TILE_ROWS + i % QBB_TILE_ROWS, r = i / QBB_TILE_ROWS;
      if (r >= rows.M || out >= w.N) continue;
      float sum = w.bias == nullptr ? 0.0f : w.bias[out];
#pragma unroll
      for (int v = 0; v < kBulkWarps; ++v) sum += of_warps[v * kRows * QBB_TILE_ROWS + i];
      store_y(rows, static_cast<int64_t>(r) * w.N + out, sum);
    }
  }
#endif
}

}  // namespace qbb::cuda
