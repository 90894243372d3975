// Instructions that CUDA C++ has no name for, and those that not all GPUs have. Kernels contain no assembly themselves, so
// tests/native can run them on a CPU with another file of this name.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/weights.h"

#ifndef QBB_SHIFT_BY_PRODUCT
#define QBB_SHIFT_BY_PRODUCT 0
#endif

namespace qbb::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory.
__device__ __forceinline__ uint4* block_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

__device__ __forceinline__ int sum_of_lanes(int v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, v);
#else
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kAllLanes, v, s);
  return v;
#endif
}

// The largest of 32 floats that are at least 0: their bits are in the same order.
__device__ __forceinline__ float max_of_lanes(float v) {
#if __CUDA_ARCH__ >= 800
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(v)));
#else
  for (int s = 16; s > 0; s >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, s));
  return v;
#endif
}

// Bytes of b:a by the nibbles of the lower half of `selector`, which are at most 7. __byte_perm would see to that itself.
__device__ __forceinline__ uint32_t look_up_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// Bits of `a` where the mask has 1, of `b` elsewhere. Written as C++, it becomes two instructions.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t choose_bits(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(bits) : "r"(a), "r"(b), "n"(kMask));
  return bits;
}

// v >> kBits. Multiplication has a pipe of its own, where shifts wait for look-ups.
template <int kBits>
__device__ __forceinline__ uint32_t shift_right(uint32_t v) {
#if QBB_SHIFT_BY_PRODUCT
  uint32_t high;
  asm("mul.hi.u32 %0, %1, %2;" : "=r"(high) : "r"(v), "n"(1u << (32 - kBits)));
  return high;
#else
  return v >> kBits;
#endif
}

// The kernel before this one in the stream has ended, and its results can be seen. What does not depend on them may be
// read earlier. Does nothing unless the launch allows an early start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start where there is room: it waits for this one's end before it reads what this one writes.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Starts a copy of kBytes (4, 8 or 16, aligned) from device to shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes) : "memory");
  }
#else
  using Value = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  *static_cast<Value*>(to) = __ldg(static_cast<const Value*>(from));
#endif
}

// Closes a set of this thread's copies.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until only the last kOpen sets of the copies of each lane are under way; all lanes can read what has arrived.
template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
  __syncwarp();
}

// How many bits rows of A and columns of B share: A 16×128 bits, B 128×8. With g = lane / 4 and t = lane % 4, a lane
// gives word t of rows g and g + 8 of A and of column g of B; it gets rows g (c[0], c[1]) and g + 8 (c[2], c[3]) of
// columns 2t and 2t + 1.
__device__ __forceinline__ void count_shared_bits(int c[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(0));
#else  // Turing's binary product is another one
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane & ~3, column = lane % 4 * 8;
  c[0] = c[1] = c[2] = c[3] = 0;
  for (int i = 0; i < kChunkWords; ++i) {
    const uint32_t x = __shfl_sync(kAllLanes, a0, row + i), y = __shfl_sync(kAllLanes, a1, row + i);
    const uint32_t u = __shfl_sync(kAllLanes, b, column + i), v = __shfl_sync(kAllLanes, b, column + 4 + i);
    c[0] += __popc(x & u);
    c[1] += __popc(x & v);
    c[2] += __popc(y & u);
    c[3] += __popc(y & v);
  }
#endif
}

// c += a × b: a float16 16×16, b 16×8, c float32. With g = lane / 4 and t = lane % 4: a[0], a[1] are the pair 2t of rows
// g and g + 8, a[2], a[3] the pair 2t + 8; b[0], b[1] the same pairs of column g; c as count_shared_bits gives it.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const auto half = [&](uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  };
  half(a[0], a[1], b0);
  half(a[2], a[3], b1);
#endif
}


// c += a × b: whole numbers of 8 bits, a 16×32, b 32×8, c int32, whose start is the bits of 1.5·2^23 as a float where
// kFirst: c is then a float, too, that much too large. As `multiply`, with four neighbouring inputs in a register where that
// has two. Not on Turing.
template <bool kFirst>
__device__ __forceinline__ void multiply_bytes(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kStart = 0x4b400000;
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = kFirst ? kStart : c[i];
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace qbb::cuda
