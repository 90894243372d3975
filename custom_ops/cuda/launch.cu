#include "cuda/launch.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <type_traits>

#include "cuda/batch.cuh"
#include "cuda/cluster.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_bulk.cuh"
#include "cuda/general.cuh"
#include "cuda/prompt.cuh"

namespace qbb::cuda {
namespace {

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

Kernel decode_kernel(int bases, int bits, int step) {
  switch (bases) {
    case 1: return decode_kernel<1>(bits, step);
    case 2: return decode_kernel<2>(bits, step);
    case 3: return decode_kernel<3>(bits, step);
    default: return decode_kernel<4>(bits, step);
  }
}

Kernel bulk_kernel(int bases, int bits, int step) {
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

template <int kTokens>
Kernel prompt_kernel(int bases) {
  switch (bases) {
    case 1: return prompt<1, kTokens>;
    case 2: return prompt<2, kTokens>;
    case 3: return prompt<3, kTokens>;
    default: return prompt<4, kTokens>;
  }
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
Cluster cluster_variant(int bases, Type type, int rows) {
  switch (bases) {
    case 1: return cluster_variant<1>(type, rows);
    case 2: return cluster_variant<2>(type, rows);
    case 3: return cluster_variant<3>(type, rows);
    default: return cluster_variant<4>(type, rows);
  }
}

// How to launch `cluster`.
struct ClusterShape {
  int rows = 0, blocks = 0, clusters = 0, block = 0;  // of X at a time, 0 if none fits; of a cluster; at a time; chunks
};

ClusterShape cluster_shape(const Weights& w, Type type, int64_t M, const Device& device) {
  ClusterShape best;
  double least = 0;
  const int sets = (w.tiles + kClusterTiles - 1) / kClusterTiles;
  for (const int rows : kClusterRows) {
    if (rows > 16 && type == kFloat32) break;
    const Cluster variant = cluster_variant(w.bases, type, rows);
    for (size_t i = 0; i < std::size(kClusterBlocks); ++i) {
      const int blocks = kClusterBlocks[i], block = variant.block(w.words, blocks);
      if (device.clusters[i] == 0 || variant.bytes(block) > device.shared_memory) continue;
      const int clusters = std::min(sets, device.clusters[i]);
      const double cost = cluster_cost((M + rows - 1) / rows, (sets + clusters - 1) / clusters, block, rows);
      if (best.rows == 0 || cost < least) {
        best = ClusterShape{rows, blocks, clusters, block};
        least = cost;
      }
    }
    if (M <= rows && best.rows != 0) break;
  }
  return best;
}

cudaError_t start(Kernel kernel, dim3 grid, int threads, size_t memory, const Weights& w, const Rows& rows,
                  const Device& device, cudaStream_t stream, int cluster = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  // The kernel asks for its weights while the one before it ends (wait_for_previous_kernel).
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = device.arch < 90 ? 0 : cluster == 0 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, w, rows);
}

// A kernel may use so much shared memory.
cudaError_t allow(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Whether parts of 128 rows of X are faster than those of 256. They take about 3/5 of the time, as weights have to be made
// all the same, but may leave fewer multiprocessors without work.
bool prefer_small_parts(int64_t small, int64_t large, int multiprocessors) {
  const auto turns = [&](int64_t parts) { return (parts + multiprocessors - 1) / multiprocessors; };
  return 3 * turns(small) < 5 * turns(large);
}

// Where rows `first` and on of X and Y begin.
Rows from_row(const Rows& rows, const Weights& w, int64_t first, int64_t count) {
  const int64_t size = rows.type == kFloat32 ? 4 : 2;
  return Rows{static_cast<const char*>(rows.x) + first * w.K * size, static_cast<char*>(rows.y) + first * w.N * size,
              rows.type, static_cast<int>(count), 0};
}

// Whether the fast kernels take such weights; the general one takes all.
bool regular(const Weights& w) {
  const int chunks = w.group_words / kChunkWords;
  const bool power = w.group_words % kChunkWords == 0 && (chunks & (chunks - 1)) == 0;
  return w.half_scales && w.bases <= 4 && (power || w.group_words == w.words);
}

// Of weights in shared memory by decode_bulk.cuh; below kFewestStages, decode.cuh is faster.
int stages_of(const Rule& rule, const Weights& w, bool integer, const Device& device) {
  if (device.arch < kBulkArch) return 0;
  return bulk_stages(w.words, w.bases, w.offset != nullptr, integer ? 8 : 16, rule.step, device.shared_memory);
}

// Whether what the rule's kernel needs at least fits into shared memory.
bool fits(const Rule& rule, const Weights& w, Type type, int64_t M, bool integer, const Device& device) {
  switch (rule.path) {
    case Path::kDecode:
      return stages_of(rule, w, integer, device) >= kFewestStages ||
             static_cast<int64_t>(decode_memory(w.words, w.bases, integer ? 8 : 16, rule.step)) <= device.shared_memory;
    case Path::kBytes:
    case Path::kBatch: return batch_block(w.words, w.bases, kColumn, device.shared_memory) >= kBatchPiece;
    case Path::kCluster: return cluster_shape(w, type, M, device).rows != 0;
    case Path::kPrompt: return type == kFloat16;
    default: return true;
  }
}

Rule rule_for(const Weights& w, Type type, int64_t M, bool integer, const Device& device) {
  constexpr Rule kAnything{0, kAnyArch, false, kAnyRows, Path::kGeneral, 1};
  const auto find = [&](const auto& rules) {
    for (const Rule& rule : rules) {
      if (device.arch < rule.arch || rule.last_arch < device.arch || rule.rows < M) continue;
      if ((integer || !rule.only_int8) && fits(rule, w, type, M, integer, device)) return rule;
    }
    return kAnything;
  };
  if (!regular(w)) return kAnything;
  return type == kFloat32 ? find(kFloatRules) : find(kHalfRules);
}

}  // namespace

cudaError_t reserve(const Weights& w, const Device& device) {
  if (!regular(w)) return cudaSuccess;
  const auto most = static_cast<size_t>(device.shared_memory);
  for (const int step : {1, 2, 4, 8}) {
    std::array<Kernel, 7> kernels{batch_kernel<Bytes>(w.bases, step), batch_kernel<Halves<false>>(w.bases, step),
                                  batch_kernel<Halves<true>>(w.bases, step)};
    if (step < 8) kernels[3] = decode_kernel(w.bases, 8, step), kernels[4] = decode_kernel(w.bases, 16, step);
    if (step < 8 && device.arch >= kBulkArch) kernels[5] = bulk_kernel(w.bases, 8, step);
    if (step < 4 && device.arch >= kBulkArch) kernels[6] = bulk_kernel(w.bases, 16, step);
    for (const Kernel kernel : kernels) {
      const cudaError_t status = kernel == nullptr ? cudaSuccess : allow(kernel, most);
      if (status != cudaSuccess) return status;
    }
  }
  if (device.arch != kWarpgroupArch) return cudaSuccess;
  for (const Type type : {kFloat16, kBFloat16, kFloat32}) {
    for (const int rows : kClusterRows) {
      const cudaError_t status = allow(cluster_variant(w.bases, type, rows).kernel, most);
      if (status != cudaSuccess) return status;
    }
  }
  const cudaError_t status = allow(prompt_kernel<128>(w.bases), kPromptMemory<128>);
  return status != cudaSuccess ? status : allow(prompt_kernel<256>(w.bases), kPromptMemory<256>);
}

cudaError_t count_clusters(Device& device) {
  if (device.arch != kWarpgroupArch) return cudaSuccess;
  const Cluster variant = cluster_variant(1, kFloat16, kClusterRows[0]);
  const auto memory = static_cast<size_t>(device.shared_memory);
  cudaError_t status = allow(variant.kernel, memory);
  for (size_t i = 0; status == cudaSuccess && i < std::size(kClusterBlocks); ++i) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = static_cast<unsigned>(kClusterBlocks[i]);
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(kClusterBlocks[i]));
    config.blockDim = dim3(static_cast<unsigned>(variant.threads));
    config.dynamicSmemBytes = memory;
    config.attrs = &size;
    config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&device.clusters[i], variant.kernel, &config);
  }
  return status;
}

cudaError_t launch(const Weights& w, const Rows& rows, int64_t M, bool integer, const Device& device,
                   cudaStream_t stream) {
  const Rule rule = rule_for(w, rows.type, M, integer, device);
  const int tiles = w.tiles;
  constexpr int64_t kGridRows = 32768;  // of blocks, at most
  int64_t step = rule.step;
  if (rule.path != Path::kDecode && rule.path != Path::kGeneral) step = kGridRows * kColumn;
  if (rule.path == Path::kGeneral) step = kGridRows;
  for (int64_t row = 0; row < M; row += step) {
    const int64_t count = std::min(M - row, step);
    const Rows part = from_row(rows, w, row, count);
    cudaError_t status = cudaSuccess;
    if (rule.path == Path::kDecode) {
      const int bits = integer ? 8 : 16;
      const bool offset = w.offset != nullptr;
      const int stages = stages_of(rule, w, integer, device);
      if (stages >= kFewestStages) {
        Rows staged = part;
        staged.block = stages;
        status = start(bulk_kernel(w.bases, bits, rule.step), dim3(std::min(tiles, device.multiprocessors)), kBulkThreads,
                       bulk_memory(w.words, w.bases, offset, bits, rule.step, stages), w, staged, device, stream);
        if (status != cudaSuccess) return status;
        continue;
      }
      status = start(decode_kernel(w.bases, bits, rule.step), dim3(std::min(tiles, device.multiprocessors)),
                     kDecodeWarps * 32, decode_memory(w.words, w.bases, bits, rule.step), w, part, device, stream);
    } else if (rule.path == Path::kBatch || rule.path == Path::kBytes) {
      const bool bytes = rule.path == Path::kBytes;
      int columns = bytes ? 2 : 8;
      while (columns > 1 && (count <= columns / 2 * kColumn ||
                             batch_block(w.words, w.bases, columns * kColumn, device.shared_memory) < kBatchPiece)) {
        columns /= 2;
      }
      const Kernel kernel = bytes                      ? batch_kernel<Bytes>(w.bases, columns)
                            : rows.type == kBFloat16 ? batch_kernel<Halves<true>>(w.bases, columns)
                                                       : batch_kernel<Halves<false>>(w.bases, columns);
      const int64_t blocks = (count + columns * kColumn - 1) / (columns * kColumn);
      Rows staged = part;
      staged.block = batch_block(w.words, w.bases, columns * kColumn, device.shared_memory);
      status = start(kernel, dim3(std::min(tiles, device.multiprocessors), static_cast<unsigned>(blocks)),
                     kBatchWarps * 32, batch_memory(w.bases, columns * kColumn, staged.block), w, staged, device, stream);
    } else if (rule.path == Path::kCluster) {
      const ClusterShape shape = cluster_shape(w, rows.type, count, device);
      const Cluster variant = cluster_variant(w.bases, rows.type, shape.rows);
      Rows staged = part;
      staged.block = shape.block;
      status = start(variant.kernel, dim3(static_cast<unsigned>(shape.clusters * shape.blocks)), variant.threads,
                     static_cast<size_t>(variant.bytes(shape.block)), w, staged, device, stream, shape.blocks);
    } else if (rule.path == Path::kPrompt) {
      const int64_t small = prompt_parts<128>(tiles, count), large = prompt_parts<256>(tiles, count);
      const bool halve = prefer_small_parts(small, large, device.multiprocessors);
      const dim3 grid(static_cast<unsigned>(std::min<int64_t>(halve ? small : large, device.multiprocessors)));
      status = start(halve ? prompt_kernel<128>(w.bases) : prompt_kernel<256>(w.bases), grid, kPromptThreads,
                     halve ? kPromptMemory<128> : kPromptMemory<256>, w, part, device, stream);
    } else {
      status = start(general, dim3(tiles, static_cast<unsigned>(count)), kGeneralWarps * 32, 0, w, part, device, stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace qbb::cuda
