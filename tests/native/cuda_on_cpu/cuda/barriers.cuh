// custom_ops/cuda/barriers.cuh for emulate.h. Bulk copies happen when somebody waits for them, not before.
#pragma once

#include "cuda/weights.h"
#include "emulate.h"

namespace qbb::cuda {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulate::state().memory_start);
}

inline void init_barrier(uint64_t* barrier, int count) {
  emulate::state().barriers[barrier] = emulate::Barrier{emulate::Meeting{count}, 0, {}};
}
inline void show_barriers() {}

inline emulate::Barrier& at(uint64_t* barrier) { return emulate::state().barriers.at(barrier); }

inline void complete(emulate::Barrier& b) {
  if (b.meeting.arrived < b.meeting.expected || b.bytes != 0) return;
  b.meeting.arrived = 0;
  ++b.meeting.number;
}

inline void arrive(uint64_t* barrier) {
  ++at(barrier).meeting.arrived;
  complete(at(barrier));
}

inline void arrive_with_bytes(uint64_t* barrier, int bytes) {
  at(barrier).bytes += bytes;
  arrive(barrier);
}

inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) std::abort();
  at(barrier).copies.push_back({to, from, static_cast<size_t>(bytes)});
}

inline void wait_for(uint64_t* barrier, int parity) {
  emulate::Barrier& b = at(barrier);
  const auto is_over = [&] { return b.meeting.number % 2 != parity; };
  while (!is_over()) {
    for (const auto& copy : b.copies) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      b.bytes -= static_cast<int64_t>(copy.bytes);
    }
    b.copies.clear();
    complete(b);
    if (!is_over()) emulate::let_others_run();
  }
}

template <int kThreads>
inline void meet_first() {
  emulate::state().first.expected = kThreads;
  emulate::meet(emulate::state().first);
}

}  // namespace qbb::cuda
