// How one run is cut into tasks. Depends on the shape alone, never on the number of threads.
#pragma once

#include <cstdint>

#include "core/tiled.h"

namespace qbb::core {

struct Partition {
  int64_t row_blocks;   // blocks of `rows` rows of X
  int64_t tile_chunks;  // chunks of `chunk` tiles of the matrix
  int64_t chunk;
  int64_t rows;

  int64_t tasks() const { return row_blocks * tile_chunks; }
};

// Whether weights are made floats or bytes first (cpu/expand_kernel.h, cpu/byte_product_kernel.h). Making them costs
// some ten rows; then a row costs as much as the look-ups of two bases. In int16 mode the product is one of floats, and
// look-ups keep up with it for longer.
inline bool many_rows(int32_t mode, int64_t bases, int64_t M) {
  return bases > 2 && M > (mode == QBB_MODE_INT16 ? 128 : 40) / bases;
}

inline Partition partition(const Tiled& w, int64_t M, bool many_rows) {
  // Each task builds its own tables, so chunks should be large; but idle cores cost more than tables. A task of fewer
  // than 2^13 look-ups of 16 rows (a few microseconds) is not worth handing out.
  constexpr int64_t kEnoughTasks = 16;
  constexpr int64_t kSmallTask = int64_t{1} << 13;
  const auto ceil_div = [](int64_t a, int64_t b) { return a / b + (a % b != 0); };
  if (many_rows) {
    // Blocks of equal height: the expansion of the weights costs as much as some ten rows.
    const int64_t blocks = ceil_div(M, kManyTaskRows);
    return Partition{blocks, ceil_div(w.tiles, kManyTaskTiles), kManyTaskTiles, ceil_div(M, blocks)};
  }
  Partition p{ceil_div(M, kTaskRows), 0, kMaxTaskTiles, kTaskRows};
  const int64_t rows = M < kTaskRows ? M : kTaskRows;
  const int64_t per_tile = w.bases * w.words * 8 * rows;
  while (p.chunk > 1 && p.row_blocks * ceil_div(w.tiles, p.chunk) < kEnoughTasks &&
         per_tile >= kSmallTask / (p.chunk / 2)) {
    p.chunk /= 2;
  }
  p.tile_chunks = ceil_div(w.tiles, p.chunk);
  return p;
}

// Segments in a task that prepares M rows of X for an integer mode.
inline int64_t segments_per_task(const Tiled& w, int64_t M) {
  constexpr int64_t kMaxTasks = 16;
  constexpr int64_t kInputs = int64_t{1} << 14;  // worth handing out: some microseconds
  const int64_t inputs = M * w.words * QBB_WORD_BITS;
  const int64_t tasks = inputs / kInputs < 1 ? 1 : inputs / kInputs > kMaxTasks ? kMaxTasks : inputs / kInputs;
  return (w.num_segments + tasks - 1) / tasks;
}

}  // namespace qbb::core
