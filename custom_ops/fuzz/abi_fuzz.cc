// Any bytes as a use of the C interface: a matrix, right or wrong in any field, a kernel of it, some runs.
//
// Every buffer has exactly the size that its tensor claims, at any address, so that reading a byte too many is a report of the
// sanitizer; what a refusal must not read lies behind a page without access. Found as well: a refusal without text or with a kernel,
// text of two lines, a refusal of what was validated, an output that nobody wrote or that depends on threads, instruction
// set or the run.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "qbb/ops.h"

namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 20;  // of one tensor; a larger one is only validated
constexpr int64_t kMaxWork = int64_t{1} << 15;    // signs times rows of X, so that there are a thousand inputs a second

void demand(bool good, const char* what, const char* detail = "") {
  if (good) return;
  std::fprintf(stderr, "FOUND: %s: %s\n", what, detail);
  std::abort();
}

// The input, as numbers; zeros where it has ended.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  template <class T>
  T take() {
    T value{};
    const size_t count = std::min(sizeof value, static_cast<size_t>(end_ - at_));
    if (count > 0) std::memcpy(&value, at_, count);
    at_ += count;
    return value;
  }
  int64_t pick(int64_t low, int64_t high) {  // a byte or two
    const int64_t range = high - low + 1;
    return low + (range <= 256 ? take<uint8_t>() : take<uint16_t>()) % range;
  }
  bool rarely() { return take<uint8_t>() >= 0xf0; }  // the zeros of an input that has ended mean never

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

void* no_access() {
  static void* page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return page;
}

// Heap memory that ends where it should, `shift` bytes off the allocator's alignment.
struct Buffer {
  std::unique_ptr<uint8_t[]> memory;
  void* data = nullptr;

  void make(int64_t bytes, int64_t shift) {
    memory.reset(new uint8_t[static_cast<size_t>(bytes + shift)]);
    data = memory.get() + shift;
  }
  // Bytes of the input, then more of the same kind: any floats, NaN and infinity among them.
  void fill(Source& source, int64_t bytes) {
    uint64_t state = source.take<uint64_t>() | 1;
    const bool tame = (state >> 8 & 3) != 0;  // mostly floats of ordinary size
    auto* out = static_cast<uint8_t*>(data);
    for (int64_t i = 0; i < bytes; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      out[i] = static_cast<uint8_t>(state >> 56);
      if (tame && i % 2 == 1) out[i] = static_cast<uint8_t>((out[i] & 0x83) | 0x38);
    }
  }
};

struct Tensor {
  std::vector<int64_t> dims;
  Buffer buffer;
  qbb_tensor tensor{};
  bool huge = false;

  void make(Source& source, std::initializer_list<int64_t> shape, int32_t dtype) {
    dims = shape;
    if (source.rarely()) {  // one thing wrong
      switch (source.pick(0, 4)) {
        case 0: dtype = source.take<int32_t>(); break;
        case 1: dims.resize(static_cast<size_t>(source.pick(0, 6)), source.pick(0, 3)); break;
        case 2:
          if (!dims.empty()) dims[static_cast<size_t>(source.pick(0, static_cast<int64_t>(dims.size()) - 1))] = source.take<int64_t>();
          break;
        case 3:
          if (!dims.empty()) dims[static_cast<size_t>(source.pick(0, static_cast<int64_t>(dims.size()) - 1))] += source.pick(0, 2) - 1;
          break;
        default: dtype = source.rarely() ? QBB_UINT32 : source.pick(0, 1) ? QBB_FLOAT16 : QBB_FLOAT32;
      }
    }
    dims.shrink_to_fit();
    int64_t bytes = dtype == QBB_FLOAT32 || dtype == QBB_UINT32 ? 4 : dtype == QBB_FLOAT16 ? 2 : 1;
    for (const int64_t d : dims) {
      if (d < 0 || huge || __builtin_mul_overflow(bytes, d, &bytes) || bytes > kMaxBytes) huge = true;
    }
    tensor = qbb_tensor{no_access(), dims.data(), static_cast<int32_t>(dims.size()), dtype};
    if (!huge) {
      buffer.make(bytes, source.pick(0, 3));
      buffer.fill(source, bytes);
      tensor.data = buffer.data;
    }
    if (source.rarely()) tensor.data = nullptr;
    if (source.rarely()) tensor.dims = nullptr;
    if (source.rarely()) tensor.rank = -source.pick(0, 3);
  }
};

// What a call says, in a buffer of any size.
struct Message {
  explicit Message(Source& source) {
    size = static_cast<size_t>(source.rarely() ? source.pick(0, 40) : 512);
    text.reset(new char[size + (size == 0)]);
    if (size == 0 && source.take<uint8_t>() & 1) text.reset();
  }
  const char* c_str() const { return size == 0 ? "" : text.get(); }
  void check(qbb_status status) const {
    demand(status >= QBB_OK && status <= QBB_NO_MEMORY, "a status that does not exist");
    if (size == 0) return;
    demand(memchr(text.get(), '\0', size) != nullptr, "text without an end");
    demand((status == QBB_OK) == (text[0] == '\0') || size == 1, "status and text do not agree", c_str());
    for (const char* c = c_str(); *c != '\0'; ++c) demand(static_cast<unsigned char>(*c) >= ' ', "text of two lines", c_str());
  }
  size_t size;
  std::unique_ptr<char[]> text;
};

void backwards(void*, int64_t count, void (*task)(void*, int64_t), void* arg) {
  for (int64_t i = count; i-- > 0;) task(arg, i);
}

bool same_values(const uint8_t* a, const uint8_t* b, int64_t bytes, bool half) {
  if (bytes == 0 || std::memcmp(a, b, static_cast<size_t>(bytes)) == 0) return true;
  const int64_t size = half ? 2 : 4;
  for (int64_t i = 0; i < bytes; i += size) {  // which NaN it is depends on the order of an addition's operands
    uint32_t u = 0, v = 0;
    std::memcpy(&u, a + i, static_cast<size_t>(size));
    std::memcpy(&v, b + i, static_cast<size_t>(size));
    const uint32_t magnitude = half ? 0x7fff : 0x7fffffff, infinity = half ? 0x7c00 : 0x7f800000;
    if (u != v && !((u & magnitude) > infinity && (v & magnitude) > infinity)) return false;
  }
  return true;
}

// Whether all of a tensor that was accepted are numbers; what weights that are none give is nobody's promise (docs/format.md).
bool all_finite(const Tensor& t) {
  const bool half = t.tensor.dtype == QBB_FLOAT16;
  int64_t count = 1;
  for (const int64_t d : t.dims) count *= d;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const uint8_t*>(t.tensor.data) + i * (half ? 2 : 4), half ? 2 : 4);
    const uint32_t exponent = half ? 0x7c00 : 0x7f800000;
    if ((bits & exponent) == exponent) return false;
  }
  return true;
}

void run(Source& source, const qbb_matrix& m, int32_t mode, qbb_kernel* kernel, bool finite) {
  int64_t M = source.rarely() ? source.pick(500, 540) : source.pick(0, source.take<uint8_t>() < 0xc0 ? 8 : 45);
  M = std::min(M, std::max(int64_t{2}, kMaxWork / (m.K * m.N * m.bases)));
  int32_t dtype = source.pick(0, 1) ? QBB_FLOAT16 : QBB_FLOAT32;
  const bool half = dtype == QBB_FLOAT16;
  const int64_t x_bytes = M * m.K * (half ? 2 : 4), y_bytes = M * m.N * (half ? 2 : 4);
  Buffer x, y, again;
  x.make(x_bytes, source.pick(0, 3));
  x.fill(source, x_bytes);
  y.make(y_bytes, source.pick(0, 3));
  again.make(y_bytes, source.pick(0, 3));
  std::memset(y.data, 0xff, static_cast<size_t>(y_bytes));
  std::memset(again.data, 0x00, static_cast<size_t>(y_bytes));

  if (source.rarely()) {  // one thing wrong, nothing may be read
    Message text(source);
    void* from = no_access();
    void* to = no_access();
    switch (source.pick(0, 4)) {
      case 0: dtype = source.take<int32_t>(); break;
      case 1: M = source.take<int64_t>(); break;
      case 2: from = nullptr; break;
      case 3: to = nullptr; break;
      default: kernel = nullptr;
    }
    const bool known = dtype == QBB_FLOAT32 || dtype == QBB_FLOAT16;
    const __int128 size = static_cast<__int128>(M) * 4 * std::max(m.K, m.N);
    const bool valid = kernel && known && M >= 0 && size < INT64_MAX && ((from && to) || M == 0);
    if (valid && M > 0) return;  // harmless by chance: then it would read
    const qbb_status status = qbb_kernel_run(kernel, dtype, M, from, to, nullptr, nullptr, text.text.get(), text.size);
    text.check(status);
    demand((status == QBB_OK) == valid, "run: taken or refused wrongly", text.c_str());
    return;
  }
  Message text(source);
  qbb_status status = qbb_kernel_run(kernel, dtype, M, x.data, y.data, nullptr, nullptr, text.text.get(), text.size);
  text.check(status);
  demand(status == QBB_OK, "a good run was refused", text.c_str());

  // The same bytes again, from another order of tasks and the plain kernel.
  qbb_kernel* plain = nullptr;
  status = qbb_kernel_create(&m, mode, source.pick(0, 1) ? "scalar" : qbb_kernel_isa(kernel), &plain, nullptr, 0);
  demand(status == QBB_OK, "a second kernel was refused");
  status = qbb_kernel_run(plain, dtype, M, x.data, again.data, backwards, nullptr, text.text.get(), text.size);
  text.check(status);
  demand(status == QBB_OK, "a second run was refused", text.c_str());
  const std::string name = std::string(qbb_kernel_isa(kernel)) + " and " + qbb_kernel_isa(plain);
  if (finite) {
    demand(same_values(static_cast<uint8_t*>(y.data), static_cast<uint8_t*>(again.data), y_bytes, half), "two results", name.c_str());
  }
  qbb_kernel_destroy(plain);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Source source(data, size);
  const int64_t K = source.rarely() ? source.pick(1, 1200) : source.pick(1, 160);
  const int64_t N = source.pick(1, 50), bases = source.pick(1, QBB_MAX_BASES);
  const int64_t groups = source.pick(0, (K - 1) / 32), group_size = groups == 0 ? K : 32 * groups;
  const bool tiled = source.pick(0, 1);
  const int64_t W = (K + 31) / 32, G = (K + group_size - 1) / group_size, T = (N + 15) / 16;
  Tensor planes, scales, offset, bias;
  const int32_t scale_type = source.pick(0, 1) ? QBB_FLOAT16 : QBB_FLOAT32;
  if (tiled) {
    planes.make(source, {bases, T, W, 16}, QBB_UINT32);
    scales.make(source, {bases, T, G, 16}, scale_type);
    source.pick(0, 1) ? offset.make(source, {T, G, 16}, QBB_FLOAT32) : offset.make(source, {1, 1}, QBB_FLOAT32);
  } else {
    planes.make(source, {bases, N, W}, QBB_UINT32);
    scales.make(source, {bases, N, G}, scale_type);
    source.pick(0, 1) ? offset.make(source, {N, G}, QBB_FLOAT32) : offset.make(source, {1, 1}, QBB_FLOAT32);
  }
  source.pick(0, 1) ? bias.make(source, {N}, QBB_FLOAT32) : bias.make(source, {1}, QBB_FLOAT32);
  qbb_matrix m{K, N, bases, group_size, tiled ? QBB_LAYOUT_TILED : QBB_LAYOUT_ROWS, QBB_FORMAT_VERSION,
               planes.tensor, scales.tensor, offset.tensor, bias.tensor};
  if (source.rarely()) {
    int64_t* const fields[] = {&m.K, &m.N, &m.bases, &m.group_size, &m.layout, &m.format};
    for (int64_t count = source.pick(1, 3); count > 0; --count) {
      int64_t& field = *fields[source.pick(0, 5)];
      field = source.pick(0, 1) ? source.take<int64_t>() : field + source.pick(0, 64) - 32;
    }
  }
  int32_t mode = static_cast<int32_t>(source.pick(0, QBB_NUM_MODES - 1));
  if (source.rarely()) mode = source.take<int32_t>();
  const bool mode_exists = mode >= 0 && mode < QBB_NUM_MODES;
  std::string word;
  const char* isa = qbb_isa_name(static_cast<int32_t>(source.pick(0, 5)));  // NULL past the end: the best
  if (source.rarely()) {
    for (int64_t length = source.pick(0, 20); length > 0; --length) word += static_cast<char>(source.take<uint8_t>());
    isa = word.c_str();
  }
  bool isa_exists = isa == nullptr || *isa == '\0';
  for (int32_t i = 0; i < qbb_isa_count(); ++i) {
    isa_exists = isa_exists || (std::strcmp(isa, qbb_isa_name(i)) == 0 && qbb_isa_available(i));
  }

  Message text(source);
  const qbb_status valid = qbb_matrix_validate(source.rarely() ? nullptr : &m, text.text.get(), text.size);
  text.check(valid);
  const bool huge = planes.huge || scales.huge || offset.huge || bias.huge;
  if (valid == QBB_OK && huge) return 0;  // a good description of memory that is not there
  qbb_kernel* kernel = static_cast<qbb_kernel*>(no_access());
  const qbb_status status = qbb_kernel_create(&m, mode, isa, &kernel, text.text.get(), text.size);
  text.check(status);
  demand((status == QBB_OK) == (kernel != nullptr), "status and kernel do not agree", text.c_str());
  if (valid == QBB_OK) demand((status == QBB_OK) == (mode_exists && isa_exists), "create: taken or refused wrongly", text.c_str());
  if (kernel != nullptr) {
    demand(qbb_matrix_validate(&m, nullptr, 0) == QBB_OK, "a kernel of a matrix that is not valid");
    const bool finite = all_finite(scales) && all_finite(offset);
    run(source, m, mode, kernel, finite);
    if (source.rarely()) run(source, m, mode, kernel, finite);
  }
  qbb_kernel_destroy(kernel);
  return 0;
}
