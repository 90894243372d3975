// Attributes of one matrix with the sizes that follow from them, and the checks that nothing may bypass.
#pragma once

#include <cstdint>

#include "qbb/ops.h"

namespace qbb::core {

struct Spec {
  int64_t K, N, bases, group_size, layout;
  int64_t words;   // W = ceil(K/32), words in a row of one basis
  int64_t groups;  // G = ceil(K/group_size), scales in a row of one basis
  int64_t tiles;   // T = ceil(N/16)
};

// Throws core::Error for anything that docs/format.md does not allow. Reads no weights.
Spec validate(const qbb_matrix& matrix);

int64_t element_size(int32_t dtype);

// True where `a * b` does not fit; a is at least 0, b at least 1.
bool mul_overflows(int64_t a, int64_t b, int64_t* product);

}  // namespace qbb::core
