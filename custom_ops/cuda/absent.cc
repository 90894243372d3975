// The C interface of the CUDA kernels in a library that was built without them.
#include "core/guard.h"

extern "C" {

int32_t qbb_cuda_compiled(void) { return 0; }

qbb_status qbb_cuda_kernel_create(const qbb_matrix*, int32_t, const char*, qbb_cuda_kernel** kernel, char* error,
                                  size_t error_size) {
  return qbb::core::guard(error, error_size, [&] {
    if (kernel != nullptr) *kernel = nullptr;
    throw qbb::core::Error("no CUDA kernels in this library", "one that was built where nvcc is", "a build for CPUs",
                           QBB_UNSUPPORTED);
  });
}

qbb_status qbb_cuda_kernel_run(const qbb_cuda_kernel*, int32_t, int64_t, const void*, void*, void*, char* error,
                               size_t error_size) {
  return qbb::core::guard(error, error_size, [&] { qbb::core::need(nullptr, "kernel"); });
}

void qbb_cuda_kernel_destroy(qbb_cuda_kernel*) {}

}  // extern "C"
