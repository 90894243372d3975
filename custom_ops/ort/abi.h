// The part of ONNX Runtime's C interface that we use, without its headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so an index names a function for good.
// We ask for version 17, the oldest that has all we need; any later runtime hands out the same table.
// ort/check_headers.cc compares every index and type below with the official headers (CMake: QBB_ORT_HEADERS=DIR).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define QBB_ORT_CALL __stdcall
#else
#define QBB_ORT_CALL
#endif

namespace qbb::ort {

constexpr uint32_t kApiVersion = 17;

// Opaque objects of the runtime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct OpAttr;
struct Value;
struct TensorInfo;

// Enumerations, by value.
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kInt64 = 7, kFloat16 = 10, kUint32 = 12, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0 };
enum MemType : int { kDefault = 0 };
enum AttrType : int { kAttrInt = 1 };

struct Api {
  void* table[1];  // more follow
};

struct ApiBase {
  const Api*(QBB_ORT_CALL* get_api)(uint32_t version);  // NULL where the runtime is older
  const char*(QBB_ORT_CALL* get_version)();
};

// Entry `Index` of the table, a function R(Args...).
template <size_t Index, class R, class... Args>
struct Fn {
  using Pointer = R(QBB_ORT_CALL*)(Args...);
  static constexpr size_t index = Index;

  R operator()(const Api* api, Args... args) const {
    return reinterpret_cast<Pointer>(const_cast<void*>(static_cast<const void*>(api->table[Index])))(args...);
  }
};
template <size_t Index, class... Args>
using Call = Fn<Index, Status*, Args...>;  // a status, NULL for success

inline constexpr Fn<0, Status*, ErrorCode, const char*> CreateStatus;
inline constexpr Fn<2, const char*, const Status*> GetErrorMessage;
inline constexpr Call<26, const char*, CustomOpDomain**> CreateCustomOpDomain;
inline constexpr Call<27, CustomOpDomain*, const struct CustomOp*> CustomOpDomain_Add;
inline constexpr Call<28, SessionOptions*, CustomOpDomain*> AddCustomOpDomain;
inline constexpr Call<51, Value*, void**> GetTensorMutableData;
inline constexpr Call<57, TensorInfo**> CreateTensorTypeAndShapeInfo;
inline constexpr Call<58, TensorInfo*, ElementType> SetTensorElementType;
inline constexpr Call<59, TensorInfo*, const int64_t*, size_t> SetDimensions;
inline constexpr Call<60, const TensorInfo*, ElementType*> GetTensorElementType;
inline constexpr Call<61, const TensorInfo*, size_t*> GetDimensionsCount;
inline constexpr Call<62, const TensorInfo*, int64_t*, size_t> GetDimensions;
inline constexpr Call<63, const TensorInfo*, const char**, size_t> GetSymbolicDimensions;
inline constexpr Call<65, const Value*, TensorInfo**> GetTensorTypeAndShape;
inline constexpr Call<86, const KernelInfo*, const char*, int64_t*> KernelInfoGetAttribute_int64;
inline constexpr Call<90, const KernelContext*, size_t, const Value**> KernelContext_GetInput;
inline constexpr Call<91, KernelContext*, size_t, const int64_t*, size_t, Value**> KernelContext_GetOutput;
inline constexpr Fn<93, void, Status*> ReleaseStatus;
inline constexpr Fn<99, void, TensorInfo*> ReleaseTensorTypeAndShapeInfo;
inline constexpr Call<193, const KernelContext*, void**> KernelContext_GetGPUComputeStream;
inline constexpr Call<230, const KernelInfo*, size_t*> KernelInfo_GetInputCount;
inline constexpr Call<237, const SessionOptions*, const char*, int*> HasSessionConfigEntry;
inline constexpr Call<238, const SessionOptions*, const char*, char*, size_t*> GetSessionConfigEntry;
inline constexpr Call<244, const KernelInfo*, char*, size_t*> KernelInfo_GetNodeName;
inline constexpr Call<249, const KernelInfo*, size_t, int*, const Value**> KernelInfoGetConstantInput_tensor;
// The object that this hands out belongs to the context: releasing it crashes.
inline constexpr Call<268, const ShapeContext*, size_t, TensorInfo**> ShapeInferContext_GetInputTypeShape;
inline constexpr Call<269, const ShapeContext*, const char*, const OpAttr**> ShapeInferContext_GetAttribute;
inline constexpr Call<270, const ShapeContext*, size_t, const TensorInfo*> ShapeInferContext_SetOutputTypeShape;
inline constexpr Call<271, TensorInfo*, const char**, size_t> SetSymbolicDimensions;
inline constexpr Call<272, const OpAttr*, AttrType, void*, size_t, size_t*> ReadOpAttr;
using ParallelTask = void (*)(void* arg, size_t i);
inline constexpr Call<274, const KernelContext*, ParallelTask, size_t, size_t, void*> KernelContext_ParallelFor;

// OrtCustomOp as of version 17. Members that we leave NULL are optional or replaced by their V2.
struct CustomOp {
  uint32_t version;
  void*(QBB_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(QBB_ORT_CALL* GetName)(const CustomOp*);
  const char*(QBB_ORT_CALL* GetExecutionProviderType)(const CustomOp*);
  ElementType(QBB_ORT_CALL* GetInputType)(const CustomOp*, size_t);
  size_t(QBB_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  ElementType(QBB_ORT_CALL* GetOutputType)(const CustomOp*, size_t);
  size_t(QBB_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(QBB_ORT_CALL* KernelCompute)(void* kernel, KernelContext*);
  void(QBB_ORT_CALL* KernelDestroy)(void* kernel);
  Characteristic(QBB_ORT_CALL* GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic(QBB_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, size_t);
  MemType(QBB_ORT_CALL* GetInputMemoryType)(const CustomOp*, size_t);
  int(QBB_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(QBB_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(QBB_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(QBB_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(QBB_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status*(QBB_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*);
  Status*(QBB_ORT_CALL* InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int(QBB_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(QBB_ORT_CALL* GetEndVersion)(const CustomOp*);
};

}  // namespace qbb::ort
