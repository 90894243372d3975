// Every instruction set of this library against the scalar one, bit for bit, in every mode, on random floats through
// the C interface.
//
//     isa_driver SEED COUNT
//
// Prints the instruction sets and a digest of all outputs. It is the same on every CPU: the scalar kernel is plain
// arithmetic in a fixed order, and the inputs come from a generator of fixed bits.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "qbb/ops.h"

namespace {

std::mt19937 rng;  // the standard fixes its numbers, but not those of its distributions

uint32_t bits() { return static_cast<uint32_t>(rng()); }
int64_t pick(int64_t low, int64_t high) { return low + bits() % static_cast<uint32_t>(high - low + 1); }

// Any sign and mantissa, exponents from subnormal up to `largest`: numbers of all sizes, but no sum overflows float32.
uint16_t half(uint32_t largest) {
  return static_cast<uint16_t>((bits() & 0x83ff) | static_cast<uint32_t>(pick(0, largest)) << 10);
}
float single() {
  const uint32_t word = (bits() & 0x807fffff) | static_cast<uint32_t>(pick(110, 136)) << 23;  // 2^-17 .. 2^10
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void fail(const char* what, const std::string& detail) {
  std::fprintf(stderr, "FAILED: %s: %s\n", what, detail.c_str());
  std::exit(1);
}

uint64_t digest = 0xcbf29ce484222325;  // FNV-1a

void add_to_digest(const std::vector<unsigned char>& bytes) {
  for (const unsigned char byte : bytes) digest = (digest ^ byte) * 0x100000001b3;
}

std::vector<unsigned char> output(const qbb_matrix& m, int32_t mode, const char* isa, int32_t dtype, int64_t M,
                                  const void* x) {
  char error[256];
  std::vector<unsigned char> y(static_cast<size_t>(M * m.N * (dtype == QBB_FLOAT16 ? 2 : 4)));
  qbb_kernel* kernel = nullptr;
  if (qbb_kernel_create(&m, mode, isa, &kernel, error, sizeof error) != QBB_OK ||
      qbb_kernel_run(kernel, dtype, M, x, y.data(), nullptr, nullptr, error, sizeof error) != QBB_OK) {
    fail(isa, error);
  }
  qbb_kernel_destroy(kernel);
  return y;
}

void one_matrix(int index) {
  const int64_t bases = index % 8 + 1, M = pick(0, 1) ? pick(1, 15) : pick(1, 40);
  const int64_t K = pick(0, 7) ? pick(1, 300) : pick(2000, 2500), N = pick(0, 15) ? pick(1, 70) : pick(500, 600);
  int64_t group_size = K;
  if (K > 32 && pick(0, 2)) group_size = 32 * pick(1, (K - 1) / 32);
  const int64_t W = (K + 31) / 32, G = (K + group_size - 1) / group_size, T = (N + 15) / 16;
  const bool half_scales = pick(0, 1), has_offset = pick(0, 1), has_bias = pick(0, 1);

  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  std::vector<uint32_t> planes(size(bases * T * W * 16));  // bits at or past K and rows at or past N are random, too
  std::vector<uint16_t> scales16(size(half_scales ? bases * T * G * 16 : 0)), x16(size(M * K));
  std::vector<float> scales(size(half_scales ? 0 : bases * T * G * 16)), x(size(M * K));
  std::vector<float> offset(size(has_offset ? T * G * 16 : 1)), bias(size(has_bias ? N : 1));
  for (uint32_t& word : planes) word = bits();
  for (uint16_t& s : scales16) s = half(16);
  for (uint16_t& v : x16) v = half(18);
  for (std::vector<float>* values : {&scales, &x, &offset, &bias}) {
    for (float& v : *values) v = single();
  }

  if (!pick(0, 3)) {  // segments of zeros
    const size_t end = size(pick(1, K));
    for (size_t i = 0; i < end; ++i) x[i] = 0, x16[i] = 0;
  }

  const int64_t dims_b[] = {bases, T, W, 16}, dims_s[] = {bases, T, G, 16}, dims_z[] = {T, G, 16}, dims_c[] = {N};
  const int64_t one[] = {1, 1};
  qbb_matrix m{K, N, bases, group_size, QBB_LAYOUT_TILED, QBB_FORMAT_VERSION, {}, {}, {}, {}};
  m.planes = {planes.data(), dims_b, 4, QBB_UINT32};
  const void* s = half_scales ? static_cast<const void*>(scales16.data()) : scales.data();
  m.scales = {s, dims_s, 4, half_scales ? QBB_FLOAT16 : QBB_FLOAT32};
  m.offset = {offset.data(), has_offset ? dims_z : one, has_offset ? 3 : 2, QBB_FLOAT32};
  m.bias = {bias.data(), has_bias ? dims_c : one, 1, QBB_FLOAT32};

  for (const int32_t dtype : {QBB_FLOAT32, QBB_FLOAT16}) {
    const void* input = dtype == QBB_FLOAT16 ? static_cast<const void*>(x16.data()) : x.data();
    for (const int32_t mode : {QBB_MODE_EXACT, QBB_MODE_INT8, QBB_MODE_INT16}) {
      const std::vector<unsigned char> expected = output(m, mode, "scalar", dtype, M, input);
      add_to_digest(expected);
      for (int32_t isa = 0; isa < qbb_isa_count(); ++isa) {
        if (!qbb_isa_available(isa) || output(m, mode, qbb_isa_name(isa), dtype, M, input) == expected) continue;
        std::string detail = qbb_isa_name(isa);
        const int64_t numbers[] = {mode, K, N, M, bases, group_size, half_scales, has_offset, has_bias, dtype};
        for (const int64_t number : numbers) detail += " " + std::to_string(number);
        fail("differs from scalar (mode K N M bases group_size half_scales has_offset has_bias type of X)", detail);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  rng.seed(static_cast<unsigned>(std::atoi(argv[1])));
  const int count = std::atoi(argv[2]);
  for (int i = 0; i < count; ++i) one_matrix(i);
  for (int32_t isa = 0; isa < qbb_isa_count(); ++isa) {
    if (qbb_isa_available(isa)) std::printf("%s ", qbb_isa_name(isa));
  }
  std::printf("%016" PRIx64 "\n", digest);
}
