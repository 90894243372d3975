// Many rows of X (prompts), float16, on Hopper: weights made float16 in registers are one operand of the warpgroup's
// matrix product, X in shared memory is the other.
//
// A block makes 128 outputs for kTokens rows of X. Two warpgroups make weights and multiply; a third brings X into the
// order of levels.cuh, a few chunks ahead. Making the weights of a chunk overlaps with the products of the one before.
#pragma once

#include "cuda/batch.cuh"

namespace qbb::cuda {

constexpr int kWarpgroup = 128;
constexpr int kPromptTiles = 8;    // of 16 outputs: four for each of two warpgroups
constexpr int kPromptThreads = 3 * kWarpgroup;
constexpr int kPromptStages = 3;   // chunks of X in shared memory
constexpr int kHalfChunk = 64;     // inputs whose rows are 128 bytes, which is as far as the swizzle goes

template <int kTokens>
constexpr int kStageBytes = kTokens * kChunk * 2;

template <int kTokens>
constexpr size_t kPromptMemory = size_t{kPromptStages} * kStageBytes<kTokens> + 1024;  // and room to align it

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define QBB_WARPGROUP_PRODUCTS 1
#else
#define QBB_WARPGROUP_PRODUCTS 0
#endif

#if QBB_WARPGROUP_PRODUCTS && defined(__CUDA_ARCH__)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Rows of X of 128 bytes, in shared memory with the 128-byte swizzle: what the product wants to know of them.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) |
         (uint64_t{1} << 62);
}

// c [64, kTokens] += a [64, 16] × b [16, kTokens], not before end_products has waited for it.
__device__ __forceinline__ void start_product(float (&c)[128], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
        "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
        "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
        "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
        "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
        "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
        "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
        "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
        "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
        "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
        "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
        "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void start_product(float (&c)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
        "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
        "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
        "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a set of products, and waits until only the last kOpen sets are under way.
template <int kOpen>
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// A chunk of all rows of X into a stage.
template <int kTokens>
__device__ __forceinline__ void stage_chunk(char* stage, const uint16_t* x, int chunk, int here, int K, bool aligned,
                                            int thread) {
  for (int i = thread; i < kTokens * kChunkWords; i += kWarpgroup) {
    const int word = i % kChunkWords, row = i / kChunkWords;
    uint32_t r[16] = {};
    if (row < here) load_word(r, x + static_cast<int64_t>(row) * K, chunk * kChunk + word * QBB_WORD_BITS, K, aligned);
    char* to = stage + row * 128 + word * 4;
#pragma unroll
    for (int i4 = 0; i4 < 4; ++i4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // pair (i4 + 4j, i4 + 4j + 16): step 2·i4 + j / 2, its first or second eight inputs
        const uint32_t pair =
            __byte_perm(r[i4 / 2 + 2 * j], r[i4 / 2 + 2 * j + 8], i4 % 2 == 0 ? 0x5410 : 0x7632);
        const int piece = (i4 % 2 * 2 + j / 2) * 2 + j % 2;
        *reinterpret_cast<uint32_t*>(to + i4 / 2 * kTokens * 128 + (piece ^ (row % 8)) * 16) = pair;
      }
    }
  }
}

// Steps kFirst .. kFirst + 4 of a chunk's weights, added to `a`.
template <int kPart>
__device__ __forceinline__ void make_weights(uint32_t (&a)[4][4], const uint32_t (&w0)[kPart], const uint32_t (&w1)[kPart],
                                             const Levels& l0, const Levels& l1, int half) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t c0 = codes<kPart>(w0, 2 * half + i), c1 = codes<kPart>(w1, 2 * half + i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      look_up<kPart>(a[2 * i + h][0], a[2 * i + h][2], l0, c0, h);
      look_up<kPart>(a[2 * i + h][1], a[2 * i + h][3], l1, c1, h);
    }
  }
}

// Levels and words of bases kFrom .. kFrom + kPart of a chunk.
template <int kPart>
struct Part {
  uint32_t w0[kPart], w1[kPart];
  Levels l0, l1;
};

template <int kFrom, int kPart, int kBases>
__device__ __forceinline__ Part<kPart> part_of(const Chunk<kBases>& chunk, float inverse, float2 z) {
  Part<kPart> p;
  float s0[kPart], s1[kPart];
#pragma unroll
  for (int b = 0; b < kPart; ++b) {
    const float2 s = to_floats(chunk.scales[kFrom + b]);
    s0[b] = s.x * inverse;
    s1[b] = s.y * inverse;
    p.w0[b] = chunk.words[kFrom + b].x;
    p.w1[b] = chunk.words[kFrom + b].y;
  }
  p.l0 = make_levels<kPart>(s0, z.x);
  p.l1 = make_levels<kPart>(s1, z.y);
  return p;
}

__device__ __forceinline__ void add_pairs(uint32_t (&a)[4][4], const uint32_t (&b)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a[s][i]), *reinterpret_cast<const __half2*>(&b[s][i]));
      a[s][i] = *reinterpret_cast<const uint32_t*>(&sum);
    }
  }
}

#endif

// float16 X and scales; groups that are 2^n chunks, or whole rows. blockIdx.y: blocks of kTokens rows of X.
template <int kBases, int kTokens>
__global__ void __launch_bounds__(kPromptThreads, 1) prompt(const Weights w, const Rows rows) {
#if QBB_WARPGROUP_PRODUCTS && defined(__CUDA_ARCH__)
  extern __shared__ uint4 memory[];
  __shared__ uint64_t full[kPromptStages], empty[kPromptStages];
  char* stages = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  const int thread = static_cast<int>(threadIdx.x), group = thread / kWarpgroup;
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const int row = static_cast<int>(blockIdx.y) * kTokens, here = min(rows.M - row, kTokens);
  if (thread == 0) {
    for (int s = 0; s < kPromptStages; ++s) {
      init_barrier(&full[s], kWarpgroup);
      init_barrier(&empty[s], 2 * kWarpgroup);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const auto* x = static_cast<const uint16_t*>(rows.x) + static_cast<int64_t>(row) * w.K;
    const bool aligned = w.K % 8 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
    wait_for_previous_kernel();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % kPromptStages, turn = chunk / kPromptStages;
      if (turn > 0) wait_for(&empty[stage], (turn - 1) % 2);
      stage_chunk<kTokens>(stages + stage * kStageBytes<kTokens>, x, chunk, here, w.K, aligned, thread % kWarpgroup);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive(&full[stage]);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  const int lane = thread % 32, warp = thread / 32;
  const int tile = static_cast<int>(blockIdx.x) * kPromptTiles + warp, mine = min(tile, w.tiles - 1);
  const Lane own = lane_of(w, lane);
  const float inverse = 1.0f / w.unit;
  Chunk<kBases> next[1];
  load_chunks(next, w, own, mine, 0);
  float sums[kTokens / 2] = {};
  uint32_t a[2][4][4];  // weights of half a chunk, while those of the half before are still being multiplied
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % kPromptStages, turn = chunk / kPromptStages;
    const Chunk<kBases> now = next[0];
    load_chunks(next, w, own, mine, min(chunk + 1, chunks - 1));
    const float2 z = make_float2(now.offset.x * inverse, now.offset.y * inverse);
    constexpr int kPart = kBases == 4 ? 2 : kBases;
    const Part<kPart> part = part_of<0, kPart>(now, inverse, z);
    [[maybe_unused]] Part<2> rest;
    if constexpr (kBases == 4) rest = part_of<2, 2>(now, inverse, make_float2(0.0f, 0.0f));
    const uint32_t x = shared_address(stages + stage * kStageBytes<kTokens>);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      make_weights<kPart>(a[half], part.w0, part.w1, part.l0, part.l1, half);
      if constexpr (kBases == 4) {
        uint32_t b[4][4];
        make_weights<2>(b, rest.w0, rest.w1, rest.l0, rest.l1, half);
        add_pairs(a[half], b);
      }
      if (half == 0) wait_for(&full[stage], turn % 2);
      begin_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        start_product(sums, a[half][s], descriptor(x + static_cast<uint32_t>(half * kTokens * 128 + s * 32)));
      }
      end_products<1>();
      if (half == 0 && chunk > 0) arrive(&empty[(chunk - 1) % kPromptStages]);
    }
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  let_next_kernel_start();
  if (tile >= w.tiles) return;
  const int out = tile * QBB_TILE_ROWS + lane / 4 * 2;
  const float2 bias = make_float2(w.bias == nullptr || out >= w.N ? 0.0f : w.bias[out],
                                  w.bias == nullptr || out + 1 >= w.N ? 0.0f : w.bias[out + 1]);
  auto* y = static_cast<__half*>(rows.y);
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = n * 8 + lane % 4 * 2 + i;
      if (r >= here) continue;
      const int64_t at = static_cast<int64_t>(row + r) * w.N + out;
      const __half2 pair = __floats2half2_rn(fmaf(sums[4 * n + i], w.unit, bias.x), fmaf(sums[4 * n + 2 + i], w.unit, bias.y));
      if (out + 1 < w.N && w.N % 2 == 0) {
        *reinterpret_cast<__half2*>(y + at) = pair;
      } else {
        if (out < w.N) y[at] = __low2half(pair);
        if (out + 1 < w.N) y[at + 1] = __high2half(pair);
      }
    }
  }
#endif
}

}  // namespace qbb::cuda
