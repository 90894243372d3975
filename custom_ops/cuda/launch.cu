#include "cuda/launch.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "cuda/batch.cuh"
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

cudaError_t start(Kernel kernel, dim3 grid, int threads, size_t memory, const Weights& w, const Rows& rows,
                  const Device& device, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  // The kernel asks for its weights while the one before it ends (wait_for_previous_kernel).
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = device.arch >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, w, rows);
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

Rule rule_for(const Weights& w, Type type, int64_t M, bool integer, const Device& device) {
  constexpr Rule kAnything{0, kAnyArch, false, kAnyRows, Path::kGeneral, 1};
  const auto find = [&](const auto& rules) {
    for (const Rule& rule : rules) {
      if (rule.path == Path::kPrompt && type != kFloat16) continue;
      const bool fits = rule.arch <= device.arch && device.arch <= rule.last_arch;
      if (fits && (integer || !rule.only_int8) && M <= rule.rows) return rule;
    }
    return kAnything;
  };
  if (!regular(w, device)) return kAnything;
  return type == kFloat32 ? find(kFloatRules) : find(kHalfRules);
}

}  // namespace

bool regular(const Weights& w, const Device& device) {
  const int chunks = w.group_words / kChunkWords;
  const bool power = w.group_words % kChunkWords == 0 && (chunks & (chunks - 1)) == 0;
  return w.half_scales && w.bases <= 4 && (power || w.group_words == w.words) &&
         static_cast<int64_t>(decode_memory(w.words, w.bases, 16, 4)) <= device.shared_memory;
}

cudaError_t reserve(const Weights& w, const Device& device) {
  if (!regular(w, device)) return cudaSuccess;
  const auto allow = [](Kernel kernel, size_t bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  };
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
  const cudaError_t status = allow(prompt_kernel<128>(w.bases), kPromptMemory<128>);
  return status != cudaSuccess ? status : allow(prompt_kernel<256>(w.bases), kPromptMemory<256>);
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
      const int stages = device.arch < kBulkArch
                             ? 0
                             : bulk_stages(w.words, w.bases, offset, bits, rule.step, device.shared_memory);
      if (stages >= kFewestStages) {
        Rows staged = part;
        staged.block = stages;
        const int blocks = bulk_blocks(w.words, tiles, stages, device.multiprocessors);
        status = start(bulk_kernel(w.bases, bits, rule.step), dim3(blocks), kBulkThreads,
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
