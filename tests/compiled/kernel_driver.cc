// Runs functions of a library that TVM compiled, without TVM: under qemu, or on a machine that has no Python.
//
//     kernel_driver LIBRARY.so IN OUT
//
// IN, all numbers int64: tensors (DLPack code, bits, dimensions, sizes, 1 and its bytes or 0), calls (length of the
// name, name, count, tensors by number), results (tensors by number). OUT: bytes of the results.
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// What a library wants of TVM. One thread does all.
EXPORT void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) { fprintf(stderr, "%s: %s\n", kind, message); }
EXPORT void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] == nullptr ? "" : parts[i], stderr);
  fputs("\n", stderr);
}

namespace {

struct TVMParallelGroupEnv {
  void* sync_handle;
  int32_t num_task;
};
int TVMBackendParallelLaunch(int (*task)(int, TVMParallelGroupEnv*, void*), void* data, int) {
  TVMParallelGroupEnv env{nullptr, 3};  // as many parts as three threads would take
  for (int i = 0; i < env.num_task; ++i) {
    if (task(i, &env, data) != 0) return -1;
  }
  return 0;
}
void* TVMBackendAllocWorkspace(int, int, uint64_t size, int, int) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, size) == 0 ? memory : nullptr;
}
int TVMBackendFreeWorkspace(int, int, void* memory) {
  free(memory);
  return 0;
}

FILE* in;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "kernel_driver: %s\n", what);
  exit(2);
}

// Where a library keeps the address of a function of the runtime; its loader fills it in.
void set_pointer(void* library, const char* name, void* function) {
  if (void* place = dlsym(library, name)) memcpy(place, &function, sizeof function);
}

void read_bytes(void* to, size_t size) {
  if (fread(to, 1, size, in) != size) fail("the input ends early");
}

int64_t number() {
  int64_t value;
  read_bytes(&value, sizeof value);
  return value;
}

struct Tensor {
  DLTensor view{};
  std::vector<int64_t> sizes;
  size_t bytes = 0;
};

void read_tensor(Tensor& t) {
  t.view.dtype.code = static_cast<uint8_t>(number());
  t.view.dtype.bits = static_cast<uint8_t>(number());
  t.view.dtype.lanes = 1;
  t.view.device = DLDevice{kDLCPU, 0};
  t.sizes.resize(static_cast<size_t>(number()));
  t.bytes = t.view.dtype.bits / 8;
  for (int64_t& size : t.sizes) t.bytes *= static_cast<size_t>(size = number());
  t.view.ndim = static_cast<int32_t>(t.sizes.size());
  t.view.shape = t.sizes.data();
  if (posix_memalign(&t.view.data, 64, t.bytes + 64) != 0) fail("no memory");
  memset(t.view.data, 0xff, t.bytes);  // NaN: what is not written is seen
  if (number() != 0) read_bytes(t.view.data, t.bytes);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("LIBRARY IN OUT");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  set_pointer(library, "__TVMBackendParallelLaunch", reinterpret_cast<void*>(TVMBackendParallelLaunch));
  set_pointer(library, "__TVMBackendAllocWorkspace", reinterpret_cast<void*>(TVMBackendAllocWorkspace));
  set_pointer(library, "__TVMBackendFreeWorkspace", reinterpret_cast<void*>(TVMBackendFreeWorkspace));
  in = fopen(argv[2], "rb");
  FILE* out = fopen(argv[3], "wb");
  if (in == nullptr || out == nullptr) fail("cannot open IN or OUT");
  std::vector<Tensor> tensors(static_cast<size_t>(number()));
  for (Tensor& tensor : tensors) read_tensor(tensor);
  for (int64_t calls = number(); calls > 0; --calls) {
    std::string name(static_cast<size_t>(number()), ' ');
    read_bytes(&name[0], name.size());
    std::vector<TVMFFIAny> arguments(static_cast<size_t>(number()));
    for (TVMFFIAny& argument : arguments) {
      memset(&argument, 0, sizeof argument);
      argument.type_index = kTVMFFIDLTensorPtr;
      argument.v_ptr = &tensors.at(static_cast<size_t>(number())).view;
    }
    using Function = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
    const auto function = reinterpret_cast<Function>(dlsym(library, ("__tvm_ffi_" + name).c_str()));
    if (function == nullptr) fail(dlerror());
    TVMFFIAny result{};
    if (function(nullptr, arguments.data(), static_cast<int32_t>(arguments.size()), &result) != 0) fail(name.c_str());
  }
  for (int64_t results = number(); results > 0; --results) {
    const Tensor& tensor = tensors.at(static_cast<size_t>(number()));
    if (fwrite(tensor.view.data, 1, tensor.bytes, out) != tensor.bytes) fail("cannot write");
  }
  return fclose(out);
}
