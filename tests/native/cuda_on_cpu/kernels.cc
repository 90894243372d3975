// The CUDA kernels on a CPU, for tests/native/test_cuda_on_cpu.py.
#include "emulate.h"

#include "cuda/general.cuh"
#include "cuda/variants.cuh"

using namespace qbb::cuda;

namespace {

template <class How, int kBases, class Plan>
Kernel cluster_of(const Weights& w, unsigned blocks, int& threads, size_t& memory, Rows& rows) {
  threads = Plan::kThreads;
  rows.block = cluster_block<Plan>(w.words, static_cast<int>(blocks));
  memory = static_cast<size_t>(ClusterMemory<How, kBases, Plan>::bytes(rows.block));
  return cluster<How, kBases, Plan>;
}

}  // namespace

// path: 0 decode (option: 100 * bits + rows), 1 batch (option: columns), 2 prompt (option: 1000 * blocks of a cluster + rows),
// 3 general, 4 bytes (columns), 5 cluster, as whole numbers, 6 as float16 (option: 100 * blocks of a cluster + rows),
// 7 decode_bulk (100 * bits + rows).
// Returns 0, 1 if threads wait for each other for ever, 2 for an unknown kernel.
extern "C" int run_on_cpu(int path, int option, int blocks, const Weights* w, const Rows* rows) {
  std::function<void(Weights, Rows)> kernel;
  dim3 grid(static_cast<unsigned>(blocks));
  int threads = 0;
  size_t memory = 0;
  Rows operands = *rows;
  const auto cluster_blocks = static_cast<unsigned>(path == 5 || path == 6 ? option / 100 : path == 2 ? option / 1000 : 1);
  const auto pick = [&](auto bases) {
    constexpr int kBases = decltype(bases)::value;
    const auto pick_cluster = [&](auto how, auto plan) {
      kernel = cluster_of<decltype(how), kBases, decltype(plan)>(*w, cluster_blocks, threads, memory, operands);
    };
    if (path == 5 && rows->type == kFloat32) pick_cluster(BitProducts<8, true>{}, ClusterPlan<2, 4, 2, 1>{});
    if (path == 5 && rows->type != kFloat32) {
      if (option % 100 == 8) pick_cluster(BitProducts<8, false>{}, ClusterPlan<1, 2, 4, 1>{});
      if (option % 100 == 16) pick_cluster(BitProducts<16, false>{}, ClusterPlan<3, 6, 2, 1>{});
    }
    if (path == 6 && rows->type == kFloat16) {
      if (option % 100 == 8) pick_cluster(HalfProducts<8, false>{}, ClusterPlan<2, 4, 2, 1>{});
      if (option % 100 == 32) pick_cluster(HalfProducts<32, false>{}, ClusterPlan<3, 3, 4, 1>{});
    }
    if (path == 6 && rows->type == kBFloat16) {
      if (option % 100 == 8) pick_cluster(HalfProducts<8, true>{}, ClusterPlan<1, 2, 2, 1>{});
      if (option % 100 == 32) pick_cluster(HalfProducts<32, true>{}, ClusterPlan<2, 6, 4, 1>{});
    }
  };
  if (path == 5 || path == 6) with_bases(w->bases, pick);
  if (path == 0) {
    kernel = decode_kernel(w->bases, option / 100, option % 100);
    threads = kDecodeWarps * 32;
    memory = decode_memory(w->words, w->bases, option / 100, option % 100);
  } else if (path == 7) {
    kernel = bulk_kernel(w->bases, option / 100, option % 100);
    threads = kBulkThreads;
    const bool offset = w->offset != nullptr;
    if (operands.block == 0) operands.block = bulk_stages(w->words, w->bases, offset, option / 100, option % 100, 227 << 10);
    memory = bulk_memory(w->words, w->bases, offset, option / 100, option % 100, operands.block);
  } else if (path == 1 || path == 4) {
    kernel = path == 4                 ? batch_kernel<Bytes>(w->bases, option)
             : rows->type == kBFloat16 ? batch_kernel<Halves<true>>(w->bases, option)
                                       : batch_kernel<Halves<false>>(w->bases, option);
    threads = kBatchWarps * 32;
    if (operands.block == 0) operands.block = batch_block(w->words, w->bases, option * kColumn, 227 << 10);
    memory = batch_memory(w->bases, option * kColumn, operands.block);
    grid.y = static_cast<unsigned>((rows->M + option * kColumn - 1) / (option * kColumn));
  } else if (path == 2) {
    const int tokens = option % 1000;
    const Matrix x{static_cast<const uint16_t*>(rows->x), w->K, rows->M, kRowBytes / 2, tokens / 2};
    CUtensorMap map{};
    std::memcpy(&map, &x, sizeof x);
    const Prompt variant = prompt_variant(w->bases, tokens, option / 1000 > 2);
    kernel = [=](Weights weights, Rows all) { variant.kernel(weights, all, map); };
    threads = variant.threads;
    memory = variant.memory;
  } else if (path == 3) {
    kernel = general;
    threads = kGeneralWarps * 32;
    grid = dim3(static_cast<unsigned>(w->tiles), static_cast<unsigned>(rows->M));
  }
  if (!kernel) return 2;
  return emulate::run(grid, threads, memory, [&] { kernel(*w, operands); }, cluster_blocks) ? 0 : 1;
}
