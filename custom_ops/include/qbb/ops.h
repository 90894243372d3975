/* The C interface of the kernels. It knows neither ONNX Runtime nor Python.
 *
 *     qbb_matrix m = {...};                                   describe the weights
 *     qbb_kernel* k = NULL;
 *     char error[512];
 *     if (qbb_kernel_create(&m, QBB_MODE_EXACT, NULL, &k, error, sizeof error) != QBB_OK) ...
 *     qbb_kernel_run(k, QBB_FLOAT32, M, x, y, NULL, NULL, error, sizeof error);
 *     qbb_kernel_destroy(k);
 *
 * Every function that can fail returns a status and writes one line into `error` (always terminated, cut to
 * `error_size`; NULL and 0 are fine): what is wrong, what was expected, what was found.
 */
#ifndef QBB_OPS_H_
#define QBB_OPS_H_

#include <stddef.h>
#include <stdint.h>

#include "qbb/format.h"

#if defined(_WIN32)
#define QBB_EXPORT __declspec(dllexport)
#else
#define QBB_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum qbb_status {
  QBB_OK = 0,
  QBB_INVALID = 1,     /* the caller handed us something that the format does not allow */
  QBB_UNSUPPORTED = 2, /* valid, but not with this library on this CPU or GPU */
  QBB_NO_MEMORY = 3,
  QBB_DEVICE = 4       /* the GPU, or its driver, refuses */
} qbb_status;

/* Element types, numbered as in ONNX. */
typedef enum qbb_dtype { QBB_FLOAT32 = 1, QBB_FLOAT16 = 10, QBB_UINT32 = 12, QBB_BFLOAT16 = 16 } qbb_dtype;

/* A dense, C-ordered tensor in the caller's memory, at any address. */
typedef struct qbb_tensor {
  const void* data;
  const int64_t* dims;
  int32_t rank;
  int32_t dtype; /* qbb_dtype */
} qbb_tensor;

/* One weight matrix: attributes and constant inputs of the node, with W = ceil(K/32), G = ceil(K/group_size),
 * T = ceil(N/16). */
typedef struct qbb_matrix {
  int64_t K;          /* in_features, >= 1 */
  int64_t N;          /* out_features, >= 1 */
  int64_t bases;      /* 1..8 */
  int64_t group_size; /* K, or a multiple of 32 below K */
  int64_t layout;     /* QBB_LAYOUT_ROWS or QBB_LAYOUT_TILED */
  int64_t format;     /* QBB_FORMAT_VERSION */
  qbb_tensor planes;  /* B uint32           [bases, N, W] or [bases, T, W, 16] */
  qbb_tensor scales;  /* S float16, float32 [bases, N, G] or [bases, T, G, 16] */
  qbb_tensor offset;  /* Z float32          [N, G] or [T, G, 16]; or [1, 1] */
  qbb_tensor bias;    /* C float32          [N]; or [1] */
} qbb_matrix;

typedef struct qbb_kernel qbb_kernel;

/* Calls task(arg, i) once for every i in 0..count-1, in any order and on any threads, and returns when all are done. */
typedef void (*qbb_parallel_for)(void* pool, int64_t count, void (*task)(void* arg, int64_t i), void* arg);

/* Checks attributes, types, shapes and sizes; reads no weights. */
QBB_EXPORT qbb_status qbb_matrix_validate(const qbb_matrix* matrix, char* error, size_t error_size);

/* Validates and makes a kernel.
 *
 * Weights in layout 1 are used in place and must outlive the kernel; layout 0 is repacked into memory of the kernel.
 * mode: QBB_MODE_EXACT, or QBB_MODE_INT8 or QBB_MODE_INT16 to round activations (docs/format.md, "Modes").
 * isa: a name of qbb_isa_name, or NULL for the environment variable QBB_ISA, or the best for this CPU where that is
 * unset or empty. An unknown or unavailable one is an error, never replaced by another. */
QBB_EXPORT qbb_status qbb_kernel_create(const qbb_matrix* matrix, int32_t mode, const char* isa, qbb_kernel** kernel,
                                        char* error, size_t error_size);

/* y [M, N] = op(x [M, K]); both have type x_dtype (float32 or float16), are dense and lie at any address. M may be 0.
 *
 * A task uses up to 150 KB of its thread's stack. Exact mode allocates nothing; integer modes take 4 (int8) or 8 (int16)
 * bytes for each element of up to 32 rows of X at a time, or 1 for each of up to 512 rows, and give them back.
 * The bytes of y depend neither on the threads nor on the ISA. Those of one row depend on the number of other rows only
 * through the choice between few and many (docs/format.md). Several threads may run one kernel at a time.
 * parallel_for: NULL runs everything on the calling thread. */
QBB_EXPORT qbb_status qbb_kernel_run(const qbb_kernel* kernel, int32_t x_dtype, int64_t M, const void* x, void* y,
                                     qbb_parallel_for parallel_for, void* pool, char* error, size_t error_size);

QBB_EXPORT void qbb_kernel_destroy(qbb_kernel* kernel); /* NULL is fine */

QBB_EXPORT const char* qbb_kernel_isa(const qbb_kernel* kernel);

/* Instruction sets that were compiled in, best first. */
QBB_EXPORT int32_t qbb_isa_count(void);
QBB_EXPORT const char* qbb_isa_name(int32_t index);     /* NULL past the end */
QBB_EXPORT int32_t qbb_isa_available(int32_t index);    /* 1 where this CPU has it */

/* The same on NVIDIA GPUs, for matrices, x and y in device memory. */
typedef struct qbb_cuda_kernel qbb_cuda_kernel;

/* 1 if this library has kernels for CUDA. Without them, qbb_cuda_kernel_create says QBB_UNSUPPORTED. */
QBB_EXPORT int32_t qbb_cuda_compiled(void);

/* Validates and makes a kernel on the device that holds the planes.
 *
 * Layout 1 is used in place and must outlive the kernel; layout 0 is repacked into memory of the kernel. Waits for the
 * device. Modes exact and int16 round activations to 16 bits of each 128 inputs, or multiply in float16 (docs/format.md).
 * arch: use kernels as on a GPU of this compute capability ("75", "80", ...), or NULL for the environment variable
 * QBB_CUDA_ARCH, or the device's own. */
QBB_EXPORT qbb_status qbb_cuda_kernel_create(const qbb_matrix* matrix, int32_t mode, const char* arch,
                                             qbb_cuda_kernel** kernel, char* error, size_t error_size);

/* y [M, N] = op(x [M, K]) on a cudaStream_t; both have type x_dtype (float32, float16 or bfloat16) and are dense.
 *
 * Allocates nothing and waits for nothing, so it may be captured into a graph. The bytes of y are the same on every run.
 * Errors of the kernels themselves show up at the stream's next synchronisation. */
QBB_EXPORT qbb_status qbb_cuda_kernel_run(const qbb_cuda_kernel* kernel, int32_t x_dtype, int64_t M, const void* x,
                                          void* y, void* stream, char* error, size_t error_size);

QBB_EXPORT void qbb_cuda_kernel_destroy(qbb_cuda_kernel* kernel); /* NULL is fine */

/* The constants of format.h that this library was compiled with. */
typedef struct qbb_format_info {
  int32_t format_version;
  int32_t opset_version;
  int32_t max_bases;
  int32_t num_layouts;
  int32_t word_bits;
  int32_t tile_rows;
} qbb_format_info;

QBB_EXPORT void qbb_get_format(qbb_format_info* info);

#ifdef __cplusplus
}
#endif

#endif /* QBB_OPS_H_ */
