// custom_ops/cuda/warpgroup.cuh for emulate.h. Products happen at once, so what is forgotten to be waited for is not found.
#pragma once

#include "cuda/barriers.cuh"
#include "cuda/instructions.cuh"

#define QBB_WARPGROUP_PRODUCTS 1

namespace qbb::cuda {

inline void show_stores() {}

// Copies happen when they are waited for, not before: that is what a kernel may count on.
struct Copy {
  char* to;
  const void* from;
  size_t bytes, zeros;
};

inline std::vector<Copy>& copies() {
  static std::map<unsigned, std::vector<Copy>> of_threads;
  return of_threads[threadIdx.x];
}

inline void copy_piece(uint32_t to, const void* from, bool real) {
  copies().push_back(Copy{emulate::state().memory_start + to, from, real ? size_t{16} : 0, real ? 0 : size_t{16}});
}

inline void finish_copies() {
  for (const Copy& copy : copies()) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to, 0, copy.zeros);
  }
  copies().clear();
}
inline void arrive_after_copies(uint64_t* barrier) {
  finish_copies();
  arrive(barrier);
}

inline uint64_t descriptor(uint32_t address) { return address; }

template <int kSums>
inline void start_product(float (&c)[kSums], const uint32_t (&a)[4], uint64_t b) {
  const emulate::Shown& all = emulate::show(a, 4);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < kSums; ++i) {
    const int row = g + i % 4 / 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t at = static_cast<uint32_t>(b) + static_cast<uint32_t>(token) * 128 + static_cast<uint32_t>(k) * 2;
      const uint32_t swizzled = at ^ ((at >> 7 & 7u) << 4);  // 16-byte pieces, by the row within eight
      uint16_t bits;
      std::memcpy(&bits, emulate::state().memory_start + swizzled, 2);
      c[i] += element_of_a(all, row, k) * half_of(bits, 0);
    }
  }
}

inline void begin_products() {}
inline void end_products() {}
template <int kOpen>
inline void wait_for_products() {}
template <int kCount>
inline void give_registers() {}
template <int kCount>
inline void take_registers() {}

}  // namespace qbb::cuda
