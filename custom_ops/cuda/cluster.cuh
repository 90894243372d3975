// A few up to some dozens of rows of X, on Hopper: blocks of a cluster share outputs, and each takes a slice of the inputs.
//
// So a block prepares no more than its slice of X, once, and X stays in shared memory. Four warps copy weights, some pieces
// ahead; warpgroups take turns at the pieces and multiply (cluster_bits.cuh, cluster_halves.cuh). 64 outputs (a set) at a
// time, each warpgroup sends its sums to the blocks that add them up, each some of the outputs, in a fixed order, while
// the next set is under way.
#pragma once

#include "cuda/cluster_stage.cuh"

namespace qbb::cuda {

// float16 scales; groups that are 2^n chunks, or whole rows. How: BitProducts or HalfProducts. Blocks: any number of
// clusters of 2, 4 or 8; rows.block: cluster_block().
template <class How, int kBases, class Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks) cluster(const Weights w, const Rows rows) {
#if QBB_WARPGROUP_PRODUCTS
  constexpr int kTokens = How::kTokens, kColumns = kTokens / kColumn;
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
  const int own = thread % kWarpgroupThreads;
  auto* tables = reinterpret_cast<uint4*>(stages + Memory::kLevels) + thread / 32 * Plan::kPiece * QBB_TILE_ROWS;
  const float unit = How::unit_of(w);  // of the sums

  // Adds up this block's share of a set's sums: 128 / blocks lanes of each warpgroup.
  const int share = kWarpgroupThreads / blocks;
  const auto finish = [&](int row, int set, int count) {
    const int items = share * kColumns, local = thread % share, from = rank * share + local;
    const int out = (set * kClusterTiles + from / 32) * QBB_TILE_ROWS + from % 32 / 4 * 2, here = rows.M - row;
    const bool one = out < w.N, two = out + 1 < w.N, bias = w.bias != nullptr;
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
        if (one) store_y(rows, at, fmaf(sum.x, unit, base.x));
        if (two) store_y(rows, at + 1, fmaf(sum.z, unit, base.y));
      }
      if (token + 1 < here) {
        if (one) store_y(rows, at + w.N, fmaf(sum.y, unit, base.x));
        if (two) store_y(rows, at + w.N + 1, fmaf(sum.w, unit, base.y));
      }
    }
  };

  const uint64_t all_of_x = descriptor(shared_address(x));
  wait_for_previous_kernel();
  int stage = warpgroup, parity = 0, unread = warpgroup;  // the warpgroup's next piece: of this set, if below `pieces`
  int count = 0, last_set = 0, last_row = 0;              // sets so far
  for (int row = 0; row < rows.M; row += kTokens) {
    if (row > 0) sync_threads(1, Plan::kMultiply);  // all have read the last rows
    stage_rows<How, Plan::kMultiply>(x, numbers, w, rows, row, first, end, rows.block, thread);
    show_stores();
    sync_threads(1, Plan::kMultiply);
    if (row == 0) wait_for_cluster();
    for (int set = first_set; set < sets; set += clusters) {
      float sums[kTokens / 2] = {};
      for (; unread < pieces; unread += Plan::kWarpgroups) {
        const Piece piece{stages + stage * Memory::kStage, &empty[stage], tile, first + unread * Plan::kPiece, end, w.group_shift,
                          w.offset != nullptr};
        wait_for(&full[stage], parity);
        How::template multiply<Memory, kBases>(sums, piece, later(all_of_x, unread * Plan::kPiece * Memory::kChunkBytes),
                                               numbers + unread * Plan::kPiece * kTokens, tables, unit, lane);
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
