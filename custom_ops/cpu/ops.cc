// The C interface of include/qbb/ops.h on top of the core and the CPU kernels.
#include "qbb/ops.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "core/error.h"
#include "core/guard.h"
#include "core/matrix.h"
#include "core/partition.h"
#include "cpu/dispatch.h"

struct qbb_kernel {
  qbb_kernel(const qbb_matrix& m, int32_t a_mode, const qbb::cpu::Kernel& k) : matrix(m), mode(a_mode), kernel(k) {}

  const qbb::core::Matrix matrix;
  const int32_t mode;
  const qbb::cpu::Kernel& kernel;
};

namespace {

using qbb::core::Error;
using qbb::core::guard;
using qbb::core::need;
using qbb::cpu::Path;

// A matrix times some rows of X, cut into tasks.
struct Run {
  const qbb::cpu::Kernel* kernel;
  qbb::core::Partition partition;
  int64_t segments_per_task;
  qbb::cpu::Block all;
};

void product_task(void* arg, int64_t i) {
  const Run& run = *static_cast<const Run*>(arg);
  // Neighbouring tasks share a chunk of weights, so that it is still in a cache when the next block of rows wants it.
  qbb::cpu::Block block = run.all;
  block.row = i % run.partition.row_blocks * run.partition.rows;
  block.tile = i / run.partition.row_blocks * run.partition.chunk;
  block.rows = std::min(run.all.M - block.row, run.partition.rows);
  block.tiles = std::min(run.all.w->tiles - block.tile, run.partition.chunk);
  const bool floats = block.path == Path::kFloatTables || block.path == Path::kFloatProduct;
  (floats ? run.kernel->run_floats : run.kernel->run_bytes)(block);
}

void prepare_task(void* arg, int64_t i) {
  const Run& run = *static_cast<const Run*>(arg);
  qbb::cpu::Block block = run.all;
  block.segment = i * run.segments_per_task;
  block.segments = std::min(block.w->num_segments - block.segment, run.segments_per_task);
  block.rows = block.M;
  run.kernel->prepare(block);
}

Path path_of(int32_t mode, int64_t bases, int64_t M) {
  const bool many = qbb::core::many_rows(mode, bases, M);
  switch (mode) {
    case QBB_MODE_INT8: return many ? Path::kByteProduct : Path::kByteTables;
    case QBB_MODE_INT16: return many ? Path::kFloatProduct : Path::kWordTables;  // nothing to gain from 16 bits there
    default: return many ? Path::kFloatProduct : Path::kFloatTables;
  }
}

// Memory for the activations of an integer mode, in one piece.
class Scratch {
 public:
  Scratch(const qbb::core::Tiled& w, int64_t M, Path path) {
    // A kernel reads some rows of each word. An odd distance from word to word spreads them over all of a cache.
    const int64_t rows = path != Path::kByteProduct && M > 4 ? M | 1 : M;
    const int64_t inputs = w.words * QBB_WORD_BITS * rows;
    const int64_t codes = path == Path::kByteProduct ? inputs : inputs * (path == Path::kWordTables ? 8 : 4);
    const int64_t numbers = w.num_segments * M;
    memory_.reset(::operator new(static_cast<size_t>(codes + 8 * numbers), kAlignment));
    activations.codes = static_cast<uint8_t*>(memory_.get());
    activations.table_rows = rows;
    activations.steps = reinterpret_cast<float*>(activations.codes + codes);
    activations.totals = reinterpret_cast<int32_t*>(activations.steps + numbers);
  }

  qbb::cpu::Activations activations{};

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
};

void for_all(int64_t count, void (*task)(void* arg, int64_t i), Run* run, qbb_parallel_for parallel_for, void* pool) {
  if (parallel_for == nullptr || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(run, i);
  } else {
    parallel_for(pool, count, task, run);
  }
}

void run_rows(const qbb_kernel& kernel, Path path, bool half, int64_t M, const void* x, void* y,
              qbb_parallel_for parallel_for, void* pool) {
  const qbb::core::Tiled& w = kernel.matrix.tiled();
  const bool many = path == Path::kFloatProduct || path == Path::kByteProduct;
  Run run{&kernel.kernel, qbb::core::partition(w, M, many), 0, {}};
  run.all.w = &w;
  run.all.x = x;
  run.all.y = y;
  run.all.half = half;
  run.all.M = M;
  run.all.path = path;
  std::unique_ptr<Scratch> scratch;
  if (path != Path::kFloatTables && path != Path::kFloatProduct) {
    scratch.reset(new Scratch(w, M, path));
    run.all.a = scratch->activations;
    run.segments_per_task = qbb::core::segments_per_task(w, M);
    const int64_t tasks = (w.num_segments + run.segments_per_task - 1) / run.segments_per_task;
    for_all(tasks, prepare_task, &run, parallel_for, pool);
  }
  for_all(run.partition.tasks(), product_task, &run, parallel_for, pool);
}

}  // namespace

extern "C" {

qbb_status qbb_matrix_validate(const qbb_matrix* matrix, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    need(matrix, "matrix");
    qbb::core::validate(*matrix);
  });
}

qbb_status qbb_kernel_create(const qbb_matrix* matrix, int32_t mode, const char* isa, qbb_kernel** kernel, char* error,
                             size_t error_size) {
  return guard(error, error_size, [&] {
    need(kernel, "kernel");
    *kernel = nullptr;
    need(matrix, "matrix");
    qbb::core::check_mode(mode);
    *kernel = new qbb_kernel(*matrix, mode, qbb::cpu::select_kernel(isa));
  });
}

qbb_status qbb_kernel_run(const qbb_kernel* kernel, int32_t x_dtype, int64_t M, const void* x, void* y,
                          qbb_parallel_for parallel_for, void* pool, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    need(kernel, "kernel");
    if (x_dtype != QBB_FLOAT32 && x_dtype != QBB_FLOAT16) {
      throw Error("wrong type of X", "float32 (1) or float16 (10)", std::to_string(x_dtype));
    }
    const qbb::core::Tiled& w = kernel->matrix.tiled();
    qbb::core::check_rows(M, w.K, w.N);
    if (M == 0) return;
    need(x, "x");
    need(y, "y");
    const Path path = path_of(kernel->mode, w.bases, M);
    const bool half = x_dtype == QBB_FLOAT16;
    const int64_t element = half ? 2 : 4;
    // Integer modes keep what they make of X in memory, for so many rows.
    const bool tables = path == Path::kByteTables || path == Path::kWordTables;
    const int64_t step = path == Path::kByteProduct ? qbb::core::kByteProductRows
                         : tables                   ? qbb::core::kByteTableRows
                                                    : M;
    for (int64_t row = 0; row < M; row += step) {
      run_rows(*kernel, path, half, std::min(M - row, step), static_cast<const char*>(x) + row * w.K * element,
               static_cast<char*>(y) + row * w.N * element, parallel_for, pool);
    }
  });
}

void qbb_kernel_destroy(qbb_kernel* kernel) { delete kernel; }

const char* qbb_kernel_isa(const qbb_kernel* kernel) { return kernel == nullptr ? nullptr : kernel->kernel.name; }

int32_t qbb_isa_count(void) { return qbb::cpu::num_kernels(); }

const char* qbb_isa_name(int32_t index) {
  const qbb::cpu::Kernel* kernel = qbb::cpu::kernel_at(index);
  return kernel == nullptr ? nullptr : kernel->name;
}

int32_t qbb_isa_available(int32_t index) {
  const qbb::cpu::Kernel* kernel = qbb::cpu::kernel_at(index);
  return kernel != nullptr && kernel->available() ? 1 : 0;
}

void qbb_get_format(qbb_format_info* info) {
  if (info == nullptr) return;
  *info = qbb_format_info{QBB_FORMAT_VERSION, QBB_OPSET_VERSION, QBB_MAX_BASES,
                          QBB_NUM_LAYOUTS,    QBB_WORD_BITS,     QBB_TILE_ROWS};
}

}  // extern "C"
