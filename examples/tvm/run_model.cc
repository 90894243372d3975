// Runs a folder that `qbb compile` wrote, once:   run_model FOLDER [SIZE [X Y]]
// Needs tvm_ffi's headers, and of TVM the libraries libtvm_runtime and libtvm_ffi only.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
namespace ffi = tvm::ffi;

struct Aligned {  // TVM's code counts on 64 bytes
  void AllocData(DLTensor* t) { t->data = std::aligned_alloc(64, (ffi::GetDataSize(*t) + 64) / 64 * 64); }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

static std::streamsize bytes(const ffi::Tensor& tensor) { return static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr())); }

// What the manifest says of an input, open dimensions being `size`; from the file, or whole numbers count 1, 2, 3..., others are 0.5.
static ffi::Tensor make_input(const ffi::json::Object& value, int64_t size, std::ifstream& file) {
  std::vector<int64_t> shape;
  for (const ffi::Any& dim : value["shape"].cast<ffi::json::Array>()) shape.push_back(dim.try_cast<int64_t>().value_or(size));
  const DLDataType type = ffi::StringToDLDataType(value["dtype"].cast<ffi::String>());
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Aligned(), ffi::Shape(shape.begin(), shape.end()), type, {kDLCPU, 0});
  if (file.is_open()) {
    if (!file.read(static_cast<char*>(tensor.data_ptr()), bytes(tensor)))
      TVM_FFI_THROW(ValueError) << "the file of inputs ends in " << value["name"].cast<ffi::String>();
    return tensor;
  }
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (type.code == kDLInt && type.bits == 64) static_cast<int64_t*>(tensor.data_ptr())[i] = i + 1;
    else if (type.code == kDLFloat && type.bits == 32) static_cast<float*>(tensor.data_ptr())[i] = 0.5f;
    else TVM_FFI_THROW(TypeError) << value["name"].cast<ffi::String>() << " is neither float32 nor int64";
  }
  return tensor;
}

static void print(const ffi::json::Object& value, const ffi::Tensor& tensor) {
  std::printf("%s [", value["name"].cast<ffi::String>().c_str());
  for (int d = 0; d < tensor.ndim(); ++d) std::printf(d ? ", %lld" : "%lld", static_cast<long long>(tensor.size(d)));
  std::printf("]:");
  for (int64_t i = 0; i < tensor.numel() && i < 4; ++i) std::printf(" %.9g", static_cast<const float*>(tensor.data_ptr())[i]);
  std::printf("\n");
}

int main(int argc, char** argv) try {
  if (argc < 2) TVM_FFI_THROW(ValueError) << "usage: run_model FOLDER [SIZE [X Y]]";
  const std::string folder = argv[1];
  std::stringstream text;
  text << std::ifstream(folder + "/manifest.json").rdbuf();
  const auto manifest = ffi::json::Parse(text.str()).cast<ffi::json::Object>();

  ffi::Module machine = ffi::Module::LoadFromFile(folder + "/model.so")->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);  // device, its number, pooled memory
  std::ifstream given;
  if (argc > 4) given = std::ifstream(argv[3], std::ios::binary);
  std::vector<ffi::Any> inputs;
  for (const ffi::Any& value : manifest["inputs"].cast<ffi::json::Array>())
    inputs.push_back(make_input(value.cast<ffi::json::Object>(), argc > 2 ? std::atoll(argv[2]) : 2, given));
  ffi::Any found;
  machine->GetFunction("main").value().CallPacked(reinterpret_cast<ffi::AnyView*>(inputs.data()), static_cast<int>(inputs.size()), &found);

  const auto outputs = manifest["outputs"].cast<ffi::json::Array>();
  const auto several = found.as<ffi::Array<ffi::Tensor>>();  // one output may come by itself
  std::ofstream kept;
  if (argc > 4) kept = std::ofstream(argv[4], std::ios::binary);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const ffi::Tensor tensor = several ? (*several)[i] : found.cast<ffi::Tensor>();
    print(outputs[i].cast<ffi::json::Object>(), tensor);
    kept.write(static_cast<const char*>(tensor.data_ptr()), bytes(tensor));
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
