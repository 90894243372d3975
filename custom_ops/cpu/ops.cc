// The C interface of include/qbb/ops.h on top of the core and the CPU kernels.
#include "qbb/ops.h"

#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>

#include "core/error.h"
#include "core/matrix.h"
#include "core/partition.h"
#include "cpu/dispatch.h"

struct qbb_kernel {
  qbb_kernel(const qbb_matrix& m, const qbb::cpu::Kernel& k) : matrix(m), kernel(k) {}

  const qbb::core::Matrix matrix;
  const qbb::cpu::Kernel& kernel;
};

namespace {

using qbb::core::Error;

void write(char* error, size_t size, const char* text) {
  if (error == nullptr || size == 0) return;
  const size_t length = std::strlen(text) < size ? std::strlen(text) : size - 1;
  std::memcpy(error, text, length);
  error[length] = '\0';
}

// Runs `body` and turns what it throws into a status: no exception may cross a C interface.
template <class Body>
qbb_status guard(char* error, size_t size, Body body) {
  write(error, size, "");
  try {
    body();
    return QBB_OK;
  } catch (const Error& e) {
    write(error, size, e.what());
    return e.status();
  } catch (const std::bad_alloc&) {
    write(error, size, "out of memory; expected room for the repacked weights; got none");
    return QBB_NO_MEMORY;
  } catch (const std::exception& e) {
    write(error, size, e.what());
    return QBB_INVALID;
  }
}

void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(std::string("missing argument ") + name, "a pointer", "NULL");
}

struct Run {
  const qbb_kernel* kernel;
  qbb::core::Partition partition;
  const void* x;
  void* y;
  bool half;
  int64_t M;
};

void run_task(void* arg, int64_t i) {
  const Run& run = *static_cast<const Run*>(arg);
  const qbb::core::Tiled& w = run.kernel->matrix.tiled();
  // Neighbouring tasks share a chunk of weights, so that it is still in a cache when the next block of rows wants it.
  const int64_t row = i % run.partition.row_blocks * run.partition.rows;
  const int64_t tile = i / run.partition.row_blocks * run.partition.chunk;
  const int64_t rows = run.M - row < run.partition.rows ? run.M - row : run.partition.rows;
  const int64_t tiles = w.tiles - tile < run.partition.chunk ? w.tiles - tile : run.partition.chunk;
  run.kernel->kernel.run(qbb::cpu::Block{&w, run.x, run.y, run.half, row, rows, tile, tiles, run.partition.many_rows});
}

}  // namespace

extern "C" {

qbb_status qbb_matrix_validate(const qbb_matrix* matrix, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    need(matrix, "matrix");
    qbb::core::validate(*matrix);
  });
}

qbb_status qbb_kernel_create(const qbb_matrix* matrix, const char* isa, qbb_kernel** kernel, char* error,
                             size_t error_size) {
  return guard(error, error_size, [&] {
    need(kernel, "kernel");
    *kernel = nullptr;
    need(matrix, "matrix");
    *kernel = new qbb_kernel(*matrix, qbb::cpu::select_kernel(isa));
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
    if (M < 0) throw Error("bad number of rows of X", "M >= 0", std::to_string(M));
    int64_t size = 0;
    if (qbb::core::mul_overflows(M, 4, &size) ||
        qbb::core::mul_overflows(size, w.K > w.N ? w.K : w.N, &size)) {
      throw Error("too many rows of X", "less than 2^63 bytes of X and Y", std::to_string(M));
    }
    if (M == 0) return;
    need(x, "x");
    need(y, "y");
    Run run{kernel, qbb::core::partition(w, M), x, y, x_dtype == QBB_FLOAT16, M};
    const int64_t tasks = run.partition.tasks();
    if (parallel_for == nullptr || tasks == 1) {
      for (int64_t i = 0; i < tasks; ++i) run_task(&run, i);
    } else {
      parallel_for(pool, tasks, run_task, &run);
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
