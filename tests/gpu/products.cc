// Products through every CUDA kernel, for compute-sanitizer (test_sanitizer.py): what they are is checked elsewhere.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "qbb/format.h"
#include "qbb/ops.h"

namespace {

void need(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

uint32_t next_random() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state;
}

// Exactly as many bytes as are needed, so that one too far is seen.
void* on_device(const std::vector<uint32_t>& words, size_t bytes) {
  void* p = nullptr;
  need(cudaMalloc(&p, bytes) == cudaSuccess, "cudaMalloc");
  need(cudaMemcpy(p, words.data(), bytes, cudaMemcpyHostToDevice) == cudaSuccess, "cudaMemcpy");
  return p;
}

std::vector<uint32_t> random_words(size_t bytes, uint32_t mask, uint32_t base) {
  std::vector<uint32_t> words(bytes / 4 + 1);
  for (uint32_t& w : words) w = (next_random() & mask) | base;
  return words;
}

void multiply(int64_t K, int64_t N, int64_t bases, int64_t group_size, bool offset, int mode, const char* arch) {
  const int64_t words = (K + 31) / 32, groups = group_size == K ? 1 : (K + group_size - 1) / group_size;
  const int64_t tiles = (N + 15) / 16;
  const int64_t plane_dims[] = {bases, tiles, words, 16}, scale_dims[] = {bases, tiles, groups, 16};
  const int64_t z_dims[] = {tiles, groups, 16}, one_dims[] = {1, 1}, bias_dims[] = {N};
  const size_t plane_bytes = static_cast<size_t>(bases * tiles * words * 64);
  const size_t scale_bytes = static_cast<size_t>(bases * tiles * groups * 32);
  void* planes = on_device(random_words(plane_bytes, 0xffffffffu, 0), plane_bytes);
  void* scales = on_device(random_words(scale_bytes, 0x03ff03ffu, 0x2c002c00u), scale_bytes);  // 1/16 … 1/8 as float16
  const size_t z_bytes = static_cast<size_t>(offset ? tiles * groups * 64 : 4);
  void* z = on_device(offset ? random_words(z_bytes, 0x007fffffu, 0x3d000000u) : std::vector<uint32_t>(1, 0), z_bytes);
  void* bias = on_device(random_words(static_cast<size_t>(N) * 4, 0x007fffffu, 0x3d000000u), static_cast<size_t>(N) * 4);
  qbb_matrix m{};
  m.K = K, m.N = N, m.bases = bases, m.group_size = group_size, m.layout = QBB_LAYOUT_TILED;
  m.format = QBB_FORMAT_VERSION;
  m.planes = {planes, plane_dims, 4, QBB_UINT32};
  m.scales = {scales, scale_dims, 4, QBB_FLOAT16};
  m.offset = offset ? qbb_tensor{z, z_dims, 3, QBB_FLOAT32} : qbb_tensor{z, one_dims, 2, QBB_FLOAT32};
  m.bias = {bias, bias_dims, 1, QBB_FLOAT32};
  qbb_cuda_kernel* kernel = nullptr;
  char error[512];
  need(qbb_cuda_kernel_create(&m, mode, arch, &kernel, error, sizeof error) == QBB_OK, error);
  for (const int64_t rows : {1, 2, 4, 9, 40, 130}) {
    for (const int32_t type : {QBB_FLOAT32, QBB_FLOAT16, QBB_BFLOAT16}) {
      const size_t size = type == QBB_FLOAT32 ? 4 : 2, x_bytes = static_cast<size_t>(rows * K) * size;
      void* x = on_device(random_words(x_bytes, 0x83ff83ffu, 0x3c003c00u), x_bytes);  // finite in all three types
      void* y = nullptr;
      need(cudaMalloc(&y, static_cast<size_t>(rows * N) * size) == cudaSuccess, "cudaMalloc");
      need(qbb_cuda_kernel_run(kernel, type, rows, x, y, nullptr, error, sizeof error) == QBB_OK, error);
      std::vector<char> found(static_cast<size_t>(rows * N) * size);  // reading it shows what was never written
      need(cudaMemcpy(found.data(), y, found.size(), cudaMemcpyDeviceToHost) == cudaSuccess, "the kernel failed");
      cudaFree(x);
      cudaFree(y);
    }
  }
  qbb_cuda_kernel_destroy(kernel);
  for (void* p : {planes, scales, z, bias}) cudaFree(p);
}

}  // namespace

int main() {
  for (int64_t bases = 1; bases <= 5; ++bases) {
    multiply(640, 160, bases, 128, bases % 2 == 0, QBB_MODE_EXACT, nullptr);
    multiply(257, 33, bases, 257, bases % 2 == 1, QBB_MODE_INT8, nullptr);
    multiply(300, 20, bases, 32, false, QBB_MODE_EXACT, nullptr);
  }
  multiply(16384, 17, 3, 128, true, QBB_MODE_EXACT, nullptr);  // so many inputs that stages are used again and again
  multiply(1152, 48, 3, 256, true, QBB_MODE_EXACT, "80");
  multiply(1152, 48, 3, 256, true, QBB_MODE_EXACT, "75");
  std::puts("done");
  return 0;
}
