// A few up to some dozens of rows of X, on Hopper: blocks of a cluster share outputs, and each takes a slice of the inputs.
//
// So a block prepares no more than its slice of X, once, and X stays in shared memory. Four warps copy weights, some pieces
// ahead; warpgroups take turns at the pieces, look weights up and multiply (cluster_products.cuh). 64 outputs (a set) at a
// time, each warpgroup sends its sums to the blocks that add them up, each some of the outputs, in a fixed order, while
// the next set is under way.
#pragma once

#include "cuda/cluster_stage.cuh"

namespace qbb::cuda {

// float16 scales; groups that are 2^n chunks, or whole rows. How: ByteProducts or HalfProducts. Blocks: any number of
// clusters of 2, 4 or 8; rows.block: cluster_block().
template <class How, int kBases, class Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks) cluster(const Weights w, const Rows rows) {
#if QBB_WARPGROUP_PRODUCTS
  constexpr int kTokens = How::kTokens, kColumns = kTokens / kColumn, kParts = parts_of(kBases);
  using Memory = ClusterMemory<How, kBases, Plan>;
  char* stages = reinterpret_cast<char*>(block_memory());
  stages += (Memory::kAlign - shared_address(stages) % Memory::kAlign) % Memory::kAlign;
  char *received = stages + Memory::kSums, *x = stages + Memory::kX;
  auto* numbers = reinterpret_cast<float2*>(x + rows.block * Memory::kChunkBytes);
  auto* full = reinterpret_cast<uint64_t*>(stages + Memory::kBarriers);
  uint64_t *empty = full + Plan::kStages, *arrived = empty + Plan::kStages;  // arrived[2]: sums
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int blocks = cluster_size(), rank = cluster_rank();
  const int clusters = static_cast<int>(gridDim.x) / blocks, first_set = static_cast<int>(blockIdx.x) / blocks;
  const int sets = (w.tiles + kClusterTiles - 1) / kClusterTiles;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const int first = chunks * rank / blocks, end = chunks * (rank + 1) / blocks;
  const int pieces = (end - first + Plan::kPiece - 1) / Plan::kPiece;
  if (thread == 0) {
    for (int s = 0; s < Plan::kStages; ++s) {
      init_barrier(&full[s], kClusterTiles);
      init_barrier(&empty[s], kWarpgroupThreads);
    }
    for (int i = 0; i < 2; ++i) init_barrier(&arrived[i], 1);
    show_barriers();
    for (int i = 0; i < 2; ++i) arrive_expecting(&arrived[i], Memory::kSumBytes);
  }
  let_next_kernel_start();  // it waits for this one before it reads or writes what this one does
  __syncthreads();
  enter_cluster();

  if (thread >= Plan::kMultiply) {
    if constexpr (Plan::kExchange) give_registers<Plan::kFew>();
    const int tile = uniform(thread / 32 % kClusterTiles);  // a warp copies it
    const bool elected = elect_lane();
    int stage = 0, parity = 1, count = 0;
    for (int row = 0; row < rows.M; row += kTokens) {
      for (int set = first_set; set < sets; set += clusters) {
        const TileCopy<Memory, kBases> copy(w, set, tile);
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece, ++count) {
          if (count == Plan::kStages) wait_for_cluster();
          if (count >= Plan::kStages) wait_for(&empty[stage], parity);
          const int from = first + piece * Plan::kPiece;
          const int to = min(from + Plan::kPiece, end);
          if (elected) copy.start(stages + stage * Memory::kStage, &full[stage], w, from, to);
          if (++stage == Plan::kStages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
    if (count <= Plan::kStages) wait_for_cluster();
    return;
  }
  if constexpr (Plan::kExchange) take_registers<Plan::kMany>();

  const int warpgroup = uniform(thread / kWarpgroupThreads), tile = uniform(thread / 32 % kClusterTiles);
  const int own = thread % kWarpgroupThreads, t = lane % 4;
  auto* tables = reinterpret_cast<uint4*>(stages + Memory::kLevels) + thread / 32 * Plan::kPiece * QBB_TILE_ROWS;
  const auto inverse_of = [](float unit) { return unit > 0.0f ? 1.0f / unit : 0.0f; };
  const auto row_of = [&](int set, int r) { return min(set * kClusterTiles + tile, w.tiles - 1) * QBB_TILE_ROWS + r; };

  // Adds up this block's share of a set's sums: 128 / blocks lanes of each warpgroup.
  const int share = kWarpgroupThreads / blocks;
  const auto finish = [&](int row, int set, int count) {
    const int items = share * kColumns, local = thread % share, from = rank * share + local;
    const int out = (set * kClusterTiles + from / 32) * QBB_TILE_ROWS + from % 32 / 4 * 2, here = rows.M - row;
    const bool one = out < w.N, two = out + 1 < w.N, bias = w.bias != nullptr;
    const float2 factor = make_float2(one ? How::unit_of(w, out) : 0.0f, two ? How::unit_of(w, out + 1) : 0.0f);
    const float2 base = make_float2(bias && one ? w.bias[out] : 0.0f, bias && two ? w.bias[out + 1] : 0.0f);
    const auto* sums = reinterpret_cast<const float4*>(received + count % 2 * Memory::kSumBytes);
    wait_for(&arrived[count % 2], count / 2 % 2);
    if (thread == 0) arrive_expecting(&arrived[count % 2], Memory::kSumBytes);  // of the set after the next one
    for (int i = thread; i < items; i += Plan::kMultiply) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int c = 0; c < blocks * Plan::kWarpgroups; ++c) {
        const float4 v = sums[c * items + i];
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
      }
      const int token = i / share * kColumn + from % 4 * 2;
      const int64_t at = static_cast<int64_t>(row + token) * w.N + out;
      if (token < here) {
        if (one) store_y(rows, at, fmaf(sum.x, factor.x, base.x));
        if (two) store_y(rows, at + 1, fmaf(sum.z, factor.y, base.y));
      }
      if (token + 1 < here) {
        if (one) store_y(rows, at + w.N, fmaf(sum.y, factor.x, base.x));
        if (two) store_y(rows, at + w.N + 1, fmaf(sum.w, factor.y, base.y));
      }
    }
  };

  const uint64_t all_of_x = descriptor(shared_address(x));
  float unit = How::unit_of(w, row_of(first_set, lane % QBB_TILE_ROWS));
  wait_for_previous_kernel();
  int stage = warpgroup, parity = 0, unread = warpgroup;  // the warpgroup's next piece: of this set, if below `pieces`
  int count = 0, last_set = 0, last_row = 0;              // sets so far
  for (int row = 0; row < rows.M; row += kTokens) {
    if (row > 0) sync_threads(1, Plan::kMultiply);  // all have read the last rows
    stage_rows<How, kBases, Plan::kMultiply>(x, numbers, w, rows, row, first, end, rows.block, thread);
    show_stores();
    sync_threads(1, Plan::kMultiply);
    if (row == 0) wait_for_cluster();
    for (int set = first_set; set < sets; set += clusters) {
      const float inverse = inverse_of(unit);
      unit = How::unit_of(w, row_of(set + clusters < sets ? set + clusters : first_set, lane % QBB_TILE_ROWS));
      float2 inverses = make_float2(0.0f, 0.0f);
      if (w.offset != nullptr) {
        inverses = make_float2(inverse_of(How::unit_of(w, row_of(set, lane / 4 * 2))),
                               inverse_of(How::unit_of(w, row_of(set, lane / 4 * 2 + 1))));
      }
      float sums[kTokens / 2] = {};
      for (; unread < pieces; unread += Plan::kWarpgroups) {
        const char* here = stages + stage * Memory::kStage;
        const int chunk = first + unread * Plan::kPiece, group = chunk >> w.group_shift;
        wait_for(&full[stage], parity);
        // Levels: a lane makes those of a row and chunk.
#pragma unroll
        for (int i = 0; i < Plan::kPiece; i += 2) {
          const int u = i + lane / QBB_TILE_ROWS, r = lane % QBB_TILE_ROWS;
          const int place = (tile * Plan::kPiece + ((chunk + u) >> w.group_shift) - group) * QBB_TILE_ROWS + r;
          float s[kBases], z = 0.0f;
          const bool there = chunk + u < end;  // elsewhere there may be anything
#pragma unroll
          for (int b = 0; b < kBases; ++b) {
            const char* scales = here + Memory::kScales + b * kClusterTiles * Memory::kTileScales;
            s[b] = there ? __half2float(reinterpret_cast<const __half*>(scales)[place]) : 0.0f;
          }
          if (w.offset != nullptr && there) z = reinterpret_cast<const float*>(here + Memory::kOffsets)[place];
          tables[i * QBB_TILE_ROWS + lane] = How::template table<kBases>(s, z, inverse);
        }
        __syncwarp();
        uint32_t a[2][4][4];  // the next set of weights is made while one is multiplied
        [[maybe_unused]] typename How::OfChunk of_chunk[2];
        float2 z[2] = {};
        const float2* number = numbers + unread * Plan::kPiece * kTokens;
        const uint64_t piece_of_x = later(all_of_x, unread * Plan::kPiece * Memory::kChunkBytes);
#pragma unroll
        for (int u = 0; u < Plan::kPiece; ++u) {
          const uint4 table[2] = {tables[u * QBB_TILE_ROWS + lane / 4 * 2], tables[u * QBB_TILE_ROWS + lane / 4 * 2 + 1]};
          uint2 words[kBases];
#pragma unroll
          for (int b = 0; b < kBases; ++b) {
            words[b] = *reinterpret_cast<const uint2*>(here + (b * kClusterTiles + tile) * Memory::kTileWords +
                                                       ((u * kChunkWords + t) * QBB_TILE_ROWS + lane / 4 * 2) * 4);
          }
          if (How::kNumbers && w.offset != nullptr) {
            const int place = (tile * Plan::kPiece + ((chunk + u) >> w.group_shift) - group) * QBB_TILE_ROWS + lane / 4 * 2;
            const float2 offset = *reinterpret_cast<const float2*>(here + Memory::kOffsets + place * 4);
            if (chunk + u < end) z[u % 2] = make_float2(offset.x * inverses.x, offset.y * inverses.y);
          }
          if (u + 1 == Plan::kPiece) {
            __syncwarp();  // all have read the levels
            arrive(&empty[stage]);
          }
          uint32_t codes[kParts][2][4];
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            constexpr int kPart = kBases / kParts;
            uint32_t w0[kPart], w1[kPart];
#pragma unroll
            for (int b = 0; b < kPart; ++b) {
              w0[b] = words[p * kPart + b].x;
              w1[b] = words[p * kPart + b].y;
            }
            all_codes<kPart>(codes[p][0], w0);
            all_codes<kPart>(codes[p][1], w1);
          }
#pragma unroll
          for (int i = 0; i < How::sets(kBases); ++i) {
            How::template make<kBases>(a[i % 2], codes, table, i);
            begin_products();
            const uint64_t at = later(piece_of_x, u * Memory::kChunkBytes);
            if constexpr (How::kDirect) {
              How::template start<false>(sums, a[i % 2], at, i);
            } else {
              if (i == 0) {
                How::template start<true>(of_chunk[u % 2], a[i % 2], at, i);
              } else {
                How::template start<false>(of_chunk[u % 2], a[i % 2], at, i);
              }
            }
            end_products();
            wait_for_products<1>();  // registers of the set before can be written, and those of the chunk before read
            if constexpr (!How::kDirect) {
              if (i == 0 && u > 0) {
                hold(of_chunk[(u + 1) % 2]);
                How::template add<kBases>(sums, of_chunk[(u + 1) % 2], z[(u + 1) % 2], number + (u - 1) * kTokens, t,
                                          w.offset != nullptr);
              }
            }
          }
        }
        wait_for_products<0>();
        if constexpr (How::kDirect) {
          hold(sums);
        } else {
          hold(of_chunk[1]);
          How::template add<kBases>(sums, of_chunk[1], z[1], number + (Plan::kPiece - 1) * kTokens, t, w.offset != nullptr);
        }
        stage += Plan::kWarpgroups;
        if (stage >= Plan::kStages) {
          stage -= Plan::kStages;
          parity ^= 1;
        }
      }
      unread -= pieces;
      if (count > 0) finish(last_row, last_set, count - 1);
      // Sums to those who add them up. Their memory is free: all have finished the set before the last one.
      sync_threads(2 + warpgroup, kWarpgroupThreads);  // so they say, too, that all of it has read the last sums
      const int block = own / share;
      const uint32_t to = address_in_block(received + count % 2 * Memory::kSumBytes, block);
      const uint32_t told = address_in_block(&arrived[count % 2], block);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int place = ((rank * Plan::kWarpgroups + warpgroup) * kColumns + n) * share + own % share;
        store_in_block(to + static_cast<uint32_t>(place) * 16,
                       make_float4(sums[4 * n], sums[4 * n + 1], sums[4 * n + 2], sums[4 * n + 3]), told);
      }
      last_set = set;
      last_row = row;
      ++count;
    }
  }
  if (count > 0) finish(last_row, last_set, count - 1);
#endif
}

}  // namespace qbb::cuda
