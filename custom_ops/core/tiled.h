// What kernels see of a matrix. Plain data only: a file that is compiled with AVX flags must not pull in inline
// functions, because the linker may keep its copy of them for CPUs that have no AVX.
#pragma once

#include <stdint.h>

#include "qbb/format.h"

namespace qbb::core {

constexpr int kSegmentWords = 8;

// Inputs that are summed up before they are scaled: those of one group, ending at multiples of 8 words.
struct Segment {
  int64_t first;  // word
  int words;
  int64_t group;
};

struct Tiled {
  int64_t K, N, bases;
  int64_t words, groups, tiles;
  int64_t group_words;     // words in a group, the last one of a row may have fewer
  const uint32_t* planes;  // [bases, tiles, words, 16]
  const void* scales;      // [bases, tiles, groups, 16]
  bool half_scales;        // scales are float16, else float32
  const float* offset;     // [tiles, groups, 16], or NULL for none
  const float* bias;       // [N], or NULL for none
  const Segment* segments;
  int64_t num_segments;
};

constexpr int64_t kMaxTaskTiles = 32;  // tiles in a task: bounds the accumulators that it keeps on its stack
constexpr int64_t kTaskRows = 32;      // rows of X in a task

constexpr int64_t kByteTableRows = 32;     // rows of X that have integer tables at a time
constexpr int64_t kByteProductRows = 512;  // rows of X that are bytes at a time
constexpr int64_t kManyTaskRows = 128;
constexpr int64_t kManyTaskTiles = 8;  // with the rows: 64 KB of sums on the stack

}  // namespace qbb::core
