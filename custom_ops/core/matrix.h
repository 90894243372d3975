// Weights as kernels read them: always layout 1, in place where the caller already has it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/spec.h"
#include "core/tiled.h"

namespace qbb::core {

struct Free {
  bool huge = false;  // allocated at a huge page
  void operator()(void* p) const;
};

class Matrix {
 public:
  explicit Matrix(const qbb_matrix& matrix);  // throws core::Error, std::bad_alloc

  const Tiled& tiled() const { return tiled_; }

 private:
  using Buffer = std::unique_ptr<void, Free>;

  static Buffer allocate(int64_t bytes);

  Buffer planes_, scales_, offset_, bias_;  // empty where the caller's memory is used
  std::vector<Segment> segments_;
  Tiled tiled_{};
};

}  // namespace qbb::core
