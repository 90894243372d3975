// Which kernel takes which product: data, measured by benchmarks/gpu.py.
#pragma once

#include <cstdint>

#include "cuda/weights.h"

namespace qbb::cuda {

enum class Path {
  kDecode,   // bit planes of X, few rows of it at a time
  kBytes,    // bits made bytes, X of 16 bits, up to 16 rows of it at a time
  kBatch,    // weights made float16, for up to 32 rows of X at a time
  kCluster,  // bits made bytes or weights made float16, for Hopper: few rows of X, each block of a cluster with a slice of inputs
  kPrompt,   // weights made float16, for 64, 128 or 256 rows of X at a time, with Hopper's warpgroup products
  kGeneral,  // any matrix, a row of X at a time
};

struct Rule {
  int arch, last_arch;  // 10 * major + minor
  bool only_int8;       // not for the other modes
  int64_t rows;         // of X, at most
  Path path;
  int step;             // rows of X in one launch of kDecode
};

constexpr int64_t kAnyRows = INT64_MAX;

constexpr int kBulkArch = 90;     // decode_bulk.cuh, from here on
constexpr int kFewestStages = 3;  // of weights under way, for it to be faster than decode.cuh

constexpr int kAnyArch = 1 << 20;

#if QBB_CUDA_90A
constexpr int kWarpgroupArch = 90;
#else
constexpr int kWarpgroupArch = -1;  // not built
#endif

// The first that fits. float16 (bfloat16: all but kPrompt):
constexpr Rule kHalfRules[] = {
    {80, kAnyArch, false, 1, Path::kDecode, 1},
    {80, kAnyArch, false, 2, Path::kDecode, 2},
    {80, kAnyArch, true, 4, Path::kDecode, 4},
    {90, kWarpgroupArch, false, 64, Path::kCluster, 0},
    {90, kWarpgroupArch, false, kAnyRows, Path::kPrompt, 0},
    {80, kAnyArch, false, 16, Path::kBytes, 0},
    {75, kAnyArch, false, kAnyRows, Path::kBatch, 0},
};

// float32, whose digits float16 cannot hold:
constexpr Rule kFloatRules[] = {
    {80, kAnyArch, false, 1, Path::kDecode, 1},
    {80, kAnyArch, false, 2, Path::kDecode, 2},
    {80, kAnyArch, true, 4, Path::kDecode, 4},
    {90, kWarpgroupArch, false, kAnyRows, Path::kCluster, 0},
    {80, kAnyArch, false, kAnyRows, Path::kBytes, 0},
    {75, kAnyArch, false, kAnyRows, Path::kGeneral, 1},
};

// Rows of X and blocks of a cluster that kCluster may take, and about how long a launch takes, in units of the work on 128
// inputs of 64 outputs: making weights, which costs more where there are many products, summing up, and preparing X.
constexpr int kClusterRows[] = {8, 16, 32, 64};
constexpr int kClusterBlocks[] = {2, 4, 8};  // not 1: a block cannot send sums to itself alone
constexpr double cluster_cost(int64_t rounds, int64_t sets, int64_t chunks, int rows) {
  return 10 +
         static_cast<double>(rounds) *
         (static_cast<double>(sets) * (static_cast<double>(chunks) * (rows < 64 ? 1.0 : 1.2) + (rows <= 16 ? 4.0 : 1.5)) +
          static_cast<double>(chunks) * rows / 24);
}

// Rows of X that kPrompt may take at a time, and about how long a launch takes, in the same units.
constexpr int kPromptRows[] = {64, 128, 256};
constexpr double prompt_cost(int64_t rounds, int64_t chunks, int rows, int slices) {
  const double of_chunk = rows == 64 ? 2.2 : rows == 128 ? 2.8 : 4.7;
  return 10 + static_cast<double>(rounds * chunks) * of_chunk * (slices > 1 ? 1.2 : 1.0) + (slices > 1 ? 5 + 0.1 * rows : 0);
}
constexpr int64_t kClusterOnly = 32;  // so many rows of X are never kPrompt's where kCluster can take them

}  // namespace qbb::cuda
