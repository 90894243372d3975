// Many rows of X (prompts), float16, on Hopper: weights made float16 in registers are one operand of the warpgroup's
// matrix product, X in shared memory is the other.
//
// A block makes 128 outputs for kTokens rows of X at a time. One of its warpgroups copies X, as it is, and packed weights
// into shared memory, a few chunks ahead, also of the next outputs while the last ones are stored. A pair of them, or two that
// take turns at the chunks, makes weights in the order of X and multiplies.
//
// Two blocks make neighbouring outputs for the same rows of X, and each copies half of these rows for both: blocks on their
// own would ask the second-level cache for more than it can give. Where there are too few parts for all multiprocessors, pairs
// of a cluster share a part: each takes a slice of the inputs, and they exchange their sums at the end.
#pragma once

#include "cuda/levels.cuh"
#include "cuda/prompt_stage.cuh"

namespace qbb::cuda {

// Parts of 256 outputs and so many rows of X; a pair of blocks makes one after the other.
__host__ __device__ inline int64_t prompt_parts(int tiles, int64_t M, int tokens) {
  return (tiles + kPairTiles - 1) / kPairTiles * ((M + tokens - 1) / tokens);
}

#if QBB_WARPGROUP_PRODUCTS

// Which 256 outputs and which kTokens rows are a part's. Parts made at a time have consecutive numbers: they should read
// few different weights and few different rows of X, so that the L2 cache serves most of it.
template <int kTokens>
__device__ __forceinline__ int2 place_of(int part, int tiles, int M) {
  constexpr int kHigh = 2048 / kTokens;  // parts with the same outputs before the next outputs
  const int outputs = (tiles + kPairTiles - 1) / kPairTiles, all = (M + kTokens - 1) / kTokens;
  const int first = part / (outputs * kHigh) * kHigh, high = min(all - first, kHigh), rest = part - first * outputs;
  return make_int2(rest / high, first + rest % high);
}

// Levels of two neighbouring outputs, by bases kFrom .. kFrom + kPart. `scales`: a basis's first of the two.
template <int kFrom, int kPart>
__device__ __forceinline__ void load_levels(Levels (&to)[2], const char* scales, float2 z, float inverse) {
  float s0[kPart], s1[kPart];
#pragma unroll
  for (int b = 0; b < kPart; ++b) {
    const float2 s = to_floats(*reinterpret_cast<const uint32_t*>(scales + (kFrom + b) * kScaleBytes));
    s0[b] = s.x * inverse;
    s1[b] = s.y * inverse;
  }
  to[0] = make_levels<kPart>(s0, z.x);
  to[1] = make_levels<kPart>(s1, z.y);
}

// Operands of the four products of half a chunk. `words`: the first basis's first word of the first output.
template <int kFrom, int kPart>
__device__ __forceinline__ void make_weights(uint32_t (&a)[4][4], const Levels (&levels)[2], const char* words,
                                             uint32_t turn) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t w0[kPart], w1[kPart];
#pragma unroll
    for (int b = 0; b < kPart; ++b) {
      const auto pair = *reinterpret_cast<const uint2*>(words + (kFrom + b) * kWordBytes + i * QBB_TILE_ROWS * 4);
      w0[b] = pair.x;
      w1[b] = pair.y;
    }
    const uint32_t c0 = codes_in_order<kPart>(w0, turn), c1 = codes_in_order<kPart>(w1, turn);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      look_up_in_order<kPart>(a[2 * i][2 * h], a[2 * i + 1][2 * h], levels[0], c0, h);
      look_up_in_order<kPart>(a[2 * i][2 * h + 1], a[2 * i + 1][2 * h + 1], levels[1], c1, h);
    }
  }
}

// Results of a thread: outputs `out` and the next one of each eighth row, and of the row after it. y: the part's first
// row, of which there are `here`; eights first .. end of them. A warp writes 32 bytes at a time of four rows: whole sectors.
template <int kTokens>
__device__ __forceinline__ void store_results(__half* y, const float (&sums)[kTokens / 2], float unit, float2 bias, int out,
                                              int here, int N, int lane, int first, int end) {
  const int row = lane % 4 * 2;
  y += static_cast<int64_t>(row) * N + out;
  const auto each = [&](auto store) {
    __half* to = y;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const __half2 pair = __floats2half2_rn(fmaf(sums[4 * n + i], unit, bias.x), fmaf(sums[4 * n + 2 + i], unit, bias.y));
        if (n * 8 + row + i < here && first <= n && n < end) store(to + i * N, pair);
      }
      to += static_cast<int64_t>(8) * N;
    }
  };
  if (out + 1 < N && N % 2 == 0 && reinterpret_cast<uintptr_t>(y) % 4 == 0) {
    each([](__half* to, __half2 pair) { *reinterpret_cast<__half2*>(to) = pair; });
  } else {
    each([&](__half* to, __half2 pair) {
      if (out < N) to[0] = __low2half(pair);
      if (out + 1 < N) to[1] = __high2half(pair);
    });
  }
}

// Of `slices` blocks that share a part, which one finishes rows 8n .. 8n + 8; and the first n of block `slice`.
template <int kTokens>
__device__ __forceinline__ int finisher_of(int n, int slices) { return n * slices / (kTokens / 8); }
template <int kTokens>
__device__ __forceinline__ int first_of(int slice, int slices) { return (slice * (kTokens / 8) + slices - 1) / slices; }

// Adds the second pair's sums to the first one's.
template <int kTokens>
__device__ __forceinline__ void add_pair(float (&sums)[kTokens / 2], char* of_pair, int pair, int thread) {
  auto* to = reinterpret_cast<float4*>(of_pair) + thread;
  hold(sums);
  if (pair == 1) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      to[n * 2 * kWarpgroup] = make_float4(sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]);
    }
  }
  sync_threads(1, kPromptMultiply<kTokens>);
  if (pair == 0) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      const float4 v = to[n * 2 * kWarpgroup];
      sums[4 * n] += v.x, sums[4 * n + 1] += v.y, sums[4 * n + 2] += v.z, sums[4 * n + 3] += v.w;
    }
  }
  sync_threads(1, kPromptMultiply<kTokens>);  // their memory is free
}

// Bytes of the sums of two warpgroups for eight rows.
constexpr int kEightSums = 2 * kWarpgroup * 16;

// Sends sums to the blocks that finish them, `received` [slices][eights of a block][threads], and adds up this one's, slice by
// slice. A cluster's blocks are in pairs: this one is 2 * slice + rank % 2.
template <int kTokens>
__device__ __forceinline__ void exchange_sums(float (&sums)[kTokens / 2], char* received, uint64_t* arrived, int slice,
                                              int slices, int rank, int thread) {
  const int first = first_of<kTokens>(slice, slices), end = first_of<kTokens>(slice + 1, slices);
  const int most = (kTokens / 8 + slices - 1) / slices;
  if (thread == 0) arrive_expecting(arrived, static_cast<uint32_t>((slices - 1) * (end - first) * kEightSums));
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
    const int to = finisher_of<kTokens>(n, slices);
    if (to == slice) continue;
    char* place = received + (slice * most + n - first_of<kTokens>(to, slices)) * kEightSums + thread * 16;
    const int block = 2 * to + rank % 2;
    store_in_block(address_in_block(place, block), make_float4(sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]),
                   address_in_block(arrived, block));
  }
  wait_for(arrived, 0);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
    if (n < first || n >= end) continue;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < slices; ++s) {
      float4 v = make_float4(sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]);
      if (s != slice) v = *reinterpret_cast<const float4*>(received + (s * most + n - first) * kEightSums + thread * 16);
      total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
    }
    sums[4 * n] = total.x, sums[4 * n + 1] = total.y, sums[4 * n + 2] = total.z, sums[4 * n + 3] = total.w;
  }
}

#endif

// float16 X and scales; groups that are 2^n chunks, or whole rows. `x_map`: describe_rows(). Blocks: any number of clusters of two;
// kSliced: a cluster for each part, of two for each slice.
template <int kBases, int kTokens, bool kSliced>
__global__ void __launch_bounds__(kPromptThreads<kTokens>, 1)
    prompt(const Weights w, const Rows rows, const __grid_constant__ CUtensorMap x_map) {
#if QBB_WARPGROUP_PRODUCTS
  constexpr int kStages = kPromptStages<kTokens>;
  char* memory = reinterpret_cast<char*>(block_memory());
  memory += (1024 - shared_address(memory) % 1024) % 1024;
  char* weights = memory + kStages * kStageBytes<kTokens>;
  char* of_pair = weights + kStages * kStageWeights<kBases>;
  auto* full = reinterpret_cast<uint64_t*>(of_pair + kPairSums<kTokens>);
  uint64_t *empty = full + kStages, *arrived = empty + kStages;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = uniform(thread / 32);
  const int rank = cluster_rank(), slices = kSliced ? cluster_size() / 2 : 1, slice = kSliced ? rank / 2 : 0;
  const int cluster = static_cast<int>(blockIdx.x) / (2 * slices), clusters = static_cast<int>(gridDim.x) / (2 * slices);
  const int all_chunks = (w.words + kChunkWords - 1) / kChunkWords, first_chunk = all_chunks * slice / slices;
  const int chunks = all_chunks * (slice + 1) / slices - first_chunk;
  const int parts = static_cast<int>(prompt_parts(w.tiles, rows.M, kTokens));
  const auto first_tile = [&](int2 place) { return (2 * place.x + rank % 2) * kPromptTiles; };
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&full[s], kWarpgroup + 1);                      // all that copy weights, and one for X
      init_barrier(&empty[s], 2 * kWarpgroup + 2 * kWarpgroup / 32);  // a pair that multiplies here, a lane of each warp there
    }
    if (kSliced) init_barrier(arrived, 1);
    show_barriers();
  }
  let_next_kernel_start();  // it waits for this one before it reads or writes what this one does
  __syncthreads();
  meet_cluster();
  if (thread >= kPromptMultiply<kTokens>) {
    give_registers<56>();
    const int own = thread - kPromptMultiply<kTokens>, ahead = min(kStages, chunks);
    const bool copies_x = warp == kPromptMultiply<kTokens> / 32 && elect_lane();
    const auto weights_of = [&](int2 place, int chunk, int stage) {
      copy_weights<kBases>(weights + stage * kStageWeights<kBases>, w, first_tile(place), first_chunk + chunk, own);
    };
    if (cluster < parts) {
      const int2 place = place_of<kTokens>(cluster, w.tiles, rows.M);
      for (int chunk = 0; chunk < ahead; ++chunk) weights_of(place, chunk, chunk);
    }
    wait_for_previous_kernel();
    for (int part = cluster, count = 0, stage = 0, parity = 1; part < parts; part += clusters) {
      const int2 place = place_of<kTokens>(part, w.tiles, rows.M);
      for (int chunk = 0; chunk < chunks; ++chunk, ++count) {
        if (count >= kStages) wait_for(&empty[stage], parity);
        if (count >= ahead) weights_of(place, chunk, stage);
        if (copies_x) {
          char* to = memory + stage * kStageBytes<kTokens>;
          arrive_expecting(&full[stage], kStageBytes<kTokens>);
          copy_rows<kTokens>(to, &x_map, first_chunk + chunk, place.y * kTokens, rank, &full[stage]);
        }
        arrive_after_copies(&full[stage]);
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    if (kSliced) meet_cluster();
  } else {
    constexpr int kTurns = kPairs<kTokens>, kAhead = kTurns == 1 ? 1 : 0;
    take_registers<kTurns == 1 ? 224 : 104>();
    constexpr int kPart = kBases == 4 ? 2 : kBases;  // a look-up has eight entries, so four bases are two matrices
    const Lane own = lane_of(lane);
    const uint32_t turn = turn_of(own.t);
    const float inverse = 1.0f / w.unit;
    const int pair = warp / (2 * kWarpgroup / 32), tile = warp % (2 * kWarpgroup / 32);
    const auto release = [&](int stage) {
      arrive(&empty[stage]);
      if (lane == 0) arrive_in_block(&empty[stage], rank ^ 1);
    };
    int chunk = pair, stage = pair, parity = 0;  // the pair's next chunk: of this part, if below `chunks`
    for (int part = cluster; part < parts; part += clusters) {
      float sums[kTokens / 2] = {};
      uint32_t a[1 + kAhead][4][4];  // weights of half a chunk; with kAhead while those of the half before are still multiplied
      int last = 0;
      for (; chunk < chunks; chunk += kTurns) {
        wait_for(&full[stage], parity);
        const char* words = weights + stage * kStageWeights<kBases> + tile * 256 + own.g * 8;
        const char* scales = weights + stage * kStageWeights<kBases> + kBases * kWordBytes + tile * 32 + own.g * 4;
        float2 z = make_float2(0.0f, 0.0f);
        if (w.offset != nullptr) {
          z = *reinterpret_cast<const float2*>(weights + stage * kStageWeights<kBases> +
                                               kBases * (kWordBytes + kScaleBytes) + tile * 64 + own.g * 8);
          z = make_float2(z.x * inverse, z.y * inverse);
        }
        Levels levels[2];
        [[maybe_unused]] Levels rest[2];
        load_levels<0, kPart>(levels, scales, z, inverse);
        if constexpr (kBases == 4) load_levels<2, 2>(rest, scales, make_float2(0.0f, 0.0f), inverse);
        const uint32_t x = shared_address(memory + stage * kStageBytes<kTokens>);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const char* here_words = words + half * 2 * QBB_TILE_ROWS * 4;
          uint32_t(&made)[4][4] = a[half * kAhead];
          make_weights<0, kPart>(made, levels, here_words, turn);
          if constexpr (kBases == 4) {
            uint32_t b[4][4];
            make_weights<2, 2>(b, rest, here_words, turn);
            add_pairs(made, b);
          }
          begin_products();
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            start_product(sums, made[s], descriptor(x + static_cast<uint32_t>(half * kTokens * kRowBytes + s * 32)));
          }
          end_products();
          wait_for_products<kAhead>();
          if (kAhead == 1 && half == 0 && chunk > 0) release(last);
          if (kAhead == 0 && half == 1) release(stage);
        }
        last = stage;
        stage += kTurns;
        if (stage >= kStages) {
          stage -= kStages;
          parity ^= 1;
        }
      }
      chunk -= chunks;
      if (kAhead == 1) {
        wait_for_products<0>();
        release(last);
      }
      if constexpr (kTurns == 2) add_pair<kTokens>(sums, of_pair, pair, thread % (2 * kWarpgroup));
      if (kTurns == 2 && pair == 1) {
        if (kSliced) meet_cluster();
        continue;
      }
      int first = 0, end = kTokens / 8;
      if constexpr (kSliced) {
        hold(sums);
        meet_cluster();  // all stages are free
        exchange_sums<kTokens>(sums, memory, arrived, slice, slices, rank, thread);
        first = first_of<kTokens>(slice, slices), end = first_of<kTokens>(slice + 1, slices);
      }
      const int2 place = place_of<kTokens>(part, w.tiles, rows.M);
      const int out = (first_tile(place) + tile) * QBB_TILE_ROWS + lane / 4 * 2, row = place.y * kTokens;
      const float2 bias = make_float2(w.bias == nullptr || out >= w.N ? 0.0f : w.bias[out],
                                      w.bias == nullptr || out + 1 >= w.N ? 0.0f : w.bias[out + 1]);
      store_results<kTokens>(static_cast<__half*>(rows.y) + static_cast<int64_t>(row) * w.N, sums, w.unit, bias, out,
                             min(rows.M - row, kTokens), w.N, lane, first, end);
    }
  }
  meet_cluster();  // a block's memory is there until no other needs it
#endif
}

}  // namespace qbb::cuda
