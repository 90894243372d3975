// One kernel for many threads, many kernels for many threads, kernels that come and go meanwhile (R11), for TSan.
//
//     threads_driver RUNS
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "qbb/ops.h"

namespace {

constexpr int kThreads = 8, kLives = 200;
constexpr int64_t kK = 200, kN = 100, kBases = 3, kW = 7, kT = 7, kMaxM = 45;

uint32_t planes[kBases * kT * kW * 16];
float scales[kBases * kT * 16], x[kMaxM * kK];
const float zero = 0;

qbb_kernel* create(int32_t mode) {
  static const int64_t b[] = {kBases, kT, kW, 16}, s[] = {kBases, kT, 1, 16}, one[] = {1, 1};
  const qbb_matrix m{kK, kN, kBases, kK, QBB_LAYOUT_TILED, QBB_FORMAT_VERSION, {planes, b, 4, QBB_UINT32},
                     {scales, s, 4, QBB_FLOAT32}, {&zero, one, 2, QBB_FLOAT32}, {&zero, one, 1, QBB_FLOAT32}};
  qbb_kernel* kernel = nullptr;
  if (qbb_kernel_create(&m, mode, nullptr, &kernel, nullptr, 0) != QBB_OK) std::abort();
  return kernel;
}

std::vector<float> product(const qbb_kernel* kernel, int64_t M) {
  std::vector<float> y(static_cast<size_t>(M * kN), -1.0f);
  if (qbb_kernel_run(kernel, QBB_FLOAT32, M, x, y.data(), nullptr, nullptr, nullptr, 0) != QBB_OK) std::abort();
  return y;
}

// Rows of X of one run: few and many take different ways.
int64_t rows(int run) { return run % 16 == 0 ? kMaxM : 1 + run % 5; }

template <class Body>
void on_threads(Body body) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(body, t);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int runs = std::atoi(argv[1]);
  std::mt19937 rng(1);
  for (uint32_t& word : planes) word = static_cast<uint32_t>(rng());
  for (float& scale : scales) scale = static_cast<float>(rng() % 100) / 100;
  for (float& value : x) value = static_cast<float>(rng() % 1000) / 100 - 5;

  std::atomic<long> wrong{0};
  for (int32_t mode = 0; mode < QBB_NUM_MODES; ++mode) {
    std::vector<qbb_kernel*> kernels;
    for (int t = 0; t < kThreads; ++t) kernels.push_back(create(mode));
    std::vector<std::vector<float>> alone;
    for (int run = 0; run < 80; ++run) alone.push_back(product(kernels[0], rows(run)));
    const auto same = [&](const qbb_kernel* kernel, int run) {
      const std::vector<float> y = product(kernel, rows(run));
      const std::vector<float>& expected = alone[static_cast<size_t>(run % 80)];
      if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) != 0) ++wrong;
    };
    on_threads([&](int) {  // one kernel for all
      for (int run = 0; run < runs; ++run) same(kernels[0], run);
    });
    on_threads([&](int t) {  // all kernels for all
      for (int run = 0; run < runs; ++run) same(kernels[static_cast<size_t>((run + t) % kThreads)], run);
    });
    on_threads([&](int t) {  // one thread makes and destroys kernels while the others run
      if (t > 0) {
        for (int run = 0; run < runs; ++run) same(kernels[0], run);
        return;
      }
      for (int life = 0; life < kLives; ++life) {
        qbb_kernel* kernel = create(mode);
        same(kernel, life);
        qbb_kernel_destroy(kernel);
      }
    });
    for (qbb_kernel* kernel : kernels) qbb_kernel_destroy(kernel);
  }
  std::printf("%d threads, %d runs each: %ld wrong\n", kThreads, runs, wrong.load());
  return wrong == 0 ? 0 : 1;
}
