// custom_ops/cuda/barriers.cuh for emulate.h.
#pragma once

#include "cuda/weights.h"
#include "emulate.h"

namespace qbb::cuda {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulate::now().block->memory_start);
}

inline void init_barrier(uint64_t* barrier, int count) { emulate::state().barriers[barrier] = emulate::Barrier{count}; }
inline void show_barriers() {}

inline bool elect_lane() { return emulate::lane() == 0; }

inline void arrive(uint64_t* barrier) {
  emulate::Barrier& b = emulate::state().barriers.at(barrier);
  ++b.arrived;
  b.end_phase();
}

inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  emulate::state().barriers.at(barrier).bytes += bytes;
  arrive(barrier);
}

// Some copies happen at once, others when they are waited for: a kernel has to be ready for both.
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  emulate::Barrier& b = emulate::state().barriers.at(barrier);
  const auto copy = [=] {
    std::memcpy(to, from, bytes);
    emulate::Barrier& told = emulate::state().barriers.at(barrier);
    told.bytes -= bytes;
    told.end_phase();
  };
  const bool aligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 == 0;
  if (!aligned) return;  // the copy engine would refuse; here, somebody waits for ever
  uint32_t& random = emulate::state().random;
  random = random * 1664525u + 1013904223u;
  if (random >> 31 != 0) {
    copy();
  } else {
    b.copies.push_back(copy);
  }
}

inline void wait_for(uint64_t* barrier, int parity) {
  emulate::Barrier& b = emulate::state().barriers.at(barrier);
  while (b.number % 2 == parity) {
    const auto copies = std::move(b.copies);
    b.copies.clear();
    for (const auto& copy : copies) copy();
    if (b.number % 2 == parity) emulate::let_others_run();
  }
}

inline void sync_threads(int id, int count) {
  emulate::Meeting& meeting = emulate::now().block->some[id];
  meeting.expected = count;
  emulate::meet(meeting);
}

}  // namespace qbb::cuda
