// What a kernel gets: one block of the output. No code here, see core/tiled.h for why.
#pragma once

#include "core/tiled.h"

namespace qbb::cpu {

struct Block {
  const core::Tiled* w;
  const void* x;           // [M, K], the whole of X
  void* y;                 // [M, N]
  bool half;               // x and y are float16, else float32
  int64_t row, rows;       // rows of X in this block
  int64_t tile, tiles;     // tiles of 16 outputs in this block, at most core::kMaxTaskTiles or kManyTaskTiles
  bool many_rows;          // see core/partition.h
};

}  // namespace qbb::cpu
