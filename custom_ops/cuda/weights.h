// What CUDA kernels see of a matrix and of its operands. Plain data, passed by value.
#pragma once

#include <cstdint>

#include "qbb/format.h"

namespace qbb::cuda {

// Weights in layout 1, in device memory.
struct Weights {
  int K, N, bases;
  int words, groups, tiles;
  int group_words;         // words in a group, the last one of a row may have fewer
  const uint32_t* planes;  // [bases, tiles, words, 16]
  const void* scales;      // [bases, tiles, groups, 16]
  bool half_scales;        // scales are float16, else float32
  const float* offset;     // [tiles, groups, 16], or NULL for none
  const float* bias;       // [N], or NULL for none
  const float* row_unit;   // [tiles, 16]: levels of a row divided by it are at most kLargestLevel
  float unit;              // a power of two: levels divided by it fit float16 well
  // For matrices whose groups are 2^shift chunks, or whole rows:
  int group_shift;
  int tile_bytes;                    // of planes, from tile to tile
  int64_t plane_bytes, scale_bytes;  // from basis to basis
};

// Element types of X and Y, numbered as in ONNX.
enum Type : int { kFloat32 = 1, kFloat16 = 10, kBFloat16 = 16 };

struct Rows {
  const void* x;  // [M, K]
  void* y;        // [M, N]
  Type type;   // of both
  int M;
  int block;   // chunks of X in shared memory at a time (batch.cuh), or stages of weights (decode_bulk.cuh)
};

constexpr int kChunkWords = 4;    // words of a row that one binary product takes: 128 inputs
constexpr int kChunk = kChunkWords * QBB_WORD_BITS;
constexpr float kLargestLevel = 32600.0f;  // of a row as whole numbers of 16 bits, with room for rounding

}  // namespace qbb::cuda
