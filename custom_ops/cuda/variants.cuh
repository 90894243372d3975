// Which instances of the kernels there are, by bases, rows of X and types.
#pragma once

#include <type_traits>

#include "cuda/batch.cuh"
#include "cuda/cluster.cuh"
#include "cuda/cluster_bits.cuh"
#include "cuda/cluster_halves.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_bulk.cuh"
#include "cuda/prompt.cuh"

namespace qbb::cuda {

using Kernel = void (*)(Weights, Rows);

// f(std::integral_constant<int, bases>{}), bases from 1 to 4.
template <class F>
auto with_bases(int bases, const F& f) {
  switch (bases) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

template <int kBases>
Kernel decode_kernel(int bits, int step) {
  if (bits == 8) return step == 1 ? decode<kBases, 8, 1> : step == 2 ? decode<kBases, 8, 2> : decode<kBases, 8, 4>;
  return step == 1 ? decode<kBases, 16, 1> : step == 2 ? decode<kBases, 16, 2> : decode<kBases, 16, 4>;
}

template <int kBases>
Kernel bulk_kernel(int bits, int step) {
  if (bits == 8) {
    return step == 1 ? decode_bulk<kBases, 8, 1> : step == 2 ? decode_bulk<kBases, 8, 2> : decode_bulk<kBases, 8, 4>;
  }
  return step == 1 ? decode_bulk<kBases, 16, 1> : decode_bulk<kBases, 16, 2>;
}

template <class How, int kBases>
Kernel batch_kernel(int columns) {
  if (columns == 1) return batch<How, kBases, 1>;
  if (columns == 2) return batch<How, kBases, 2>;
  if constexpr (std::is_same_v<How, Bytes>) {
    return nullptr;  // too many registers
  } else {
    return columns == 4 ? batch<How, kBases, 4> : batch<How, kBases, 8>;
  }
}

inline Kernel decode_kernel(int bases, int bits, int step) {
  return with_bases(bases, [=](auto b) { return decode_kernel<b.value>(bits, step); });
}

inline Kernel bulk_kernel(int bases, int bits, int step) {
  return with_bases(bases, [=](auto b) { return bulk_kernel<b.value>(bits, step); });
}

template <class How>
Kernel batch_kernel(int bases, int columns) {
  return with_bases(bases, [=](auto b) { return batch_kernel<How, b.value>(columns); });
}

// A variant of `prompt`.
struct Prompt {
  void (*kernel)(Weights, Rows, CUtensorMap);
  int threads;
  size_t memory;
};

template <int kTokens, bool kSliced>
Prompt prompt_variant(int bases) {
  return with_bases(bases, [](auto b) {
    return Prompt{prompt<b.value, kTokens, kSliced>, kPromptThreads<kTokens>, kPromptMemory<kTokens>};
  });
}

template <bool kSliced>
Prompt prompt_variant(int bases, int rows) {
  return rows == 64    ? prompt_variant<64, kSliced>(bases)
         : rows == 128 ? prompt_variant<128, kSliced>(bases)
                       : prompt_variant<256, kSliced>(bases);
}

// `rows`: one of kPromptRows.
inline Prompt prompt_variant(int bases, int rows, bool sliced) {
  return sliced ? prompt_variant<true>(bases, rows) : prompt_variant<false>(bases, rows);
}

// A variant of `cluster`.
struct Cluster {
  Kernel kernel;
  int threads;
  int64_t (*bytes)(int block);          // of shared memory
  int (*block)(int words, int blocks);  // chunks of a block of a cluster
};

template <class How, int kBases>
Cluster cluster_variant() {
#if QBB_CUDA_90A
  using Plan = typename UsualPlan<How::kTokens, kBases>::Plan;
  return Cluster{cluster<How, kBases, Plan>, Plan::kThreads, ClusterMemory<How, kBases, Plan>::bytes, cluster_block<Plan>};
#else
  return Cluster{};
#endif
}

template <int kBases, bool kBrain>
Cluster halves_variant(int rows) {
  // Bits cost as much for each basis, look-ups of three hardly more than of two.
  constexpr bool kBits = kBases != 3;
  using Few = std::conditional_t<kBits, BitProducts<8, false>, HalfProducts<8, kBrain>>;
  return rows == 8    ? cluster_variant<Few, kBases>()
         : rows == 16 ? cluster_variant<HalfProducts<16, kBrain>, kBases>()
         : rows == 32 ? cluster_variant<HalfProducts<32, kBrain>, kBases>()
                      : cluster_variant<HalfProducts<64, kBrain>, kBases>();
}

template <int kBases>
Cluster cluster_variant(Type type, int rows) {
  if (type == kFloat16) return halves_variant<kBases, false>(rows);
  if (type == kBFloat16) return halves_variant<kBases, true>(rows);
  return rows == 8 ? cluster_variant<BitProducts<8, true>, kBases>() : cluster_variant<BitProducts<16, true>, kBases>();
}

// `rows`: one of kClusterRows; up to 16 for float32.
inline Cluster cluster_variant(int bases, Type type, int rows) {
  return with_bases(bases, [=](auto b) { return cluster_variant<b.value>(type, rows); });
}

}  // namespace qbb::cuda
