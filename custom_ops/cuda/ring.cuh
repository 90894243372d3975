// Weights on their way: each warp copies the next pieces of its weights into shared memory, a few pieces ahead of their
// use, and without registers that wait for them.
#pragma once

#include "cuda/device.cuh"

namespace qbb::cuda {

// A piece is kChunks chunks of a tile. In shared memory: [kBases][kChunks][4 words][16 rows], then [kBases][kChunks][16]
// float16 scales, then [kChunks][16] offsets where there are any.
template <int kBases, int kChunks>
struct Ring {
  static constexpr int kWords = kChunks * kChunkWords * QBB_TILE_ROWS;  // of a basis; all sizes in 32-bit words
  static constexpr int kScales = kChunks * QBB_TILE_ROWS / 2;
  static constexpr int kOffsets = kChunks * QBB_TILE_ROWS;
  static constexpr int kPiece = kBases * (kWords + kScales) + kOffsets;

  // Starts the copy of chunks first .. first + kChunks. Past the last word some word is copied: activations are 0 there.
  // Only for groups that are 2^shift chunks, or whole rows. All lanes take part.
  static __device__ __forceinline__ void fetch(uint32_t* to, const Weights& w, int tile, int first, int lane) {
    constexpr int kSixteens = kWords / 4;  // of 16 bytes, four in a word of 16 rows
    static_assert(kScales <= 32, "one lane for each pair of scales");
#pragma unroll
    for (int i = 0; i < kSixteens; i += 32) {
      if (kSixteens % 32 != 0 && i + lane >= kSixteens) break;
      const int word = min(first * kChunkWords + (i + lane) / 4, w.words - 1);
      const uint32_t at = static_cast<uint32_t>(tile) * static_cast<uint32_t>(w.tile_bytes) +
                          static_cast<uint32_t>(word * (QBB_TILE_ROWS * 4) + lane % 4 * 16);
#pragma unroll
      for (int b = 0; b < kBases; ++b) {
        copy_async<16>(to + b * kWords + (i + lane) * 4, place(w.planes, b * w.plane_bytes, at));
      }
    }
    uint32_t* scales = to + kBases * kWords;
    if (lane < kScales) {
      const auto group = static_cast<uint32_t>(tile * w.groups + min((first + lane / 8) >> w.group_shift, w.groups - 1));
      const uint32_t pair = static_cast<uint32_t>(lane) % 8;
#pragma unroll
      for (int b = 0; b < kBases; ++b) {
        copy_async<4>(scales + b * kScales + lane,
                      place(w.scales, b * w.scale_bytes, group * (QBB_TILE_ROWS * 2) + pair * 4));
      }
      if (w.offset != nullptr) {
        copy_async<8>(scales + kBases * kScales + lane * 2, place(w.offset, 0, group * (QBB_TILE_ROWS * 4) + pair * 8));
      }
    }
  }

  // A lane's part of chunk u of a piece that has arrived.
  static __device__ __forceinline__ Chunk<kBases> take(const uint32_t* from, const Weights& w, int u, int lane) {
    const uint32_t* scales = from + kBases * kWords;
    const int pair = u * 8 + lane / 4;
    Chunk<kBases> chunk;
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      const int word = (u * kChunkWords + lane % 4) * QBB_TILE_ROWS + lane / 4 * 2;
      chunk.words[b] = *reinterpret_cast<const uint2*>(from + b * kWords + word);
      chunk.scales[b] = scales[b * kScales + pair];
    }
    chunk.offset = make_float2(0.0f, 0.0f);
    if (w.offset != nullptr) chunk.offset = *reinterpret_cast<const float2*>(scales + kBases * kScales + pair * 2);
    return chunk;
  }

  // Scales of chunk lane / 16 and row lane % 16 of a piece of two chunks that has arrived; returns the offset.
  static __device__ __forceinline__ float scales_of_row(float (&s)[kBases], const uint32_t* from, const Weights& w,
                                                        int lane) {
    static_assert(kChunks == 2, "one lane for each row");
    const uint32_t* scales = from + kBases * kWords;
#pragma unroll
    for (int b = 0; b < kBases; ++b) {
      const float2 two = to_floats(scales[b * kScales + lane / 2]);
      s[b] = lane % 2 == 0 ? two.x : two.y;
    }
    return w.offset == nullptr ? 0.0f : __uint_as_float(scales[kBases * kScales + lane]);
  }

 private:
  static __device__ __forceinline__ const void* place(const void* base, int64_t shared_offset, uint32_t offset) {
    return static_cast<const char*>(base) + shared_offset + offset;
  }
};

}  // namespace qbb::cuda
