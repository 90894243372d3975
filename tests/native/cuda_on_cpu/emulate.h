// Runs the blocks of a CUDA kernel on a CPU, one cluster after the other; each thread is a fiber, and those that wait for
// others let them run. Slow, but it finds wrong indices and missing barriers where there is no GPU.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#undef __device__
#undef __global__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __grid_constant__
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define threadIdx (emulate::now().thread)
#define blockIdx (emulate::now().block->index)
#define gridDim (emulate::state().grid)

namespace emulate {

constexpr int kLanes = 32, kMost = 8;  // words that a lane can show to the others at a time
using Shown = uint32_t[kLanes][kMost];

struct Meeting {
  int expected = 0, arrived = 0, number = 0;
};

struct Warp {
  Meeting meeting{kLanes};
  Shown shown[2] = {};
};

// In shared memory; a phase ends when so many have arrived and so many bytes have come.
struct Barrier {
  int expected = 0, arrived = 0, number = 0;
  int64_t bytes = 0;
  std::vector<std::function<void()>> copies;  // on their way

  void end_phase() {
    if (arrived < expected || bytes != 0) return;
    arrived = 0;
    ++number;
  }
};

struct Block {
  dim3 index{};
  int rank = 0;  // in its cluster
  std::vector<Warp> warps;
  Meeting everybody;
  std::map<int, Meeting> some;  // by number of the barrier
  std::unique_ptr<char[]> memory;
  char* memory_start = nullptr;
};

struct Fiber {
  dim3 thread{};
  Block* block = nullptr;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  size_t entered = 0;  // how often it has entered its cluster
  bool ended = false;
};

struct State {
  dim3 grid{};
  std::vector<Block> cluster;
  std::vector<Fiber> fibers;  // of all blocks of a cluster
  std::map<const void*, Barrier> barriers;
  size_t entered = 0;  // threads of the cluster, each time
  size_t current = 0;
  uint32_t random = 1;
  ucontext_t scheduler{};
  const std::function<void()>* kernel = nullptr;
};

inline State& state() {
  static State s;
  return s;
}

inline Fiber& now() { return state().fibers[state().current]; }

inline void let_others_run() { swapcontext(&now().context, &state().scheduler); }

inline void meet(Meeting& m) {
  const int number = m.number;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    ++m.number;
  } else {
    while (m.number == number) let_others_run();
  }
}

// What all lanes of this warp show, once all of them have.
inline const Shown& show(const uint32_t* words, int count) {
  const int thread = static_cast<int>(now().thread.x);
  Warp& warp = now().block->warps[static_cast<size_t>(thread / kLanes)];
  Shown& shown = warp.shown[warp.meeting.number % 2];  // the other one is still being read
  for (int i = 0; i < count; ++i) shown[thread % kLanes][i] = words[i];
  meet(warp.meeting);
  return shown;
}

inline int lane() { return static_cast<int>(now().thread.x) % kLanes; }

inline void run_fiber() {
  (*state().kernel)();
  now().ended = true;
  swapcontext(&now().context, &state().scheduler);
}

// Returns false if all that are left wait for each other. `cluster`: blocks of one.
inline bool run(dim3 grid, int threads, size_t memory, const std::function<void()>& kernel, unsigned cluster = 1) {
  constexpr size_t kStack = size_t{1} << 17, kAlign = 1024;
  State& s = state();
  s.grid = grid;
  s.kernel = &kernel;
  s.cluster.resize(cluster);
  s.fibers.resize(static_cast<size_t>(threads) * cluster);
  for (auto& block : s.cluster) {
    block.memory.reset(new char[memory + kAlign]);
    block.memory_start =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.memory.get()) + kAlign - 1) / kAlign * kAlign);
  }
  for (auto& fiber : s.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster) {
      s.barriers.clear();
      s.entered = 0;
      for (unsigned rank = 0; rank < cluster; ++rank) {
        Block& block = s.cluster[rank];
        std::memset(block.memory.get(), 0xff, memory + kAlign);  // NaN: nobody may count on zeros
        block.index = dim3(x + rank, y);
        block.rank = static_cast<int>(rank);
        block.warps.assign(static_cast<size_t>(threads / kLanes), Warp{});
        block.everybody = Meeting{threads};
        block.some.clear();
        for (int i = 0; i < threads; ++i) {
          Fiber& fiber = s.fibers[rank * static_cast<size_t>(threads) + static_cast<size_t>(i)];
          fiber.thread = dim3(static_cast<unsigned>(i));
          fiber.block = &block;
          fiber.ended = false;
          fiber.entered = 0;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = kStack;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, run_fiber, 0);
        }
      }
      size_t left = s.fibers.size();
      for (int rounds = 0; left > 0; ++rounds) {
        if (rounds > 1 << 20) return false;
        for (s.current = 0; s.current < s.fibers.size(); ++s.current) {
          if (s.fibers[s.current].ended) continue;
          swapcontext(&s.scheduler, &s.fibers[s.current].context);
          if (s.fibers[s.current].ended) --left;
        }
      }
    }
  }
  return true;
}

inline uint32_t shuffle(uint32_t v, int from) { return show(&v, 1)[from][0]; }

}  // namespace emulate

inline void __syncthreads() { emulate::meet(emulate::now().block->everybody); }
inline void __syncwarp() { emulate::show(nullptr, 0); }
inline uint32_t __shfl_sync(unsigned, uint32_t v, int from) { return emulate::shuffle(v, from); }
inline uint32_t __shfl_xor_sync(unsigned, uint32_t v, int mask) { return emulate::shuffle(v, emulate::lane() ^ mask); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = emulate::shuffle(bits, emulate::lane() ^ mask);
  std::memcpy(&v, &bits, 4);
  return v;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __int_as_float(int v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7u))) & 255u;
    if (s & 8u) byte = byte & 128u ? 255u : 0u;
    out |= byte << (8 * i);
  }
  return out;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by % 32));
}
using std::max;
using std::min;
