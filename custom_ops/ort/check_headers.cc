// Compiled only with -DQBB_ORT_HEADERS=DIR: compares ort/abi.h with the official onnxruntime_c_api.h.
#include <onnxruntime_c_api.h>

#include <cstddef>
#include <type_traits>

#include "ort/abi.h"

namespace qbb::ort {
namespace {

// Types of the official header that stand for ours: enumerations as int, objects as opaque pointers.
template <class T>
struct Plain {
  using type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <class T>
struct Plain<T*> {
  using inner = std::remove_cv_t<T>;
  using object = std::conditional_t<std::is_class_v<inner>, void, typename Plain<inner>::type>;
  using type = std::conditional_t<std::is_const_v<T>, const object*, object*>;
};
template <class R, class... Args>
struct Plain<R(QBB_ORT_CALL*)(Args...)> {
  using type = typename Plain<R>::type (*)(typename Plain<Args>::type...);
};
#if defined(__cpp_noexcept_function_type)
template <class R, class... Args>
struct Plain<R(QBB_ORT_CALL*)(Args...) noexcept> : Plain<R(QBB_ORT_CALL*)(Args...)> {};
#endif

template <class Ours, class Theirs>
constexpr bool same = std::is_same_v<typename Plain<Ours>::type, typename Plain<Theirs>::type>;

#define QBB_CHECK(name)                                                                                \
  static_assert(decltype(name)::index * sizeof(void*) == offsetof(OrtApi, name), #name ": wrong index"); \
  static_assert(same<decltype(name)::Pointer, decltype(OrtApi::name)>, #name ": wrong signature")

QBB_CHECK(CreateStatus);
QBB_CHECK(GetErrorMessage);
QBB_CHECK(CreateCustomOpDomain);
QBB_CHECK(CustomOpDomain_Add);
QBB_CHECK(AddCustomOpDomain);
QBB_CHECK(GetTensorMutableData);
QBB_CHECK(CreateTensorTypeAndShapeInfo);
QBB_CHECK(SetTensorElementType);
QBB_CHECK(SetDimensions);
QBB_CHECK(GetTensorElementType);
QBB_CHECK(GetDimensionsCount);
QBB_CHECK(GetDimensions);
QBB_CHECK(GetSymbolicDimensions);
QBB_CHECK(GetTensorTypeAndShape);
QBB_CHECK(KernelInfoGetAttribute_int64);
QBB_CHECK(KernelContext_GetInput);
QBB_CHECK(KernelContext_GetOutput);
QBB_CHECK(ReleaseStatus);
QBB_CHECK(ReleaseTensorTypeAndShapeInfo);
QBB_CHECK(KernelContext_GetGPUComputeStream);
QBB_CHECK(KernelInfo_GetInputCount);
QBB_CHECK(HasSessionConfigEntry);
QBB_CHECK(GetSessionConfigEntry);
QBB_CHECK(KernelInfo_GetNodeName);
QBB_CHECK(KernelInfoGetConstantInput_tensor);
QBB_CHECK(ShapeInferContext_GetInputTypeShape);
QBB_CHECK(ShapeInferContext_GetAttribute);
QBB_CHECK(ShapeInferContext_SetOutputTypeShape);
QBB_CHECK(SetSymbolicDimensions);
QBB_CHECK(ReadOpAttr);
QBB_CHECK(KernelContext_ParallelFor);

#define QBB_CHECK_OP(name)                                                                                    \
  static_assert(offsetof(CustomOp, name) == offsetof(OrtCustomOp, name), "OrtCustomOp::" #name ": wrong offset"); \
  static_assert(same<decltype(CustomOp::name), decltype(OrtCustomOp::name)>, "OrtCustomOp::" #name ": wrong signature")

QBB_CHECK_OP(version);
QBB_CHECK_OP(CreateKernel);
QBB_CHECK_OP(GetName);
QBB_CHECK_OP(GetExecutionProviderType);
QBB_CHECK_OP(GetInputType);
QBB_CHECK_OP(GetInputTypeCount);
QBB_CHECK_OP(GetOutputType);
QBB_CHECK_OP(GetOutputTypeCount);
QBB_CHECK_OP(KernelCompute);
QBB_CHECK_OP(KernelDestroy);
QBB_CHECK_OP(GetInputCharacteristic);
QBB_CHECK_OP(GetOutputCharacteristic);
QBB_CHECK_OP(GetInputMemoryType);
QBB_CHECK_OP(GetVariadicInputMinArity);
QBB_CHECK_OP(GetVariadicInputHomogeneity);
QBB_CHECK_OP(GetVariadicOutputMinArity);
QBB_CHECK_OP(GetVariadicOutputHomogeneity);
QBB_CHECK_OP(CreateKernelV2);
QBB_CHECK_OP(KernelComputeV2);
QBB_CHECK_OP(InferOutputShapeFn);
QBB_CHECK_OP(GetStartVersion);
QBB_CHECK_OP(GetEndVersion);

static_assert(kFloat == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
static_assert(kInt64 == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64});
static_assert(kFloat16 == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16});
static_assert(kUint32 == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32});
static_assert(kBFloat16 == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16});
static_assert(kRequired == int{INPUT_OUTPUT_REQUIRED} && kDefault == int{OrtMemTypeDefault});
static_assert(kAttrInt == int{ORT_OP_ATTR_INT});
static_assert(kFail == int{ORT_FAIL} && kInvalidArgument == int{ORT_INVALID_ARGUMENT});
static_assert(kNotImplemented == int{ORT_NOT_IMPLEMENTED});
static_assert(ORT_API_VERSION >= kApiVersion);

}  // namespace
}  // namespace qbb::ort
