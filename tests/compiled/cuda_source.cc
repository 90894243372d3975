// What TVM's CUDA source takes from a GPU, for tests/native/cuda_on_cpu/emulate.h; SOURCE is the file that TVM wrote.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "emulate.h"

template <class T>
T part(const emulate::Shown& shown, int lane) {
  T value;
  std::memcpy(&value, &shown[lane][0], 4);
  return value;
}
inline float __shfl_sync(unsigned, float value, int from, int width) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const int first = emulate::lane() / width * width;
  return part<float>(emulate::show(&bits, 1), first + (from & (width - 1)));
}
inline float __shfl_xor_sync(unsigned mask, float value, int lanes, int) { return __shfl_xor_sync(mask, value, lanes); }

// X as it is before the kernel before this one has ended: not numbers. The first thread that waits for it brings them.
std::vector<float> unfinished;
const float* finished = nullptr;
bool waited = false;
inline float* not_yet(const void* x, size_t size) {
  unfinished.assign(size, std::nanf(""));
  finished = static_cast<const float*>(x);
  waited = false;
  return unfinished.data();
}
inline void wait_for_kernel_before() {
  if (!waited) std::copy_n(finished, unfinished.size(), unfinished.begin());
  waited = true;
}

struct Pointer {  // of whatever type a kernel wants
  void* p;
  template <class T>
  operator T*() const {
    return static_cast<T*>(p);
  }
};

#define alignas(n) __attribute__((aligned(n)))  // nvcc takes it behind __shared__, g++ does not
#include SOURCE
