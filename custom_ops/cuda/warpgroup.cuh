// Hopper's warpgroup products and what goes with them: clusters of blocks, moving registers between warpgroups.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/barriers.cuh"
#include "cuda/weights.h"

// Whether this pass compiles Hopper's own instructions: the host's pass does, too, or it would not know the kernel.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QBB_WARPGROUP_PRODUCTS 1
#else
#define QBB_WARPGROUP_PRODUCTS 0
#endif

#if QBB_WARPGROUP_PRODUCTS

namespace qbb::cuda {

// What was stored in shared memory, as far as this thread knows of it, can be read by products that it starts.
__device__ __forceinline__ void show_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrives once what this thread copies has arrived; the thread goes on.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of the cluster's blocks say that they are there; each waits for all others before it needs one.
__device__ __forceinline__ void enter_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void meet_cluster() {
  enter_cluster();
  wait_for_cluster();
}

// Where another block of the cluster has what this one has at `p`.
__device__ __forceinline__ uint32_t address_in_block(const void* p, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}

// `arrive` at the barrier that another block of the cluster has where this one has `barrier`.
__device__ __forceinline__ void arrive_in_block(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_block(barrier, rank)) : "memory");
}

// A box of a matrix, from column x and row y on, to the same place in two blocks of the cluster, `first` and the next one, whose
// barriers are told.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier, int first) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
      "[%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(static_cast<uint16_t>(3 << first))
      : "memory");
}

// Stores to a block of the cluster, and tells its barrier of 16 bytes that came. Stores with a release and an acquire would wait
// for all other memory operations of the thread, as far as the GPU's memory.
__device__ __forceinline__ void store_in_block(uint32_t address, float4 v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

// Rows of X of 128 bytes, in shared memory with the 128-byte swizzle: what the product wants to know of them.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

// The same of rows that begin so many bytes later, a multiple of 16.
__device__ __forceinline__ uint64_t later(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// c [64, n] += a [64, k] × b [k, n], not before end_products has waited for it; c = a × b where not kAdd. Lists of
// registers, for assembly:
#define QBB_NAMES_4 "%0, %1, %2, %3"
#define QBB_NAMES_8 QBB_NAMES_4 ", %4, %5, %6, %7"
#define QBB_NAMES_16 QBB_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QBB_NAMES_32 \
  QBB_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QBB_NAMES_64 \
  QBB_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QBB_NAMES_128 \
  QBB_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QBB_4(how, i) how(c[i]), how(c[i + 1]), how(c[i + 2]), how(c[i + 3])
#define QBB_8(how, i) QBB_4(how, i), QBB_4(how, i + 4)
#define QBB_16(how, i) QBB_8(how, i), QBB_8(how, i + 8)
#define QBB_32(how, i) QBB_16(how, i), QBB_16(how, i + 16)
#define QBB_64(how, i) QBB_32(how, i), QBB_32(how, i + 32)
#define QBB_128(how, i) QBB_64(how, i), QBB_64(how, i + 64)
#define QBB_FLOAT_SUM(v) "+f"(v)
#define QBB_WHOLE_SUM(v) "+r"(v)

// float16, k = 16; n is twice the number of sums.
#define QBB_HALF_PRODUCT(kCount, n, a0, a1, a2, a3, at, add)                                                              \
  template <bool kAdd = true>                                                                                          \
  __device__ __forceinline__ void start_product(float (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 {" QBB_NAMES_##kCount "}, {%" a0 ", %" a1       \
                 ", %" a2 ", %" a3 "}, %" at ", %" add ", 1, 1, 0;"                                                     \
                 : QBB_##kCount(QBB_FLOAT_SUM, 0)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0));                             \
  }
QBB_HALF_PRODUCT(4, "8", "4", "5", "6", "7", "8", "9")
QBB_HALF_PRODUCT(8, "16", "8", "9", "10", "11", "12", "13")
QBB_HALF_PRODUCT(16, "32", "16", "17", "18", "19", "20", "21")
QBB_HALF_PRODUCT(32, "64", "32", "33", "34", "35", "36", "37")
QBB_HALF_PRODUCT(64, "128", "64", "65", "66", "67", "68", "69")
QBB_HALF_PRODUCT(128, "256", "128", "129", "130", "131", "132", "133")

// Whole numbers of 8 bits, k = 32.
#define QBB_BYTE_PRODUCT(kCount, n, a0, a1, a2, a3, at, add)                                                              \
  template <bool kAdd = true>                                                                                          \
  __device__ __forceinline__ void start_product(int (&c)[kCount], const uint32_t (&a)[4], uint64_t b) {                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8.s8 {" QBB_NAMES_##kCount "}, {%" a0 ", %" a1         \
                 ", %" a2 ", %" a3 "}, %" at ", %" add ";"                                                              \
                 : QBB_##kCount(QBB_WHOLE_SUM, 0)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0));                             \
  }
QBB_BYTE_PRODUCT(8, "16", "8", "9", "10", "11", "12", "13")
QBB_BYTE_PRODUCT(16, "32", "16", "17", "18", "19", "20", "21")

#undef QBB_NAMES_4
#undef QBB_NAMES_8
#undef QBB_NAMES_16
#undef QBB_NAMES_32
#undef QBB_NAMES_64
#undef QBB_NAMES_128
#undef QBB_4
#undef QBB_8
#undef QBB_16
#undef QBB_32
#undef QBB_64
#undef QBB_128
#undef QBB_FLOAT_SUM
#undef QBB_WHOLE_SUM
#undef QBB_HALF_PRODUCT
#undef QBB_BYTE_PRODUCT

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a set of products.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until only the last kOpen sets are under way.
template <int kOpen>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Sums are read after the wait before this, and not earlier: the compiler does not know that products are under way.
__device__ __forceinline__ void hold(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
__device__ __forceinline__ void hold(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }
__device__ __forceinline__ void hold(uint32_t& weights) { asm volatile("" : "+r"(weights)::"memory"); }

template <class T, int kCount>
__device__ __forceinline__ void hold(T (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) hold(sums[i]);
}

// This warpgroup needs fewer registers than it was started with; or more, which others gave.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace qbb::cuda

#endif
