// Which kernel takes which product: data, measured by benchmarks/gpu.py.
#pragma once

#include <cstdint>

#include "cuda/weights.h"

namespace qbb::cuda {

enum class Path {
  kDecode,   // bit planes of X, few rows of it at a time
  kBatch,    // weights made float16, for up to 32 rows of X at a time
  kGeneral,  // any matrix, a row of X at a time
};

struct Rule {
  int arch;      // 10 * major + minor, at least
  bool integer;  // mode int8
  int64_t rows;  // of X, at most
  Path path;
  int step;      // rows of X in one launch of kDecode
};

constexpr int64_t kAnyRows = INT64_MAX;

// The first that fits. float16 and bfloat16:
constexpr Rule kHalfRules[] = {
    {80, false, 1, Path::kDecode, 1},
    {80, false, 2, Path::kDecode, 2},
    {80, true, 1, Path::kDecode, 1},
    {80, true, 2, Path::kDecode, 2},
    {80, true, 4, Path::kDecode, 4},
    {75, false, kAnyRows, Path::kBatch, 0},
    {75, true, kAnyRows, Path::kBatch, 0},
};

// float32, whose digits float16 cannot hold:
constexpr Rule kFloatRules[] = {
    {80, false, 1, Path::kDecode, 1}, {80, false, 2, Path::kDecode, 2}, {80, false, kAnyRows, Path::kDecode, 4},
    {80, true, 1, Path::kDecode, 1},  {80, true, 2, Path::kDecode, 2},  {80, true, kAnyRows, Path::kDecode, 4},
    {75, false, kAnyRows, Path::kGeneral, 1}, {75, true, kAnyRows, Path::kGeneral, 1},
};

}  // namespace qbb::cuda
