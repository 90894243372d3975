// One linear layer, y = W x, with no runtime: make_kernel.py writes kernel.o, layer.h and layer.S for it.
// Reads rows of K float32 from standard input, writes rows of N.
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

#include "layer.h"

int __tvm_ffi_binary_basis_matmul(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

// The one function that a kernel takes from outside: its checks of the arguments call it.
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) if (parts[i]) fputs(parts[i], stderr);
  fputs("\n", stderr);
}

#define SHAPE(...) (int64_t[]){__VA_ARGS__}, sizeof((int64_t[]){__VA_ARGS__}) / 8
static TVMFFIAny tensor(DLTensor* t, const void* data, DLDataTypeCode code, int bits, int64_t* shape, size_t rank) {
  *t = (DLTensor){.data = (void*)data, .device = {kDLCPU, 0}, .ndim = (int32_t)rank, .dtype = {(uint8_t)code, (uint8_t)bits, 1},
                  .shape = shape, .strides = NULL, .byte_offset = 0};
  return (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = t};
}

static _Alignas(64) float x[K], y[N];

int main(void) {
  DLTensor t[6];
  TVMFFIAny result = {0}, arguments[6] = {
      tensor(&t[0], x, kDLFloat, 32, SHAPE(1, K)),
      tensor(&t[1], layer_planes, kDLUInt, 32, SHAPE(BASES, TILES, WORDS, 16)),
      tensor(&t[2], layer_scales, kDLFloat, SCALE_BITS, SHAPE(BASES, TILES, GROUPS, 16)),
      tensor(&t[3], layer_offset, kDLFloat, 32, SHAPE(TILES, GROUPS, 16)),
      tensor(&t[4], layer_bias, kDLFloat, 32, SHAPE(TILES, 16)),
      tensor(&t[5], y, kDLFloat, 32, SHAPE(1, N))};
  while (fread(x, sizeof(float), K, stdin) == K) {
    if (__tvm_ffi_binary_basis_matmul(NULL, arguments, 6, &result)) return EXIT_FAILURE;
    fwrite(y, sizeof(float), N, stdout);
  }
  return EXIT_SUCCESS;
}
