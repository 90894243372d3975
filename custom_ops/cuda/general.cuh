// What no other kernel takes: groups that are not whole chunks of 128 inputs, more than four bases, float32 scales, very
// long rows. One block for 16 rows of the matrix and one row of X; slower, with the same 16-bit activations.
#pragma once

#include "cuda/planes.cuh"

namespace qbb::cuda {

constexpr int kGeneralWarps = 8;

__global__ void __launch_bounds__(kGeneralWarps * 32) general(const Weights w, const Rows rows) {
  __shared__ float partial[kGeneralWarps][QBB_TILE_ROWS];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4, sign = t == 3 ? -2 : 2;
  const int tile = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int chunks = (w.words + kChunkWords - 1) / kChunkWords;
  const bool aligned = in_fours(w, rows);
  let_next_kernel_start();
  wait_for_previous_kernel();
  float sums[2] = {0.0f, 0.0f};
  for (int chunk = warp; chunk < chunks; chunk += kGeneralWarps) {
    const Planes p = to_planes<16>(to_float4(load_raw(w, rows, row, chunk, lane, aligned), rows.type), lane);
    const int from = 8 * t + lane_of_plane(g);  // plane g of word t, and plane g + 8
    const uint32_t x[2] = {__shfl_sync(kAllLanes, p.planes[0], from), __shfl_sync(kAllLanes, p.planes[1], from)};
    int totals[kChunkWords];
#pragma unroll
    for (int i = 0; i < kChunkWords; ++i) totals[i] = sum_of_lanes(lane / 8 == i ? p.total : 0);
    const int word = chunk * kChunkWords + t;
    const int last = min(chunk * kChunkWords + kChunkWords, w.words) - 1;
    for (int group = chunk * kChunkWords / w.group_words; group <= last / w.group_words; ++group) {
      const bool mine = word < w.words && word / w.group_words == group;
      int total = 0;
#pragma unroll
      for (int i = 0; i < kChunkWords; ++i) {
        if ((chunk * kChunkWords + i) / w.group_words == group) total += totals[i];  // words past the end add nothing
      }
      const float half_total = t == 0 ? 0.5f * static_cast<float>(total) : 0.0f;
      float part[2] = {0.0f, 0.0f};
      for (int b = 0; b < w.bases; ++b) {
        const int64_t at = static_cast<int64_t>(b) * w.tiles + tile;
        uint2 a = make_uint2(0, 0);
        if (mine) a = *reinterpret_cast<const uint2*>(w.planes + (at * w.words + word) * QBB_TILE_ROWS + 2 * g);
        int c[4], d[4];
        count_shared_bits(c, a.x, a.y, x[0]);
        count_shared_bits(d, a.x, a.y, x[1]);
        const float2 scale = load_scales(w, (at * w.groups + group) * QBB_TILE_ROWS + 2 * g);
        part[0] = fmaf(scale.x, static_cast<float>(weigh(c[0], c[1], d[0], d[1], sign)) - half_total, part[0]);
        part[1] = fmaf(scale.y, static_cast<float>(weigh(c[2], c[3], d[2], d[3], sign)) - half_total, part[1]);
      }
      if (w.offset != nullptr) {
        const float* z = w.offset + (static_cast<int64_t>(tile) * w.groups + group) * QBB_TILE_ROWS + 2 * g;
        part[0] = fmaf(z[0], half_total, part[0]);
        part[1] = fmaf(z[1], half_total, part[1]);
      }
      sums[0] = fmaf(p.step, part[0], sums[0]);
      sums[1] = fmaf(p.step, part[1], sums[1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float v = sums[i] * static_cast<float>(2 << (2 * t));
    v += __shfl_xor_sync(kAllLanes, v, 1);
    v += __shfl_xor_sync(kAllLanes, v, 2);
    if (t == 0) partial[warp][2 * g + i] = v;
  }
  __syncthreads();
  const int n = static_cast<int>(threadIdx.x), out = tile * QBB_TILE_ROWS + n;
  if (n < QBB_TILE_ROWS && out < w.N) {
    float sum = w.bias == nullptr ? 0.0f : w.bias[out];
    for (int v = 0; v < kGeneralWarps; ++v) sum += partial[v][n];
    store_y(rows, static_cast<int64_t>(row) * w.N + out, sum);
  }
}

}  // namespace qbb::cuda
