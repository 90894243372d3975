// The C interface of the CUDA kernels (include/qbb/ops.h).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/guard.h"
#include "core/spec.h"
#include "cuda/launch.h"
#include "cuda/prepare.cuh"

namespace {

using qbb::core::Error;
using qbb::core::Spec;
using qbb::cuda::Device;
using qbb::cuda::Rows;
using qbb::cuda::Type;
using qbb::cuda::Weights;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it: the caller knows
  const bool memory = status == cudaErrorMemoryAllocation;
  throw Error(std::string(what) + " failed", "success", cudaGetErrorString(status), memory ? QBB_NO_MEMORY : QBB_DEVICE);
}

// Makes a device the current one while it lives.
class Current {
 public:
  explicit Current(int number) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != number) {
      check(cudaSetDevice(number), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct FreeDevice {
  void operator()(void* p) const { cudaFree(p); }
};
using Buffer = std::unique_ptr<void, FreeDevice>;

Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, static_cast<size_t>(bytes)), "cudaMalloc");
  return Buffer(p);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

Device device_of(const void* data, const char* arch) {
  cudaPointerAttributes where{};
  check(cudaPointerGetAttributes(&where, data), "cudaPointerGetAttributes");
  if (where.type != cudaMemoryTypeDevice && where.type != cudaMemoryTypeManaged) {
    throw Error("wrong place of B (planes)", "device memory", "host memory");
  }
  Device d{};
  d.number = where.device;
  d.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, d.number) +
           attribute(cudaDevAttrComputeCapabilityMinor, d.number);
  d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, d.number);
  d.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, d.number);
  if (arch == nullptr) arch = std::getenv("QBB_CUDA_ARCH");
  if (arch != nullptr && *arch != '\0') {
    char* end = nullptr;
    const long wanted = std::strtol(arch, &end, 10);
    if (*end != '\0' || wanted < 75 || wanted > d.arch) {
      throw Error("bad QBB_CUDA_ARCH", "75 to " + std::to_string(d.arch) + ", this device's", arch, QBB_UNSUPPORTED);
    }
    d.arch = static_cast<int>(wanted);
  }
  return d;
}

constexpr int kBlocks = 1024, kThreads = 256;

}  // namespace

struct qbb_cuda_kernel {
  Device device{};
  Weights weights{};
  bool integer = false;
  std::vector<Buffer> buffers;

  qbb_cuda_kernel(const qbb_matrix& m, int32_t mode, const char* arch);

 private:
  template <class T, bool kSwizzle>
  const T* tiled(const qbb_tensor& tensor, int64_t count, const Spec& s, int64_t depth) {
    buffers.push_back(allocate(count * s.tiles * depth * QBB_TILE_ROWS * static_cast<int64_t>(sizeof(T))));
    auto* to = static_cast<T*>(buffers.back().get());
    qbb::cuda::tile_rows<T, kSwizzle>
        <<<kBlocks, kThreads>>>(static_cast<const T*>(tensor.data), to, count, s.N, s.tiles, depth);
    check(cudaGetLastError(), "repacking");
    return to;
  }

  // NULL where one number stands for all, and it is 0.
  const float* spread(const qbb_tensor& tensor, bool single, int64_t count) {
    if (!single) return static_cast<const float*>(tensor.data);
    float value = 0;
    check(cudaMemcpy(&value, tensor.data, sizeof value, cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (value == 0) return nullptr;
    buffers.push_back(allocate(count * 4));
    auto* to = static_cast<float*>(buffers.back().get());
    qbb::cuda::fill<<<kBlocks, kThreads>>>(to, count, value);
    check(cudaGetLastError(), "filling");
    return to;
  }
};

qbb_cuda_kernel::qbb_cuda_kernel(const qbb_matrix& m, int32_t mode, const char* arch) {
  const Spec s = qbb::core::validate(m);
  // Kernels count in 32 bits within a basis.
  const int64_t bytes = s.tiles * QBB_TILE_ROWS * 4 * std::max(s.words, s.groups);
  if (bytes > INT32_MAX) {
    throw Error("matrix too large for CUDA kernels", "2 GB for a basis", std::to_string(bytes) + " bytes", QBB_UNSUPPORTED);
  }
  integer = mode == QBB_MODE_INT8;
  device = device_of(m.planes.data, arch);
  const Current current(device.number);
  check(qbb::cuda::count_clusters(device), "counting clusters");
  const bool rows = s.layout == QBB_LAYOUT_ROWS, half = m.scales.dtype == QBB_FLOAT16;
  const bool one_offset = m.offset.rank == 2 && m.offset.dims[0] == 1 && m.offset.dims[1] == 1;
  weights.K = static_cast<int>(s.K);
  weights.N = static_cast<int>(s.N);
  weights.bases = static_cast<int>(s.bases);
  weights.words = static_cast<int>(s.words);
  weights.groups = static_cast<int>(s.groups);
  weights.tiles = static_cast<int>(s.tiles);
  weights.group_words = static_cast<int>(s.group_size == s.K ? s.words : s.group_size / QBB_WORD_BITS);
  weights.half_scales = half;
  weights.planes = static_cast<const uint32_t*>(m.planes.data);
  weights.scales = m.scales.data;
  weights.offset = spread(m.offset, one_offset, s.tiles * s.groups * QBB_TILE_ROWS);
  weights.bias = spread(m.bias, m.bias.dims[0] != s.N, s.N);
  if (rows) {
    weights.planes = tiled<uint32_t, true>(m.planes, s.bases, s, s.words);
    weights.scales = half ? static_cast<const void*>(tiled<uint16_t, false>(m.scales, s.bases, s, s.groups))
                          : tiled<uint32_t, false>(m.scales, s.bases, s, s.groups);
    if (!one_offset) weights.offset = tiled<float, false>(m.offset, 1, s, s.groups);
  } else {
    const uintptr_t places = reinterpret_cast<uintptr_t>(m.planes.data) | reinterpret_cast<uintptr_t>(m.scales.data) |
                             (one_offset ? 0 : reinterpret_cast<uintptr_t>(m.offset.data));
    if (places % 16 != 0) throw Error("misaligned weights", "addresses that are multiples of 16", "others", QBB_UNSUPPORTED);
  }
  while (weights.group_words != weights.words && (qbb::cuda::kChunkWords << weights.group_shift) < weights.group_words) {
    ++weights.group_shift;
  }
  if (weights.group_words == weights.words) weights.group_shift = 30;
  weights.tile_bytes = static_cast<int>(s.words * QBB_TILE_ROWS * 4);
  weights.plane_bytes = s.tiles * s.words * QBB_TILE_ROWS * 4;
  weights.scale_bytes = s.tiles * s.groups * QBB_TILE_ROWS * 2;
  const Buffer found = allocate(4);
  check(cudaMemset(found.get(), 0, 4), "cudaMemset");
  buffers.push_back(allocate(s.tiles * QBB_TILE_ROWS * 4));
  auto* row_unit = static_cast<float*>(buffers.back().get());
  qbb::cuda::largest_levels<<<kBlocks, kThreads>>>(weights, row_unit, static_cast<unsigned*>(found.get()));
  weights.row_unit = row_unit;
  float largest = 0;
  check(cudaMemcpy(&largest, found.get(), 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  weights.unit = largest > 0 ? std::ldexp(1.0f, std::ilogb(largest) - 13) : 1.0f;  // the largest level is about 2^13
  check(cudaDeviceSynchronize(), "preparing weights");
  check(qbb::cuda::reserve(weights, device), "reserving shared memory");
}

extern "C" {

int32_t qbb_cuda_compiled(void) { return 1; }

qbb_status qbb_cuda_kernel_create(const qbb_matrix* matrix, int32_t mode, const char* arch, qbb_cuda_kernel** kernel,
                                  char* error, size_t error_size) {
  return qbb::core::guard(error, error_size, [&] {
    qbb::core::need(kernel, "kernel");
    *kernel = nullptr;
    qbb::core::need(matrix, "matrix");
    qbb::core::check_mode(mode);
    *kernel = new qbb_cuda_kernel(*matrix, mode, arch);
  });
}

qbb_status qbb_cuda_kernel_run(const qbb_cuda_kernel* kernel, int32_t x_dtype, int64_t M, const void* x, void* y,
                               void* stream, char* error, size_t error_size) {
  return qbb::core::guard(error, error_size, [&] {
    qbb::core::need(kernel, "kernel");
    if (x_dtype != QBB_FLOAT32 && x_dtype != QBB_FLOAT16 && x_dtype != QBB_BFLOAT16) {
      throw Error("wrong type of X", "float32 (1), float16 (10) or bfloat16 (16)", std::to_string(x_dtype));
    }
    qbb::core::check_rows(M, kernel->weights.K, kernel->weights.N);
    if (M == 0) return;
    qbb::core::need(x, "x");
    qbb::core::need(y, "y");
    const Current current(kernel->device.number);
    const Rows rows{x, y, static_cast<Type>(x_dtype), 0, 0};
    check(qbb::cuda::launch(kernel->weights, rows, M, kernel->integer, kernel->device, static_cast<cudaStream_t>(stream)),
          "launching a kernel");
  });
}

void qbb_cuda_kernel_destroy(qbb_cuda_kernel* kernel) { delete kernel; }

}  // extern "C"
