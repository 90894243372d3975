// Which instances of the kernels there are, by bases, rows of X and types.
#pragma once

#include <type_traits>

#include "cuda/batch.cuh"
#include "cuda/cluster.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_bulk.cuh"
#include "cuda/prompt.cuh"

namespace qbb::cuda {

using Kernel = void (*)(Weights, Rows);

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
  switch (bases) {
    case 1: return decode_kernel<1>(bits, step);
    case 2: return decode_kernel<2>(bits, step);
    case 3: return decode_kernel<3>(bits, step);
    default: return decode_kernel<4>(bits, step);
  }
}

inline Kernel bulk_kernel(int bases, int bits, int step) {
  switch (bases) {
    case 1: return bulk_kernel<1>(bits, step);
    case 2: return bulk_kernel<2>(bits, step);
    case 3: return bulk_kernel<3>(bits, step);
    default: return bulk_kernel<4>(bits, step);
  }
}

template <class How>
Kernel batch_kernel(int bases, int columns) {
  switch (bases) {
    case 1: return batch_kernel<How, 1>(columns);
    case 2: return batch_kernel<How, 2>(columns);
    case 3: return batch_kernel<How, 3>(columns);
    default: return batch_kernel<How, 4>(columns);
  }
}

// A variant of `prompt`.
struct Prompt {
  void (*kernel)(Weights, Rows, CUtensorMap);
  size_t memory;
};

template <int kTokens, bool kSliced>
Prompt prompt_variant(int bases) {
  constexpr size_t kMemory = kPromptMemory<kTokens>;
  switch (bases) {
    case 1: return {prompt<1, kTokens, kSliced>, kMemory};
    case 2: return {prompt<2, kTokens, kSliced>, kMemory};
    case 3: return {prompt<3, kTokens, kSliced>, kMemory};
    default: return {prompt<4, kTokens, kSliced>, kMemory};
  }
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
  using Plan = UsualPlan<How::kTokens, kBases>;
  return Cluster{cluster<How, kBases, Plan>, Plan::kThreads, ClusterMemory<How, kBases, Plan>::bytes, cluster_block<Plan>};
#else
  return Cluster{};
#endif
}

template <int kBases, bool kBrain>
Cluster halves_variant(int rows) {
  return rows == 8    ? cluster_variant<HalfProducts<8, kBrain>, kBases>()
         : rows == 16 ? cluster_variant<HalfProducts<16, kBrain>, kBases>()
         : rows == 32 ? cluster_variant<HalfProducts<32, kBrain>, kBases>()
                      : cluster_variant<HalfProducts<64, kBrain>, kBases>();
}

template <int kBases>
Cluster cluster_variant(Type type, int rows) {
  if (type == kFloat16) return halves_variant<kBases, false>(rows);
  if (type == kBFloat16) return halves_variant<kBases, true>(rows);
  return rows == 8 ? cluster_variant<ByteProducts<8, true>, kBases>() : cluster_variant<ByteProducts<16, true>, kBases>();
}

// `rows`: one of kClusterRows; up to 16 for float32.
inline Cluster cluster_variant(int bases, Type type, int rows) {
  switch (bases) {
    case 1: return cluster_variant<1>(type, rows);
    case 2: return cluster_variant<2>(type, rows);
    case 3: return cluster_variant<3>(type, rows);
    default: return cluster_variant<4>(type, rows);
  }
}

}  // namespace qbb::cuda
