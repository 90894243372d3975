// Sizes past 2^31, exact: every product of two of K, N and M that a kernel forms (R12).
//
//     large_driver [ISA]
//
// Memory comes from maps whose pages exist only where something is written. Values are small whole numbers in few places,
// so the expected output is known without a second product of that size.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "qbb/ops.h"

namespace {

void fail(const char* what, long long at, double got, double expected) {
  std::fprintf(stderr, "FAILED: %s at %lld: got %g, expected %g\n", what, at, got, expected);
  std::exit(1);
}

template <class T>
T* map(int64_t count) {
  void* p = mmap(nullptr, static_cast<size_t>(count) * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory", count, 0, 0);
  return static_cast<T*>(p);
}

template <class T>
void unmap(T* p, int64_t count) {
  munmap(p, static_cast<size_t>(count) * sizeof(T));
}

void two_threads(void*, int64_t count, void (*task)(void*, int64_t), void* arg) {
  std::thread other([=] {
    for (int64_t i = 0; i < count; i += 2) task(arg, i);
  });
  for (int64_t i = 1; i < count; i += 2) task(arg, i);
  other.join();
}

// One basis, layout 1, one scale a row; all signs -1 but those set.
struct Matrix {
  Matrix(int64_t K, int64_t N) : K(K), N(N), W((K + 31) / 32), T((N + 15) / 16), planes(map<uint32_t>(T * W * 16)) {
    scales.assign(static_cast<size_t>(T * 16), 1.0f);
  }
  ~Matrix() { unmap(planes, T * W * 16); }
  Matrix(const Matrix&) = delete;

  void plus(int64_t n, int64_t k) {
    const int64_t bit = k % 32, at = bit < 16 ? bit / 4 * 8 + bit % 4 : (bit - 16) / 4 * 8 + 4 + bit % 4;
    planes[(n / 16 * W + k / 32) * 16 + n % 16] |= uint32_t{1} << at;
  }

  qbb_kernel* kernel(int32_t mode, const char* isa) const {
    const int64_t b[] = {1, T, W, 16}, s[] = {1, T, 1, 16}, one[] = {1, 1};
    static const float zero = 0;
    const qbb_matrix m{K, N, 1, K, QBB_LAYOUT_TILED, QBB_FORMAT_VERSION, {planes, b, 4, QBB_UINT32},
                       {scales.data(), s, 4, QBB_FLOAT32}, {&zero, one, 2, QBB_FLOAT32}, {&zero, one, 1, QBB_FLOAT32}};
    qbb_kernel* kernel = nullptr;
    char error[256];
    if (qbb_kernel_create(&m, mode, isa, &kernel, error, sizeof error) != QBB_OK) {
      std::fprintf(stderr, "%s\n", error);
      std::exit(1);
    }
    return kernel;
  }

  int64_t K, N, W, T;
  uint32_t* planes;
  std::vector<float> scales;
};

template <class T>
void run(qbb_kernel* kernel, int32_t dtype, int64_t M, const T* x, T* y) {
  char error[256];
  if (qbb_kernel_run(kernel, dtype, M, x, y, two_threads, nullptr, error, sizeof error) != QBB_OK) {
    std::fprintf(stderr, "%s\n", error);
    std::exit(1);
  }
}

// K·N = 2^31 + 2^27: each row has one +1, at a place of its own; x is 1 in 64 places.
void large_matrix(int32_t mode, const char* isa) {
  const int64_t K = (int64_t{1} << 16) + 4096, N = 32768;
  Matrix m(K, N);
  const auto place = [&](int64_t n) { return n * 7919 % K; };
  for (int64_t n = 0; n < N; ++n) m.plus(n, place(n));
  std::vector<float> x(static_cast<size_t>(K), 0.0f), y(static_cast<size_t>(N), -1.0f);
  for (int64_t i = 0; i < 64; ++i) x[static_cast<size_t>(place(N - 1 - i * 500))] = 1;
  qbb_kernel* kernel = m.kernel(mode, isa);
  run(kernel, QBB_FLOAT32, 1, x.data(), y.data());
  for (int64_t n = 0; n < N; ++n) {
    const double expected = -64 + 2 * static_cast<double>(x[static_cast<size_t>(place(n))]);
    if (static_cast<double>(y[static_cast<size_t>(n)]) != expected) fail("large matrix", n, y[static_cast<size_t>(n)], expected);
  }
  qbb_kernel_destroy(kernel);
}

// M·K and M·N above 2^31, in turn: rows of X are zero but the last of every 997, and the very last.
void many_rows(int32_t mode, const char* isa, int64_t K, int64_t N, int64_t M) {
  Matrix m(K, N);
  for (int64_t n = 0; n < N; ++n) m.plus(n, n % K);
  float* x = map<float>(M * K);
  float* y = map<float>(M * N);
  const auto value = [&](int64_t row) { return row == M - 1 || row % 997 == 996 ? 1 + row % 5 : 0; };
  for (int64_t row = 0; row < M; ++row) {
    if (value(row) != 0) x[row * K + row % K] = static_cast<float>(value(row));
  }
  qbb_kernel* kernel = m.kernel(mode, isa);
  run(kernel, QBB_FLOAT32, M, x, y);
  for (int64_t row = 0; row < M; ++row) {
    for (int64_t n = 0; n < N; ++n) {
      const double expected = static_cast<double>(n % K == row % K ? value(row) : -value(row));
      if (static_cast<double>(y[row * N + n]) != expected) fail("many rows", row * N + n, y[row * N + n], expected);
    }
  }
  qbb_kernel_destroy(kernel);
  unmap(x, M * K);
  unmap(y, M * N);
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = argc > 1 ? argv[1] : nullptr;
  constexpr int64_t k31 = int64_t{1} << 31;
  for (int32_t mode = 0; mode < QBB_NUM_MODES; ++mode) {
    large_matrix(mode, isa);
    std::printf("mode %d: K*N = 2^31.1 exact\n", mode);
    std::fflush(stdout);
    many_rows(mode, isa, 16384, 2, k31 / 16384 + 37);
    std::printf("mode %d: M*K = 2^31 exact\n", mode);
    std::fflush(stdout);
  }
  many_rows(QBB_MODE_EXACT, isa, 32, 65536, k31 / 65536 + 37);
  std::printf("M*N = 2^31 exact\n");
}
