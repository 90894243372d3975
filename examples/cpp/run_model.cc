// Runs an exported model once:   run_model LIBONNXRUNTIME LIBQBB MODEL
// The wheel of ONNX Runtime has no C headers, so functions are named by their index, as custom_ops/ort/abi.h explains.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>
#include "ort/abi.h"
using namespace qbb::ort;
struct Env; struct Session; struct MemoryInfo; struct Allocator; struct TypeInfo;  // opaque, too
using Names = const char* const*;
constexpr Call<3, int, const char*, Env**> CreateEnv;
constexpr Call<7, const Env*, const char*, const SessionOptions*, Session**> CreateSession;
constexpr Call<9, Session*, const void*, Names, const Value* const*, size_t, Names, size_t, Value**> Run;
constexpr Call<10, SessionOptions**> CreateSessionOptions;
constexpr Call<30, const Session*, size_t*> SessionGetInputCount;
constexpr Call<33, const Session*, size_t, TypeInfo**> SessionGetInputTypeInfo;
constexpr Call<36, const Session*, size_t, Allocator*, char**> SessionGetInputName;
constexpr Call<37, const Session*, size_t, Allocator*, char**> SessionGetOutputName;
constexpr Call<49, const MemoryInfo*, void*, size_t, const int64_t*, size_t, ElementType, Value**> CreateTensorWithData;
constexpr Call<55, const TypeInfo*, const TensorInfo**> CastTypeInfoToTensorInfo;
constexpr Call<69, int, int, MemoryInfo**> CreateCpuMemoryInfo;
constexpr Call<78, Allocator**> GetAllocatorWithDefaultOptions;

static const Api* api;
static void fail(const char* text) { std::fprintf(stderr, "error: %s\n", text), std::exit(1); }
static void check(Status* status) { if (status != nullptr) fail(GetErrorMessage(api, status)); }

static size_t describe(const TensorInfo* info, ElementType* type, std::vector<int64_t>* dims) {
  size_t rank, count = 1;
  check(GetTensorElementType(api, info, type)), check(GetDimensionsCount(api, info, &rank)), dims->resize(rank);
  check(GetDimensions(api, info, dims->data(), rank));
  for (int64_t& d : *dims) count *= static_cast<size_t>(d < 0 ? d = 2 : d);  // an open dimension becomes 2
  return count;
}

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: run_model LIBONNXRUNTIME LIBQBB MODEL");
  void* runtime = dlopen(argv[1], RTLD_NOW);
  void* library = runtime == nullptr ? nullptr : dlopen(argv[2], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  const auto* base = reinterpret_cast<const ApiBase* (*)()>(dlsym(runtime, "OrtGetApiBase"))();
  const auto register_ops = reinterpret_cast<Status* (*)(SessionOptions*, const ApiBase*)>(dlsym(library, "RegisterCustomOps"));
  if ((api = base->get_api(kApiVersion)) == nullptr) fail("this ONNX Runtime is older than 1.17");

  Env* env; SessionOptions* options; Session* session; MemoryInfo* cpu; Allocator* allocator;
  check(CreateEnv(api, 3, "run_model", &env)), check(CreateSessionOptions(api, &options));
  check(register_ops(options, base));  // the one line that an application adds
  check(CreateSession(api, env, argv[3], options, &session));
  check(CreateCpuMemoryInfo(api, 0, 0, &cpu)), check(GetAllocatorWithDefaultOptions(api, &allocator));

  size_t inputs; check(SessionGetInputCount(api, session, &inputs));
  std::vector<char*> names(inputs); std::vector<Value*> values(inputs);
  std::vector<std::vector<char>> memory(inputs);
  ElementType type; std::vector<int64_t> dims;
  for (size_t i = 0; i < inputs; ++i) {  // ids count 1, 2, 3...; floats are 0.5
    TypeInfo* any; const TensorInfo* info;
    check(SessionGetInputName(api, session, i, allocator, &names[i])), check(SessionGetInputTypeInfo(api, session, i, &any));
    check(CastTypeInfoToTensorInfo(api, any, &info));
    const size_t count = describe(info, &type, &dims), size = type == kInt64 ? 8 : 4;
    if (type != kFloat && type != kInt64) fail("an input is neither float32 nor int64");
    memory[i].resize(count * size);
    for (size_t k = 0; k < count; ++k) {
      if (type == kInt64) reinterpret_cast<int64_t*>(memory[i].data())[k] = static_cast<int64_t>(k + 1);
      if (type == kFloat) reinterpret_cast<float*>(memory[i].data())[k] = 0.5f;
    }
    check(CreateTensorWithData(api, cpu, memory[i].data(), count * size, dims.data(), dims.size(), type, &values[i]));
  }
  char* name; Value* y = nullptr; TensorInfo* info; void* data;
  check(SessionGetOutputName(api, session, 0, allocator, &name));
  check(Run(api, session, nullptr, names.data(), values.data(), inputs, &name, 1, &y));

  check(GetTensorTypeAndShape(api, y, &info)), check(GetTensorMutableData(api, y, &data));
  const size_t count = describe(info, &type, &dims);
  std::printf("%s [", name);
  for (size_t d = 0; d < dims.size(); ++d) std::printf(d ? ", %lld" : "%lld", static_cast<long long>(dims[d]));
  std::printf("]:");
  for (size_t k = 0; k < count && k < 4 && type == kFloat; ++k) std::printf(" %g", static_cast<float*>(data)[k]);
  std::printf("\n");
}
