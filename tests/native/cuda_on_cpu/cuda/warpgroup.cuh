// custom_ops/cuda/warpgroup.cuh for emulate.h. Products happen at once, so what is forgotten to be waited for is not found.
#pragma once

#include "cuda/barriers.cuh"
#include "cuda/instructions.cuh"

#define QBB_WARPGROUP_PRODUCTS 1

namespace qbb::cuda {

inline void show_stores() {}

inline int cluster_rank() { return emulate::now().block->rank; }
inline int cluster_size() { return static_cast<int>(emulate::state().cluster.size()); }
inline void enter_cluster() {
  ++emulate::state().entered;
  ++emulate::now().entered;
}
inline void wait_for_cluster() {
  emulate::State& s = emulate::state();
  while (s.entered < s.fibers.size() * emulate::now().entered) emulate::let_others_run();
}

inline void meet_cluster() {
  enter_cluster();
  wait_for_cluster();
}

inline uint32_t address_in_block(const void* p, int rank) {
  return static_cast<uint32_t>(rank) << 24 | shared_address(p);
}
inline char* place_in_cluster(uint32_t address) {
  return emulate::state().cluster[address >> 24].memory_start + (address & 0xffffffu);
}
inline void store_in_block(uint32_t address, float4 v, uint32_t barrier) {
  char* to = place_in_cluster(address);
  auto* told = reinterpret_cast<uint64_t*>(place_in_cluster(barrier));
  emulate::state().barriers.at(told).copies.push_back([=] {
    std::memcpy(to, &v, sizeof v);
    emulate::Barrier& b = emulate::state().barriers.at(told);
    b.bytes -= sizeof v;
    b.end_phase();
  });
}

inline void arrive_in_block(uint64_t* barrier, int rank) {
  arrive(reinterpret_cast<uint64_t*>(place_in_cluster(address_in_block(barrier, rank))));
}

// What a CUtensorMap is here.
struct Matrix {
  const uint16_t* data;
  int64_t columns, rows, box_columns, box_rows;
};

inline void copy_box(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier, int first) {
  Matrix m;
  std::memcpy(&m, map, sizeof m);
  for (int rank = first; rank < first + 2; ++rank) {
    char* start = place_in_cluster(address_in_block(to, rank));
    auto* told = reinterpret_cast<uint64_t*>(place_in_cluster(address_in_block(barrier, rank)));
    emulate::state().barriers.at(told).copies.push_back([=] {
      for (int64_t r = 0; r < m.box_rows; ++r) {
        for (int64_t c = 0; c < m.box_columns; ++c) {
          const bool real = y + r < m.rows && x + c < m.columns;
          const uint16_t v = real ? m.data[(y + r) * m.columns + x + c] : uint16_t{0};
          std::memcpy(start + r * 128 + ((c / 8 ^ r % 8) * 8 + c % 8) * 2, &v, 2);
        }
      }
      emulate::Barrier& b = emulate::state().barriers.at(told);
      b.bytes -= m.box_rows * m.box_columns * 2;
      b.end_phase();
    });
  }
}

inline void arrive_after_copies(uint64_t* barrier) { arrive(barrier); }  // which happen at once here

inline uint64_t descriptor(uint32_t address) { return address; }
inline uint64_t later(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes); }

// Byte `at` of row `token` of a matrix in shared memory: pieces of 16 change places by the row within eight.
inline const char* place_of(uint64_t matrix, int token, int at) {
  const uint32_t plain = static_cast<uint32_t>(matrix) + static_cast<uint32_t>(token) * 128 + static_cast<uint32_t>(at);
  return emulate::now().block->memory_start + (plain ^ ((plain >> 7 & 7u) << 4));
}

template <bool kAdd = true, int kSums>
inline void start_product(float (&c)[kSums], const uint32_t (&a)[4], uint64_t b) {
  const emulate::Shown& all = emulate::show(a, 4);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < kSums; ++i) {
    const int row = g + i % 4 / 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
    if (!kAdd) c[i] = 0.0f;
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, place_of(b, token, 2 * k), 2);
      c[i] += element_of_a(all, row, k) * half_of(bits, 0);
    }
  }
}

// Bytes: four neighbouring ones in a register where there were two numbers.
template <bool kAdd = true, int kSums>
inline void start_product(int (&c)[kSums], const uint32_t (&a)[4], uint64_t b) {
  const emulate::Shown& all = emulate::show(a, 4);
  const int g = emulate::lane() / 4, t = emulate::lane() % 4;
  for (int i = 0; i < kSums; ++i) {
    const int row = g + i % 4 / 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
    if (!kAdd) c[i] = 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t four = all[4 * (row % 8) + k % 16 / 4][row / 8 + k / 16 * 2];
      c[i] += static_cast<int8_t>(four >> (8 * (k % 4))) * static_cast<int8_t>(*place_of(b, token, k));
    }
  }
}

inline void begin_products() {}
inline void end_products() {}
template <int kOpen>
inline void wait_for_products() {}
template <class T>
inline void hold(T&) {}
template <int kCount>
inline void give_registers() {}
template <int kCount>
inline void take_registers() {}

}  // namespace qbb::cuda
