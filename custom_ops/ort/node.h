// What a node says: its name, attributes and constant inputs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ort/abi.h"
#include "ort/support.h"
#include "qbb/ops.h"

namespace qbb::ort {
namespace {

constexpr size_t kX = 0, kB = 1, kS = 2, kZ = 3, kC = 4, kInputs = 5;
const char* const kInputNames[kInputs] = {"X", "B (planes)", "S (scales)", "Z (offset)", "C (bias)"};

constexpr int64_t kModeOfNode = -1;  // a session that leaves modes to its nodes

std::string node_name(const Api* api, const KernelInfo* info) {
  std::string where = std::string("node ") + QBB_DOMAIN + "::" + QBB_OP_TYPE;
  size_t size = 0;
  Status* status = KernelInfo_GetNodeName(api, info, nullptr, &size);  // asks for the size, the final zero included
  std::string name(size, '\0');
  if (status == nullptr && size > 0) status = KernelInfo_GetNodeName(api, info, &name[0], &size);
  if (status != nullptr) {  // a nameless node is no reason to fail
    ReleaseStatus(api, status);
    return where;
  }
  name.resize(size > 0 ? size - 1 : 0);
  return where + " '" + name + "'";
}

int64_t attribute(const Api* api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  Status* status = KernelInfoGetAttribute_int64(api, info, name, &value);
  if (status != nullptr) {
    ReleaseStatus(api, status);
    throw Failure(kInvalidArgument, std::string("missing attribute ") + name + "; expected an integer; got none");
  }
  return value;
}

// The mode of a node: the session's, else its own, else exact. QBB_NUM_MODES for one that does not exist.
int32_t mode_of(const Api* api, const KernelInfo* info, int64_t session) {
  int64_t value = session;
  if (session == kModeOfNode) {
    Status* status = KernelInfoGetAttribute_int64(api, info, "mode", &value);
    if (status != nullptr) {
      ReleaseStatus(api, status);
      value = QBB_MODE_EXACT;
    }
  }
  return value < 0 || value >= QBB_NUM_MODES ? QBB_NUM_MODES : static_cast<int32_t>(value);
}

// A constant input as the core wants it. `dims` owns what the tensor points at.
qbb_tensor constant(const Api* api, const KernelInfo* info, size_t index, std::vector<int64_t>* dims) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api, KernelInfoGetConstantInput_tensor(api, info, index, &is_constant, &value));  // borrowed
  if (is_constant == 0 || value == nullptr) {
    throw Failure(kInvalidArgument, std::string("input ") + kInputNames[index] +
                                        " is not constant; expected an initializer; got a computed or a graph input");
  }
  Shape shape(api, value);
  *dims = std::move(shape.dims);
  void* data = nullptr;
  check(api, GetTensorMutableData(api, const_cast<Value*>(value), &data));  // there is no other getter; only read
  return qbb_tensor{data, dims->data(), static_cast<int32_t>(dims->size()), static_cast<int32_t>(shape.type)};
}

// The weights of a node. `dims` owns the shapes.
qbb_matrix matrix_of(const Api* api, const KernelInfo* info, std::vector<int64_t> (&dims)[kInputs]) {
  size_t count = 0;
  check(api, KernelInfo_GetInputCount(api, info, &count));
  if (count != kInputs) {
    throw Failure(kInvalidArgument, "wrong number of inputs; expected 5; got " + std::to_string(count));
  }
  const auto get = [&](const char* name) { return attribute(api, info, name); };
  const int64_t format = get("format");  // first: a newer format may have other attributes
  return qbb_matrix{get("K"),
                    get("N"),
                    get("bases"),
                    get("group_size"),
                    get("layout"),
                    format,
                    constant(api, info, kB, &dims[kB]),
                    constant(api, info, kS, &dims[kS]),
                    constant(api, info, kZ, &dims[kZ]),
                    constant(api, info, kC, &dims[kC])};
}

}  // namespace
}  // namespace qbb::ort
