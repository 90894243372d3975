// Random matrices through the C interface with buffers of exactly the right size, for the sanitizers.
//
//     abi_driver SEED COUNT
//
// Compares every instruction set with plain loops in exact mode and with the first one in integer modes, and hands
// broken descriptions in, too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "qbb/ops.h"

namespace {

std::mt19937 rng;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// Heap memory of exactly `count` elements: one byte further is an error that the sanitizer sees.
template <class T>
struct Exact {
  explicit Exact(int64_t count) : size(count), data(new T[static_cast<size_t>(count)]()) {}
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  int64_t size;
  std::unique_ptr<T[]> data;
};

void fail(const char* what, const char* detail) {
  std::fprintf(stderr, "FAILED: %s: %s\n", what, detail);
  std::exit(1);
}

void threads_for(void*, int64_t count, void (*task)(void*, int64_t), void* arg) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t) {
    threads.emplace_back([=] {
      for (int64_t i = t; i < count; i += 3) task(arg, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// y = op(x) in one mode with every instruction set; `check` gets the name of each after its run.
template <class T, class Check>
void run_all(const qbb_matrix& m, int32_t mode, int32_t dtype, int64_t M, const Exact<T>& x, Exact<T>& y, Check check) {
  char error[256];
  for (int32_t isa = 0; isa < qbb_isa_count(); ++isa) {
    if (!qbb_isa_available(isa)) continue;
    qbb_kernel* kernel = nullptr;
    if (qbb_kernel_create(&m, mode, qbb_isa_name(isa), &kernel, error, sizeof error) != QBB_OK) fail("create", error);
    const qbb_parallel_for pool = pick(0, 1) ? threads_for : nullptr;
    std::memset(y.data.get(), 0xff, static_cast<size_t>(y.size) * sizeof(T));  // not written: NaN
    if (qbb_kernel_run(kernel, dtype, M, x.data.get(), y.data.get(), pool, nullptr, error, sizeof error) != QBB_OK) {
      fail("run", error);
    }
    qbb_kernel_destroy(kernel);
    check(qbb_isa_name(isa));
  }
}

// The same where the first instruction set is what the others are compared with.
template <class T>
void run_alike(const qbb_matrix& m, int32_t mode, int32_t dtype, int64_t M, const Exact<T>& x, Exact<T>& y) {
  std::vector<T> first;
  run_all(m, mode, dtype, M, x, y, [&](const char* isa) {
    if (first.empty()) first.assign(y.data.get(), y.data.get() + y.size);
    const size_t bytes = static_cast<size_t>(y.size) * sizeof(T);
    if (bytes > 0 && std::memcmp(first.data(), y.data.get(), bytes) != 0) {
      fail("other bytes than the first instruction set", (isa + (" in mode " + std::to_string(mode))).c_str());
    }
  });
}

void one_matrix() {
  const int64_t K = pick(0, 3) ? pick(1, 200) : pick(1, 3000), N = pick(1, 70), bases = pick(1, 8);
  const int64_t M = K > 200 || pick(0, 15) ? pick(0, 40) : pick(510, 540);  // 512 rows are bytes at a time
  int64_t group_size = K;
  if (K > 32 && pick(0, 2)) group_size = 32 * pick(1, (K - 1) / 32);
  const int64_t W = (K + 31) / 32, G = (K + group_size - 1) / group_size, T = (N + 15) / 16;
  const bool tiled = pick(0, 1), half = pick(0, 1), has_offset = pick(0, 1), has_bias = pick(0, 1);

  Exact<uint32_t> planes(bases * (tiled ? T * 16 : N) * W);
  for (int64_t i = 0; i < planes.size; ++i) planes[i] = rng();  // padding is random, too
  Exact<uint16_t> half_scales(half ? bases * (tiled ? T * 16 : N) * G : 0);
  Exact<float> scales(half ? 0 : bases * (tiled ? T * 16 : N) * G);
  for (int64_t i = 0; i < half_scales.size; ++i) half_scales[i] = static_cast<uint16_t>((14 + pick(0, 2)) << 10);  // .5 1 2
  for (int64_t i = 0; i < scales.size; ++i) scales[i] = std::ldexp(1.0f, static_cast<int>(pick(-1, 1)));
  Exact<float> offset(has_offset ? (tiled ? T * 16 : N) * G : 1), bias(has_bias ? N : 1), x(M * K), y(M * N);
  for (int64_t i = 0; i < offset.size; ++i) offset[i] = static_cast<float>(pick(-2, 2));
  for (int64_t i = 0; i < bias.size; ++i) bias[i] = static_cast<float>(pick(-9, 9));
  for (int64_t i = 0; i < x.size; ++i) x[i] = static_cast<float>(pick(-8, 8));

  const int64_t rows_b[] = {bases, N, W}, tiles_b[] = {bases, T, W, 16}, rows_s[] = {bases, N, G};
  const int64_t tiles_s[] = {bases, T, G, 16}, rows_z[] = {N, G}, tiles_z[] = {T, G, 16}, one[] = {1, 1}, dims_c[] = {N};
  qbb_matrix m{K, N, bases, group_size, tiled ? QBB_LAYOUT_TILED : QBB_LAYOUT_ROWS, QBB_FORMAT_VERSION, {}, {}, {}, {}};
  m.planes = {planes.data.get(), tiled ? tiles_b : rows_b, tiled ? 4 : 3, QBB_UINT32};
  const void* s = half ? static_cast<const void*>(half_scales.data.get()) : scales.data.get();
  m.scales = {s, tiled ? tiles_s : rows_s, tiled ? 4 : 3, half ? QBB_FLOAT16 : QBB_FLOAT32};
  m.offset = {offset.data.get(), has_offset ? (tiled ? tiles_z : rows_z) : one, has_offset && tiled ? 3 : 2, QBB_FLOAT32};
  m.bias = {bias.data.get(), has_bias ? dims_c : one, 1, QBB_FLOAT32};

  std::vector<double> expected;  // exact: the values are small whole numbers
  for (int64_t row = 0; row < M; ++row) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = has_bias ? bias[n] : bias[0];
      for (int64_t k = 0; k < K; ++k) {
        const int64_t w = k / 32, g = k / group_size, bit = k % 32;
        const int64_t tiled_bit = bit < 16 ? bit / 4 * 8 + bit % 4 : (bit - 16) / 4 * 8 + 4 + bit % 4;
        for (int64_t b = 0; b < bases; ++b) {
          const uint32_t word = tiled ? planes[((b * T + n / 16) * W + w) * 16 + n % 16] : planes[(b * N + n) * W + w];
          const int64_t at = tiled ? ((b * T + n / 16) * G + g) * 16 + n % 16 : (b * N + n) * G + g;
          const double scale = half ? std::ldexp(1.0, (half_scales[at] >> 10) - 15) : double{scales[at]};
          sum += (word >> (tiled ? tiled_bit : bit) & 1 ? scale : -scale) * x[row * K + k];
        }
        const double z = !has_offset ? offset[0] : offset[tiled ? ((n / 16) * G + g) * 16 + n % 16 : n * G + g];
        sum += z * x[row * K + k];
      }
      expected.push_back(sum);
    }
  }
  run_all(m, QBB_MODE_EXACT, QBB_FLOAT32, M, x, y, [&](const char* isa) {
    for (int64_t i = 0; i < y.size; ++i) {
      if (static_cast<double>(y[i]) != expected[static_cast<size_t>(i)]) fail("wrong result", isa);
    }
  });
  Exact<uint16_t> x16(M * K), y16(M * N);
  for (int64_t i = 0; i < x16.size; ++i) x16[i] = static_cast<uint16_t>(rng() & 0x83ff);  // zeros and subnormals
  run_alike(m, QBB_MODE_EXACT, QBB_FLOAT16, M, x16, y16);
  for (const int32_t mode : {QBB_MODE_INT8, QBB_MODE_INT16}) {
    run_alike(m, mode, QBB_FLOAT32, M, x, y);
    run_alike(m, mode, QBB_FLOAT16, M, x16, y16);
  }

  char error[256];
  // One number wrong: must be refused before anything is read, or be harmless.
  int64_t* const fields[] = {&m.K, &m.N, &m.bases, &m.group_size, &m.layout, &m.format};
  const int64_t evil[] = {0, -1, 1 - tiled, INT64_MAX, INT64_MIN, int64_t{1} << 32, K + 32, N + 16, bases + 1};
  *fields[pick(0, 5)] = evil[pick(0, 8)];
  qbb_kernel* kernel = nullptr;
  if (qbb_kernel_create(&m, QBB_MODE_EXACT, nullptr, &kernel, error, sizeof error) != QBB_OK && (kernel != nullptr || !error[0])) {
    fail("refusal", "a kernel or no text");
  }
  qbb_kernel_destroy(kernel);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  rng.seed(static_cast<unsigned>(std::atoi(argv[1])));
  const int count = std::atoi(argv[2]);
  for (int i = 0; i < count; ++i) one_matrix();
  std::printf("%d matrices\n", count);
}
