// What cluster.cuh and its ways to multiply (cluster_bits.cuh, cluster_halves.cuh) agree upon.
#pragma once

#include "cuda/device.cuh"
#include "cuda/warpgroup.cuh"

namespace qbb::cuda {

constexpr int kClusterTiles = 4;    // of 16 outputs: one for each warp of a warpgroup; together a set
constexpr int kProductRow = 128;    // bytes, which is as far as the swizzle goes

// Piece `piece` of 16 bytes of a row changes places with others of that row.
__device__ __forceinline__ int place_in_row(int row, int piece) { return row * kProductRow + (piece ^ row % 8) * 16; }

// Weights in shared memory, for one warp: chunks `chunk` and on, before `end`, of its tile of a set.
struct Piece {
  const char* stage;
  uint64_t* empty;  // told once all is read
  int tile, chunk, end, group_shift;
  bool offset;  // whether there are any

  __device__ __forceinline__ bool has(int u) const { return chunk + u < end; }  // elsewhere there may be anything

  // Of the lane's rows 2g and 2g + 1: word t of chunk u.
  template <class Memory>
  __device__ __forceinline__ uint2 words(int basis, int u, int lane) const {
    const char* at = stage + (basis * kClusterTiles + tile) * Memory::kTileWords;
    return *reinterpret_cast<const uint2*>(at + ((u * kChunkWords + lane % 4) * QBB_TILE_ROWS + lane / 4 * 2) * 4);
  }

  // Of a row in chunk u: where its scales and offsets are. The stage begins with the first chunk's group.
  template <class Memory>
  __device__ __forceinline__ int place(int u, int row) const {
    const int group = ((chunk + u) >> group_shift) - (chunk >> group_shift);
    return (tile * Memory::kChunks + group) * QBB_TILE_ROWS + row;
  }
  template <class Memory>
  __device__ __forceinline__ const char* scale(int basis, int place) const {
    return stage + Memory::kScales + basis * kClusterTiles * Memory::kTileScales + place * 2;
  }
  template <class Memory>
  __device__ __forceinline__ const char* offsets(int place) const {
    return stage + Memory::kOffsets + place * 4;
  }
};

}  // namespace qbb::cuda
