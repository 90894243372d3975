// Starts kernels. The only thing that other files need to know of them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/heuristics.h"

namespace qbb::cuda {

struct Device {
  int number, arch, multiprocessors;
  int64_t shared_memory;  // bytes of a block at most
  int clusters[5];        // [n]: of 2n blocks that run at a time, with a multiprocessor for each block
};

// Device::clusters.
cudaError_t count_clusters(Device& device);

// Y = op(X): one launch or several on `stream`.
cudaError_t launch(const Weights& w, const Rows& rows, int64_t M, bool integer, const Device& device, cudaStream_t stream);

// Lets the kernels for these weights use as much shared memory as they need.
cudaError_t reserve(const Weights& w, const Device& device);

}  // namespace qbb::cuda
