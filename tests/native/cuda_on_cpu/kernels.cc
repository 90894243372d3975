// The CUDA kernels on a CPU, for tests/native/test_cuda_on_cpu.py.
#include "emulate.h"

#include "cuda/batch.cuh"
#include "cuda/cluster.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_bulk.cuh"
#include "cuda/general.cuh"
#include "cuda/prompt.cuh"

using namespace qbb::cuda;

namespace {

using Kernel = std::function<void(Weights, Rows)>;

template <int kBases>
Kernel decode_of(int bits, int step) {
  if (bits == 8) return step == 1 ? decode<kBases, 8, 1> : step == 2 ? decode<kBases, 8, 2> : decode<kBases, 8, 4>;
  return step == 1 ? decode<kBases, 16, 1> : step == 2 ? decode<kBases, 16, 2> : decode<kBases, 16, 4>;
}

template <int kBases>
Kernel bulk_of(int bits, int step) {
  if (bits == 8) {
    return step == 1 ? decode_bulk<kBases, 8, 1> : step == 2 ? decode_bulk<kBases, 8, 2> : decode_bulk<kBases, 8, 4>;
  }
  return step == 1 ? decode_bulk<kBases, 16, 1> : decode_bulk<kBases, 16, 2>;
}

template <class How, int kBases>
Kernel batch_of(int columns) {
  if constexpr (!std::is_same_v<How, Bytes>) {
    if (columns >= 4) return columns == 4 ? batch<How, kBases, 4> : batch<How, kBases, 8>;
  }
  return columns == 1 ? batch<How, kBases, 1> : batch<How, kBases, 2>;
}

template <class How, int kBases, class Plan>
Kernel cluster_of(const Weights& w, unsigned blocks, int& threads, size_t& memory, Rows& rows) {
  threads = Plan::kThreads;
  rows.block = cluster_block<Plan>(w.words, static_cast<int>(blocks));
  memory = static_cast<size_t>(ClusterMemory<How, kBases, Plan>::bytes(rows.block));
  return cluster<How, kBases, Plan>;
}

}  // namespace

// path: 0 decode (option: 100 * bits + rows), 1 batch (option: columns), 2 prompt (option: rows), 3 general, 4 bytes (columns),
// 5 cluster, as whole numbers, 6 as float16 (option: 100 * blocks of a cluster + rows),
// 7 decode_bulk (100 * bits + rows).
// Returns 0, 1 if threads wait for each other for ever, 2 for an unknown kernel.
extern "C" int run_on_cpu(int path, int option, int blocks, const Weights* w, const Rows* rows) {
  Kernel kernel = nullptr;
  dim3 grid(static_cast<unsigned>(blocks));
  int threads = 0;
  size_t memory = 0;
  Rows operands = *rows;
  const unsigned cluster_blocks = path == 5 || path == 6 ? static_cast<unsigned>(option / 100) : path == 2 ? 2 : 1;
  const auto pick = [&](auto bases) {
    constexpr int kBases = decltype(bases)::value;
    const auto pick_cluster = [&](auto how, auto plan) {
      kernel = cluster_of<decltype(how), kBases, decltype(plan)>(*w, cluster_blocks, threads, memory, operands);
    };
    if (path == 5 && rows->type == kFloat32) pick_cluster(ByteProducts<8, true>{}, ClusterPlan<2, 4, 2, 1>{});
    if (path == 5 && rows->type != kFloat32) {
      if (option % 100 == 8) pick_cluster(ByteProducts<8, false>{}, ClusterPlan<1, 2, 4, 1>{});
      if (option % 100 == 16) pick_cluster(ByteProducts<16, false>{}, ClusterPlan<3, 6, 2, 1>{});
    }
    if (path == 6 && rows->type == kFloat16) {
      if (option % 100 == 8) pick_cluster(HalfProducts<8, false>{}, ClusterPlan<2, 4, 2, 1>{});
      if (option % 100 == 32) pick_cluster(HalfProducts<32, false>{}, ClusterPlan<3, 3, 4, 1>{});
    }
    if (path == 6 && rows->type == kBFloat16) {
      if (option % 100 == 8) pick_cluster(HalfProducts<8, true>{}, ClusterPlan<1, 2, 2, 1>{});
      if (option % 100 == 32) pick_cluster(HalfProducts<32, true>{}, ClusterPlan<2, 6, 4, 1>{});
    }
    if (path == 0) kernel = decode_of<kBases>(option / 100, option % 100);
    if (path == 7) kernel = bulk_of<kBases>(option / 100, option % 100);
    if (path == 1) kernel = rows->type == kBFloat16 ? batch_of<Halves<true>, kBases>(option) : batch_of<Halves<false>, kBases>(option);
    if (path == 4) kernel = batch_of<Bytes, kBases>(option);
    if (path == 2) {
      const Matrix x{static_cast<const uint16_t*>(rows->x), w->K, rows->M, kRowBytes / 2, option / 2};
      CUtensorMap map{};
      std::memcpy(&map, &x, sizeof x);
      const auto of_rows = option == 64 ? prompt<kBases, 64> : option == 128 ? prompt<kBases, 128> : prompt<kBases, 256>;
      kernel = [=](Weights weights, Rows all) { of_rows(weights, all, map); };
    }
  };
  switch (w->bases) {
    case 1: pick(std::integral_constant<int, 1>{}); break;
    case 2: pick(std::integral_constant<int, 2>{}); break;
    case 3: pick(std::integral_constant<int, 3>{}); break;
    case 4: pick(std::integral_constant<int, 4>{}); break;
    default: break;
  }
  if (path == 0) {
    threads = kDecodeWarps * 32;
    memory = decode_memory(w->words, w->bases, option / 100, option % 100);
  } else if (path == 7) {
    threads = kBulkThreads;
    const bool offset = w->offset != nullptr;
    if (operands.block == 0) operands.block = bulk_stages(w->words, w->bases, offset, option / 100, option % 100, 227 << 10);
    memory = bulk_memory(w->words, w->bases, offset, option / 100, option % 100, operands.block);
  } else if (path == 1 || path == 4) {
    threads = kBatchWarps * 32;
    if (operands.block == 0) operands.block = batch_block(w->words, w->bases, option * kColumn, 227 << 10);
    memory = batch_memory(w->bases, option * kColumn, operands.block);
    grid.y = static_cast<unsigned>((rows->M + option * kColumn - 1) / (option * kColumn));
  } else if (path == 2) {
    threads = kPromptThreads;
    memory = option == 64 ? kPromptMemory<64> : option == 128 ? kPromptMemory<128> : kPromptMemory<256>;
  } else if (path == 3) {
    kernel = general;
    threads = kGeneralWarps * 32;
    grid = dim3(static_cast<unsigned>(w->tiles), static_cast<unsigned>(rows->M));
  }
  if (!kernel) return 2;
  return emulate::run(grid, threads, memory, [&] { kernel(*w, operands); }, cluster_blocks) ? 0 : 1;
}
