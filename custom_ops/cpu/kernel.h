// What a kernel gets: one block of the output, or of the activations to prepare. No code here, see core/tiled.h for why.
#pragma once

#include "core/tiled.h"

namespace qbb::cpu {

// How a product is done; chosen by mode and number of rows (ops.cc).
enum class Path {
  kFloatTables,   // few rows:  table_kernel.h
  kFloatProduct,  // many rows: expand_kernel.h
  kByteTables,    // few rows, int8 activations:  byte_table_kernel.h
  kWordTables,    // few rows, int16 activations: the same with two bytes an entry
  kByteProduct,   // many rows, int8 activations: byte_product_kernel.h
};

// What the integer modes make of X. Made once for all tasks; s counts the segments of the matrix.
struct Activations {
  uint8_t* codes;   // tables [words, table_rows, bytes, 128], or int8 activations [s, M, inputs of the segment]
  int64_t table_rows;  // at least M
  float* steps;     // [s, M] value of 1; NaN where an activation is not finite
  int32_t* totals;  // [s, M] sums of the rounded activations
};

struct Block {
  const core::Tiled* w;
  const void* x;           // [M, K], the whole of X
  void* y;                 // [M, N]
  bool half;               // x and y are float16, else float32
  int64_t M;
  int64_t row, rows;       // rows of X in this block
  int64_t tile, tiles;     // tiles of 16 outputs in this block, at most core::kMaxTaskTiles or kManyTaskTiles
  Path path;
  Activations a;           // integer modes only
  int64_t segment, segments;  // to prepare
};

}  // namespace qbb::cpu
