// Variants of custom_ops/cuda/cluster.cuh against each other, decode (M = 1) and the older batch kernel, in one process: which
// is right and which is fastest, before heuristics.h is told. On a GPU of Hopper's kind:
//
//     nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -DQBB_CUDA_90A=1 -DONLY=3 -Icustom_ops -Icustom_ops/include
//         -o clusters benchmarks/clusters.cu          (one line; ONLY: bases; -DQBB_SHIFT_BY_PRODUCT=1: shifts as products)
//     ./clusters [shapes: 4096x4096,…|all] [rows of X,…|all] [bases,…|all] [a part of variants' names|all]
//
// `bytes8 w2 s8 p2 b1`: whole numbers, 8 rows of X, 2 multiplying warpgroups, 8 stages of 2 chunks, 1 block a multiprocessor; `halves…`:
// float16. Columns: clusters of 1, 2, 4, 8 blocks, µs and GB/s. WRONG: off against float64, not finite, or not the same twice.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/batch.cuh"
#include "cuda/cluster.cuh"
#include "cuda/cluster_bits.cuh"
#include "cuda/cluster_halves.cuh"
#include "cuda/decode.cuh"
#include "cuda/prepare.cuh"

using namespace qbb::cuda;

#define CHECK(x)                                                                               \
  do {                                                                                         \
    cudaError_t e = (x);                                                                       \
    if (e != cudaSuccess) {                                                                    \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e));            \
      std::exit(1);                                                                            \
    }                                                                                          \
  } while (0)

using Kernel = void (*)(Weights, Rows);

struct Variant {
  std::string name;
  Kernel kernel;
  int bases, tokens, threads, kind;  // kind: 0 cluster, 1 decode, 2 batch (halves), 3 batch (bytes)
  int64_t (*bytes)(int);
  int (*block)(int, int);
};

template <class How, int kBases, int W, int S, int P, int B>
Variant cluster_of(const char* how) {
  using Plan = ClusterPlan<W, S, P, B>;
  char name[96];
  std::snprintf(name, sizeof name, "%s%d w%d s%d p%d b%d", how, How::kTokens, W, S, P, B);
  return Variant{name, cluster<How, kBases, Plan>, kBases, How::kTokens, Plan::kThreads, 0,
                 ClusterMemory<How, kBases, Plan>::bytes, cluster_block<Plan>};
}

template <int kBases>
void add_variants(std::vector<Variant>& v) {
  v.push_back({"decode M=1", decode<kBases, 16, 1>, kBases, 1, kDecodeWarps * 32, 1, nullptr, nullptr});
  v.push_back({"old bytes8", batch<Bytes, kBases, 1>, kBases, 8, kBatchWarps * 32, 3, nullptr, nullptr});
  v.push_back({"old bytes16", batch<Bytes, kBases, 2>, kBases, 16, kBatchWarps * 32, 3, nullptr, nullptr});
  v.push_back({"old halves64", batch<Halves<false>, kBases, 8>, kBases, 64, kBatchWarps * 32, 2, nullptr, nullptr});
  v.push_back(cluster_of<BitProducts<8, false>, kBases, 2, 8, 2, 1>("bits"));
  v.push_back(cluster_of<BitProducts<8, false>, kBases, 2, 6, 4, 1>("bits"));
  v.push_back(cluster_of<HalfProducts<8, false>, kBases, 2, 8, 2, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<8, false>, kBases, 2, 6, 4, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<8, false>, kBases, 3, 6, 4, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<8, false>, kBases, 2, 4, 8, 1>("halves"));
  v.push_back(cluster_of<BitProducts<16, false>, kBases, 2, 6, 4, 1>("bits"));
  v.push_back(cluster_of<HalfProducts<16, false>, kBases, 2, 8, 2, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<16, false>, kBases, 2, 6, 4, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<16, false>, kBases, 3, 6, 4, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<32, false>, kBases, 2, 8, 2, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<32, false>, kBases, 2, 4, 4, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<64, false>, kBases, 2, 4, 2, 1>("halves"));
  v.push_back(cluster_of<HalfProducts<64, false>, kBases, 1, 4, 2, 1>("halves"));
}

__device__ uint32_t hash_of(uint64_t i) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
  x ^= x >> 31, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 29, x *= 0x94D049BB133111EBull;
  return static_cast<uint32_t>(x >> 32);
}

__global__ void fill_words(uint32_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) to[i] = hash_of(i + seed);
}
__global__ void fill_scales(__half* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x)
    to[i] = __float2half(0.005f + 0.01f * static_cast<float>(hash_of(i + 77) >> 8) / 16777216.0f);
}
__global__ void fill_x(__half* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    float v = 0;
    for (int j = 0; j < 4; ++j) v += static_cast<float>(hash_of(4 * i + j + 991) >> 8) / 16777216.0f - 0.5f;
    to[i] = __float2half(v * 1.7f);
  }
}

// float64; row `n` of the matrix is rows[i]; one warp an output.
__global__ void reference(const Weights w, const __half* x, int M, int step, int count, double* to) {
  const int64_t warp = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (warp >= static_cast<int64_t>(M) * count) return;
  const int m = warp / count, n = static_cast<int>(warp % count) * step;
  double sum = 0;
  for (int word = 0; word < w.words; ++word) {
    const int byte = lane / 4 < 4 ? lane / 4 : (lane - 16) / 4;  // input `lane` of a word (format.h)
    const int bit = 8 * byte + lane % 4 + (lane < 16 ? 0 : 4);
    const int k = word * 32 + lane;
    if (k >= w.K) continue;
    double level = 0;
    for (int b = 0; b < w.bases; ++b) {
      const uint32_t bits = w.planes[((static_cast<int64_t>(b) * w.tiles + n / 16) * w.words + word) * 16 + n % 16];
      const double s = __half2float(static_cast<const __half*>(w.scales)[((static_cast<int64_t>(b) * w.tiles + n / 16) * w.groups + word / 4) * 16 + n % 16]);
      level += (bits >> bit & 1) ? s : -s;
    }
    sum += level * static_cast<double>(__half2float(x[static_cast<int64_t>(m) * w.K + k]));
  }
  for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) to[warp] = sum;
}

int multiprocessors, most_memory;

int clusters_of(const Variant& v, int blocks, size_t memory) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = blocks, size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(v.threads), config.dynamicSmemBytes = memory;
  config.attrs = &size, config.numAttrs = 1;
  int count = 0;
  CHECK(cudaOccupancyMaxActiveClusters(&count, v.kernel, &config));
  return count;
}

struct Launch {
  dim3 grid;
  size_t memory;
  int cluster, block;
};

bool launch_of(const Variant& v, const Weights& w, int M, int blocks, int clusters, Launch& l) {
  l.cluster = 1, l.block = 0;
  if (v.kind == 0) {
    l.cluster = blocks;
    l.block = v.block(w.words, blocks);
    l.memory = v.bytes(l.block);
    l.grid = dim3(std::min((w.tiles + 3) / 4, clusters) * blocks);
  } else if (v.kind == 1) {
    l.grid = dim3(std::min(w.tiles, multiprocessors));
    l.memory = decode_memory(w.words, w.bases, 16, 1);
  } else {
    l.block = batch_block(w.words, w.bases, v.tokens, most_memory);
    if (l.block < kBatchPiece) return false;
    l.memory = batch_memory(w.bases, v.tokens, l.block);
    l.grid = dim3(std::min(w.tiles, multiprocessors), (M + v.tokens - 1) / v.tokens);
  }
  return l.memory <= static_cast<size_t>(most_memory);
}

void start(const Variant& v, const Launch& l, const Weights& w, Rows rows, cudaStream_t stream) {
  rows.block = l.block;
  cudaLaunchAttribute a[2]{};
  a[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  a[0].val.programmaticStreamSerializationAllowed = 1;
  a[1].id = cudaLaunchAttributeClusterDimension;
  a[1].val.clusterDim.x = l.cluster, a[1].val.clusterDim.y = a[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid, config.blockDim = dim3(v.threads), config.dynamicSmemBytes = l.memory, config.stream = stream;
  config.attrs = a, config.numAttrs = v.kind == 0 ? 2 : 1;
  CHECK(cudaLaunchKernelEx(&config, v.kernel, w, rows));
}

std::vector<int> list(const char* s, std::vector<int> all) {
  if (std::strcmp(s, "all") == 0) return all;
  std::vector<int> v;
  for (const char* p = s; *p;) {
    char* end;
    v.push_back(std::strtol(p, &end, 10));
    p = *end == ',' ? end + 1 : end;
  }
  return v;
}

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string shapes = argc > 1 ? argv[1] : "all", filter = argc > 4 ? argv[4] : "all";
  const auto Ms = list(argc > 2 ? argv[2] : "all", {4, 8, 16, 32, 64});
#ifdef ONLY
  const std::vector<int> bases{ONLY};
#else
  const auto bases = list(argc > 3 ? argv[3] : "all", {3, 2, 4});
#endif
  cudaDeviceProp prop;
  CHECK(cudaGetDeviceProperties(&prop, 0));
  multiprocessors = prop.multiProcessorCount;
  most_memory = prop.sharedMemPerBlockOptin;
  std::vector<Variant> variants;
  for (int b : bases) {
#ifdef QUICK  // to see whether all compiles
    if (b == 3) variants.push_back(cluster_of<HalfProducts<8, false>, 3, 2, 8, 2, 1>("halves"));
#else
#if !defined(ONLY) || ONLY == 2
    if (b == 2) add_variants<2>(variants);
#endif
#if !defined(ONLY) || ONLY == 3
    if (b == 3) add_variants<3>(variants);
#endif
#if !defined(ONLY) || ONLY == 4
    if (b == 4) add_variants<4>(variants);
#endif
#endif
  }
  for (const auto& v : variants) {
    CHECK(cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_memory));
  }
  int clusters[9] = {};
  for (const auto& v : variants) {
    if (v.kind != 0) continue;
    for (int c : {1, 2, 4, 8}) clusters[c] = clusters_of(v, c, most_memory);
    break;
  }
  std::printf("%s, %d multiprocessors, clusters of 1/2/4/8 blocks at a time: %d/%d/%d/%d\n", prop.name, multiprocessors,
              clusters[1], clusters[2], clusters[4], clusters[8]);
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  const int all_shapes[4][2] = {{4096, 4096}, {4096, 14336}, {14336, 4096}, {8192, 28672}};
  int bad = 0;
  for (const auto& shape : all_shapes) {
    const int K = shape[0], N = shape[1];
    char shape_name[32];
    std::snprintf(shape_name, sizeof shape_name, "%dx%d", K, N);
    if (shapes != "all" && ("," + shapes + ",").find("," + std::string(shape_name) + ",") == std::string::npos) continue;
    for (int b : bases) {
      Weights w{};
      w.K = K, w.N = N, w.bases = b, w.words = K / 32, w.groups = K / 128, w.tiles = N / 16, w.group_words = 4;
      w.half_scales = true, w.tile_bytes = w.words * 64;
      w.plane_bytes = int64_t{w.tiles} * w.words * 64, w.scale_bytes = int64_t{w.tiles} * w.groups * 32;
      const int64_t size = b * (w.plane_bytes + w.scale_bytes);
      const int copies = static_cast<int>(260e6 / size) + 2;
      char* memory;
      CHECK(cudaMalloc(&memory, size * copies));
      std::vector<Weights> all(copies, w);
      float* unit;
      unsigned* largest;
      CHECK(cudaMalloc(&unit, w.tiles * 64));
      CHECK(cudaMalloc(&largest, 4));
      CHECK(cudaMemset(largest, 0, 4));
      for (int i = 0; i < copies; ++i) {
        char* at = memory + i * size;
        all[i].planes = reinterpret_cast<uint32_t*>(at);
        all[i].scales = at + b * w.plane_bytes;
        fill_words<<<1024, 256>>>(reinterpret_cast<uint32_t*>(at), b * w.plane_bytes / 4, i * 1000003ull);
        fill_scales<<<1024, 256>>>(reinterpret_cast<__half*>(at + b * w.plane_bytes), b * w.scale_bytes / 2);
      }
      largest_levels<<<1024, 256>>>(all[0], unit, largest);
      float found = 0;
      CHECK(cudaMemcpy(&found, largest, 4, cudaMemcpyDeviceToHost));
      for (auto& each : all) each.row_unit = unit, each.unit = std::ldexp(1.0f, std::ilogb(found) - 13);
      __half *x, *y;
      CHECK(cudaMalloc(&x, 64 * K * 2));
      CHECK(cudaMalloc(&y, 64 * N * 2));
      fill_x<<<1024, 256>>>(x, 64 * K);
      CHECK(cudaDeviceSynchronize());
      const int step = 37, count = N / step;
      double* exact;
      CHECK(cudaMalloc(&exact, 64 * count * sizeof(double)));
      reference<<<(64 * count * 32 + 255) / 256, 256>>>(all[0], x, 64, step, count, exact);
      CHECK(cudaDeviceSynchronize());
      std::vector<double> wanted(64 * count);
      CHECK(cudaMemcpy(wanted.data(), exact, wanted.size() * sizeof(double), cudaMemcpyDeviceToHost));
      std::vector<__half> got(64 * N), again(64 * N);
      for (int M : Ms) {
        std::printf("--- %s, %d bases, M=%d: %.2f MB, %d copies\n", shape_name, b, M, size / 1e6, copies);
        for (const auto& v : variants) {
          if (v.bases != b || (filter != "all" && v.name.find(filter) == std::string::npos && v.kind != 1)) continue;
          const int m = v.kind == 1 ? 1 : M;
          if (v.kind != 1 && v.tokens < M && v.tokens < 32) continue;  // rounds only from 32 rows on
          if (v.kind != 1 && v.tokens >= 2 * std::max(M, 8)) continue;
          std::string line;
          for (int blocks : {1, 2, 4, 8}) {
            if (v.kind != 0 && blocks > 1) continue;
            Launch l;
            if (!launch_of(v, w, m, blocks, clusters[blocks], l)) continue;
            const Rows rows{x, y, kFloat16, m, 0};
            CHECK(cudaMemset(y, 0xff, 64 * N * 2));
            start(v, l, all[0], rows, stream);
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaMemcpy(got.data(), y, m * N * 2, cudaMemcpyDeviceToHost));
            start(v, l, all[0], rows, stream);
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaMemcpy(again.data(), y, m * N * 2, cudaMemcpyDeviceToHost));
            double error = 0, norm = 0;
            bool finite = true;
            for (int64_t i = 0; i < int64_t{m} * N; ++i) finite &= std::isfinite(__half2float(got[i]));
            for (int i = 0; i < m; ++i) {
              for (int j = 0; j < count; ++j) {
                const double e = wanted[i * count + j], d = __half2float(got[static_cast<int64_t>(i) * N + j * step]) - e;
                error += d * d, norm += e * e;
              }
            }
            const double relative = std::sqrt(error / norm);
            const bool same = std::memcmp(got.data(), again.data(), static_cast<size_t>(m) * N * 2) == 0;
            const bool fine = finite && same && relative < 6e-4;
            bad += !fine;
            cudaGraph_t graph;
            cudaGraphExec_t exec;
            CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            for (const auto& each : all) start(v, l, each, rows, stream);
            CHECK(cudaStreamEndCapture(stream, &graph));
            CHECK(cudaGraphInstantiate(&exec, graph, 0));
            std::vector<float> times;
            for (int i = 0; i < 14; ++i) {
              CHECK(cudaEventRecord(from, stream));
              CHECK(cudaGraphLaunch(exec, stream));
              CHECK(cudaEventRecord(to, stream));
              CHECK(cudaEventSynchronize(to));
              float ms;
              CHECK(cudaEventElapsedTime(&ms, from, to));
              if (i >= 3) times.push_back(1e3f * ms / copies);
            }
            CHECK(cudaGraphExecDestroy(exec));
            CHECK(cudaGraphDestroy(graph));
            std::sort(times.begin(), times.end());
            const float median = times[times.size() / 2];
            char text[96];
            std::snprintf(text, sizeof text, "  c%d %6.2f us %5.0f GB/s%s", blocks, median, size / median / 1e3, "");
            line += text;
            if (!fine) {
              std::snprintf(text, sizeof text, " WRONG(%.1e%s%s)", relative, finite ? "" : " nonfinite", same ? "" : " varies");
              line += text;
            }
          }
          if (!line.empty()) std::printf("%-20s%s\n", v.name.c_str(), line.c_str());
        }
      }
      for (void* p : {static_cast<void*>(memory), static_cast<void*>(unit), static_cast<void*>(largest), static_cast<void*>(x),
                      static_cast<void*>(y), static_cast<void*>(exact)}) {
        CHECK(cudaFree(p));
      }
    }
  }
  std::printf("wrong: %d\n", bad);
  return bad != 0;
}
