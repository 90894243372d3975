// ONNX Runtime on one side, include/qbb/ops.h on the other. No arithmetic here.
//
// ONNX Runtime matches a node to a custom op by the types of its inputs, and older versions cannot leave a type open.
// So several ops of one name are registered: X float32 or float16 (on CUDA, bfloat16, too), times S float32 or float16,
// times execution provider. A session that overrides the mode of its nodes gets ops of its own.
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "ort/abi.h"
#include "ort/node.h"
#include "ort/support.h"
#include "qbb/ops.h"

namespace qbb::ort {
namespace {

const char* const kModeEntry = "qbb.mode";
const char* const kModes[QBB_NUM_MODES] = {"exact", "int8", "int16"};

struct Op : CustomOp {
  const Api* api;
  bool cuda;  // for the CUDA execution provider, which hands out device memory
  ElementType x, s;
  int64_t mode;  // of all nodes of the session, or kModeOfNode
};

struct Kernel {
  const Api* api;
  std::string where;  // the node, for messages
  ElementType x;
  int64_t K, N;
  qbb_kernel* kernel = nullptr;     // one of the two
  qbb_cuda_kernel* cuda = nullptr;

  ~Kernel() {
    qbb_kernel_destroy(kernel);
    qbb_cuda_kernel_destroy(cuda);
  }
};

Status* QBB_ORT_CALL create(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) {
  std::string where = "qbb";
  try {
    where = node_name(api, info);
  } catch (const std::bad_alloc&) {
  }
  return guard(api, where, [&] {
    std::vector<int64_t> dims[kInputs];
    const qbb_matrix matrix = matrix_of(api, info, dims);
    const Op& ours = *static_cast<const Op*>(op);
    std::unique_ptr<Kernel> kernel(new Kernel{api, where, ours.x, matrix.K, matrix.N});
    const int32_t mode = mode_of(api, info, ours.mode);
    char error[512];
    const qbb_status status =
        ours.cuda ? qbb_cuda_kernel_create(&matrix, mode, nullptr, &kernel->cuda, error, sizeof error)
                  : qbb_kernel_create(&matrix, mode, nullptr, &kernel->kernel, error, sizeof error);
    check(status, error);
    *out = kernel.release();
  });
}

// Carries qbb_parallel_for over to the runtime's own thread pool.
struct Pool {
  const Api* api;
  const KernelContext* context;
  Status* status = nullptr;
};

struct Task {
  void (*run)(void* arg, int64_t i);
  void* arg;
};

void parallel_for(void* pool_, int64_t count, void (*run)(void* arg, int64_t i), void* arg) {
  Pool& pool = *static_cast<Pool*>(pool_);
  Task task{run, arg};
  const auto step = [](void* t, size_t i) {
    static_cast<Task*>(t)->run(static_cast<Task*>(t)->arg, static_cast<int64_t>(i));
  };
  // As many batches as tasks: threads then take the next task when they are done, not a fixed share.
  pool.status = KernelContext_ParallelFor(pool.api, pool.context, step, static_cast<size_t>(count),
                                          static_cast<size_t>(count), &task);
}

Status* QBB_ORT_CALL compute(void* kernel_, KernelContext* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel_);
  const Api* api = k.api;
  return guard(api, k.where, [&] {
    const Value* x = nullptr;
    check(api, KernelContext_GetInput(api, context, kX, &x));
    if (x == nullptr) throw Failure(kInvalidArgument, "missing input X; expected a tensor; got none");
    Shape shape(api, x);
    if (shape.type != k.x) {
      throw Failure(kInvalidArgument, "wrong type of X; expected ONNX type " + std::to_string(k.x) + "; got " +
                                          std::to_string(shape.type));
    }
    if (shape.dims.empty() || shape.dims.back() != k.K) {
      throw Failure(kInvalidArgument,
                    "wrong shape of X; expected [..., " + std::to_string(k.K) + "]; got " + shape.text());
    }
    int64_t M = 1;
    for (size_t i = 0; i + 1 < shape.dims.size(); ++i) M *= shape.dims[i];  // the tensor exists, so it fits
    shape.dims.back() = k.N;
    Value* y = nullptr;
    check(api, KernelContext_GetOutput(api, context, 0, shape.dims.data(), shape.dims.size(), &y));
    if (M == 0) return;
    void* from = nullptr;
    void* to = nullptr;
    check(api, GetTensorMutableData(api, const_cast<Value*>(x), &from));
    check(api, GetTensorMutableData(api, y, &to));
    char error[512];
    if (k.cuda != nullptr) {
      void* stream = nullptr;
      check(api, KernelContext_GetGPUComputeStream(api, context, &stream));
      check(qbb_cuda_kernel_run(k.cuda, k.x, M, from, to, stream, error, sizeof error), error);
      return;
    }
    Pool pool{api, context};
    const qbb_status status = qbb_kernel_run(k.kernel, k.x, M, from, to, parallel_for, &pool, error, sizeof error);
    check(api, pool.status);
    check(status, error);
  });
}

// [..., K] to [..., N]. The runtime ignores what goes wrong here, so compute() checks everything again.
Status* QBB_ORT_CALL infer_shape(const CustomOp* op, ShapeContext* context) {
  const Api* api = static_cast<const Op*>(op)->api;
  return guard(api, "qbb", [&] {
    TensorInfo* input = nullptr;
    check(api, ShapeInferContext_GetInputTypeShape(api, context, kX, &input));  // the context's, not ours
    Shape shape(api, input);
    const size_t rank = shape.dims.size();
    if (rank == 0) return;  // unknown
    std::vector<const char*> names(rank, "");
    check(api, GetSymbolicDimensions(api, input, names.data(), rank));
    const OpAttr* attr = nullptr;
    check(api, ShapeInferContext_GetAttribute(api, context, "N", &attr));
    int64_t N = 0;
    size_t read = 0;
    check(api, ReadOpAttr(api, attr, kAttrInt, &N, sizeof N, &read));
    shape.dims.back() = N;
    names.back() = "";
    TensorInfo* output = nullptr;
    check(api, CreateTensorTypeAndShapeInfo(api, &output));
    const auto release = [api](TensorInfo* p) { ReleaseTensorTypeAndShapeInfo(api, p); };
    const std::unique_ptr<TensorInfo, decltype(release)> owner(output, release);
    // Not the op's own type: the runtime asks one of the ops on behalf of all.
    check(api, SetTensorElementType(api, output, shape.type));
    check(api, SetDimensions(api, output, shape.dims.data(), rank));
    check(api, SetSymbolicDimensions(api, output, names.data(), rank));
    check(api, ShapeInferContext_SetOutputTypeShape(api, context, 0, output));
  });
}

Op make_op(const Api* api, bool cuda, ElementType x, ElementType s, int64_t mode) {
  Op op{};
  op.version = kApiVersion;
  op.GetName = [](const CustomOp*) -> const char* { return QBB_OP_TYPE; };
  op.GetExecutionProviderType = [](const CustomOp* o) -> const char* {
    return static_cast<const Op*>(o)->cuda ? "CUDAExecutionProvider" : nullptr;  // NULL: CPU
  };
  op.GetInputType = [](const CustomOp* o, size_t i) -> ElementType {
    switch (i) {
      case kX: return static_cast<const Op*>(o)->x;
      case kB: return kUint32;
      case kS: return static_cast<const Op*>(o)->s;
      default: return kFloat;
    }
  };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputs; };
  op.GetOutputType = [](const CustomOp* o, size_t) -> ElementType { return static_cast<const Op*>(o)->x; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> Characteristic { return kRequired; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) -> Characteristic { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) -> MemType { return kDefault; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = [](const CustomOp*) -> int { return QBB_OPSET_VERSION; };
  op.GetEndVersion = [](const CustomOp*) -> int { return QBB_OPSET_VERSION; };
  op.api = api;
  op.cuda = cuda;
  op.x = x;
  op.s = s;
  op.mode = mode;
  return op;
}

// One set of ops for each runtime in the process and each mode. Sessions keep pointers to them and nothing tells when the last one
// is gone, so they are never freed; registering again adds nothing.
struct Registration {
  const Api* api;
  int64_t mode;
  CustomOpDomain* domain = nullptr;
  std::vector<Op> ops{};
};

CustomOpDomain* domain_for(const Api* api, int64_t mode) {
  static std::mutex mutex;
  static auto* all = new std::vector<Registration*>();
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registration* r : *all) {
    if (r->api == api && r->mode == mode) return r->domain;
  }
  std::unique_ptr<Registration> r(new Registration{api, mode});
  for (const ElementType s : {kFloat16, kFloat}) {
    for (const ElementType x : {kFloat, kFloat16}) r->ops.push_back(make_op(api, false, x, s, mode));
    if (qbb_cuda_compiled() == 0) continue;
    for (const ElementType x : {kFloat, kFloat16, kBFloat16}) r->ops.push_back(make_op(api, true, x, s, mode));
  }
  all->reserve(all->size() + 1);
  check(api, CreateCustomOpDomain(api, QBB_DOMAIN, &r->domain));
  for (const Op& op : r->ops) check(api, CustomOpDomain_Add(api, r->domain, &op));
  all->push_back(r.get());
  return r.release()->domain;
}

// What a session says about the mode of its nodes.
int64_t session_mode(const Api* api, const SessionOptions* options) {
  int found = 0;
  check(api, HasSessionConfigEntry(api, options, kModeEntry, &found));
  if (found == 0) return kModeOfNode;
  char text[64] = "";
  size_t size = sizeof text;
  check(api, GetSessionConfigEntry(api, options, kModeEntry, text, &size));
  for (int64_t mode = 0; mode < QBB_NUM_MODES; ++mode) {
    if (std::strcmp(text, kModes[mode]) == 0) return mode;
  }
  throw Failure(kInvalidArgument,
                std::string("unknown session config entry ") + kModeEntry + "; expected exact, int8 or int16; got " + text);
}

}  // namespace
}  // namespace qbb::ort

// The name that SessionOptions.register_custom_ops_library looks for.
extern "C" QBB_EXPORT qbb::ort::Status* QBB_ORT_CALL RegisterCustomOps(qbb::ort::SessionOptions* options,
                                                                       const qbb::ort::ApiBase* base) {
  using namespace qbb::ort;
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) {
    // Any runtime has version 1, which is enough to say so.
    const std::string text =
        std::string("qbb: ONNX Runtime too old; expected 1.17 or newer; got ") + base->get_version();
    return CreateStatus(base->get_api(1), kNotImplemented, text.c_str());
  }
  return guard(api, "qbb", [&] { check(api, AddCustomOpDomain(api, options, domain_for(api, session_mode(api, options)))); });
}
