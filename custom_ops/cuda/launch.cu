#include "cuda/launch.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "cuda/general.cuh"
#include "cuda/tensor_map.h"
#include "cuda/variants.cuh"

namespace qbb::cuda {
namespace {

// How to launch `cluster`.
struct ClusterShape {
  int rows = 0, blocks = 0, clusters = 0, block = 0;  // of X at a time, 0 if none fits; of a cluster; at a time; chunks
  double cost = 0;
};

ClusterShape cluster_shape(const Weights& w, Type type, int64_t M, const Device& device) {
  ClusterShape best;
  const int sets = (w.tiles + kClusterTiles - 1) / kClusterTiles;
  for (const int rows : kClusterRows) {
    if (rows > 16 && type == kFloat32) break;
    const Cluster variant = cluster_variant(w.bases, type, rows);
    for (const int blocks : kClusterBlocks) {
      const int block = variant.block(w.words, blocks), at_a_time = device.clusters[blocks / 2];
      if (at_a_time == 0 || variant.bytes(block) > device.shared_memory) continue;
      const int clusters = std::min(sets, at_a_time);
      const double cost = cluster_cost((M + rows - 1) / rows, (sets + clusters - 1) / clusters, block, rows);
      if (best.rows == 0 || cost < best.cost) best = ClusterShape{rows, blocks, clusters, block, cost};
    }
    if (M <= rows && best.rows != 0) break;
  }
  return best;
}

// How to launch `prompt`.
struct PromptShape {
  int rows = 0, slices = 1, clusters = 0;  // of X at a time, 0 if none fits; of the inputs; of 2 * slices blocks each
  double cost = 0;
};

PromptShape prompt_shape(const Weights& w, const Rows& rows, int64_t M, const Device& device) {
  PromptShape best;
  const bool aligned = w.K % 8 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
  if (rows.type != kFloat16 || !aligned) return best;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  for (const int size : kPromptRows) {
    const int64_t parts = prompt_parts(w.tiles, M, size);
    for (int slices = 1; slices <= 4; ++slices) {
      const int at_a_time = device.clusters[slices];
      if (at_a_time == 0 || (slices > 1 && parts > at_a_time)) continue;  // parts in slices need a cluster for each
      const int64_t rounds = (parts + at_a_time - 1) / at_a_time;
      const double cost = prompt_cost(rounds, (chunks + slices - 1) / slices, size, slices);
      if (best.rows == 0 || cost < best.cost) {
        best = PromptShape{size, slices, static_cast<int>(std::min<int64_t>(parts, at_a_time)), cost};
      }
    }
  }
  return best;
}

template <class... Parameters>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t memory, const Device& device,
                  cudaStream_t stream, int cluster, const Parameters&... parameters) {
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
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

// A kernel may use so much shared memory.
template <class... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), size_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
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
bool fits(const Rule& rule, const Weights& w, const Rows& rows, int64_t M, bool integer, const Device& device) {
  switch (rule.path) {
    case Path::kDecode:
      return stages_of(rule, w, integer, device) >= kFewestStages ||
             static_cast<int64_t>(decode_memory(w.words, w.bases, integer ? 8 : 16, rule.step)) <= device.shared_memory;
    case Path::kBytes:
    case Path::kBatch: return batch_block(w.words, w.bases, kColumn, device.shared_memory) >= kBatchPiece;
    case Path::kCluster: {
      const ClusterShape shape = cluster_shape(w, rows.type, M, device);
      if (shape.rows == 0 || M <= kClusterOnly) return shape.rows != 0;
      const PromptShape other = prompt_shape(w, rows, M, device);
      return other.rows == 0 || shape.cost <= other.cost;
    }
    case Path::kPrompt: return prompt_shape(w, rows, M, device).rows != 0;
    default: return true;
  }
}

Rule rule_for(const Weights& w, const Rows& rows, int64_t M, bool integer, const Device& device) {
  constexpr Rule kAnything{0, kAnyArch, false, kAnyRows, Path::kGeneral, 1};
  const auto find = [&](const auto& rules) {
    for (const Rule& rule : rules) {
      if (device.arch < rule.arch || rule.last_arch < device.arch || rule.rows < M) continue;
      if ((integer || !rule.only_int8) && fits(rule, w, rows, M, integer, device)) return rule;
    }
    return kAnything;
  };
  if (!regular(w)) return kAnything;
  return rows.type == kFloat32 ? find(kFloatRules) : find(kHalfRules);
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
  for (const int rows : kPromptRows) {
    for (const bool sliced : {false, true}) {
      const Prompt variant = prompt_variant(w.bases, rows, sliced);
      const cudaError_t status = allow(variant.kernel, variant.memory);
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

cudaError_t count_clusters(Device& device) {
  if (device.arch != kWarpgroupArch) return cudaSuccess;
  const Cluster variant = cluster_variant(1, kFloat16, kClusterRows[0]);
  const auto memory = static_cast<size_t>(device.shared_memory);
  cudaError_t status = allow(variant.kernel, memory);
  for (size_t i = 1; status == cudaSuccess && i < std::size(device.clusters); ++i) {
    const auto blocks = static_cast<unsigned>(2 * i);
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = blocks;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
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
  const Rule rule = rule_for(w, rows, M, integer, device);
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
                       bulk_memory(w.words, w.bases, offset, bits, rule.step, stages), device, stream, 0, w, staged);
        if (status != cudaSuccess) return status;
        continue;
      }
      status = start(decode_kernel(w.bases, bits, rule.step), dim3(std::min(tiles, device.multiprocessors)),
                     kDecodeWarps * 32, decode_memory(w.words, w.bases, bits, rule.step), device, stream, 0, w, part);
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
                     kBatchWarps * 32, batch_memory(w.bases, columns * kColumn, staged.block), device, stream, 0, w, staged);
    } else if (rule.path == Path::kCluster) {
      const ClusterShape shape = cluster_shape(w, rows.type, count, device);
      const Cluster variant = cluster_variant(w.bases, rows.type, shape.rows);
      Rows staged = part;
      staged.block = shape.block;
      status = start(variant.kernel, dim3(static_cast<unsigned>(shape.clusters * shape.blocks)), variant.threads,
                     static_cast<size_t>(variant.bytes(shape.block)), device, stream, shape.blocks, w, staged);
    } else if (rule.path == Path::kPrompt) {
      const PromptShape shape = prompt_shape(w, part, count, device);
      const Prompt variant = prompt_variant(w.bases, shape.rows, shape.slices > 1);
      CUtensorMap map{};
      status = describe_rows(map, part.x, w.K, count, kRowBytes / 2, shape.rows / 2);
      if (status != cudaSuccess) return status;
      const int blocks = 2 * shape.slices;
      status = start(variant.kernel, dim3(static_cast<unsigned>(shape.clusters * blocks)), variant.threads, variant.memory, device,
                     stream, blocks, w, part, map);
    } else {
      status = start(general, dim3(tiles, static_cast<unsigned>(count)), kGeneralWarps * 32, 0, device, stream, 0, w, part);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace qbb::cuda
