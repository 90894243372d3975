// Statuses, errors and shapes of the runtime as C++ objects.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <vector>

#include "ort/abi.h"
#include "qbb/ops.h"

namespace qbb::ort {
namespace {

// Holds a failed status of the runtime, or a mistake of ours, on its way to the caller.
class Failure {
 public:
  Failure(ErrorCode code, std::string text) : code_(code), text_(std::move(text)) {}
  ErrorCode code() const { return code_; }
  const std::string& text() const { return text_; }

 private:
  ErrorCode code_;
  std::string text_;
};

// Takes over a status: NULL is success, anything else becomes a Failure.
void check(const Api* api, Status* status) {
  if (status == nullptr) return;
  const std::string text = GetErrorMessage(api, status);
  ReleaseStatus(api, status);
  throw Failure(kFail, text);
}

// Runs `body`; whatever it throws becomes a status that begins with `where`.
template <class Body>
Status* guard(const Api* api, const std::string& where, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& f) {
    try {
      return CreateStatus(api, f.code(), (where + ": " + f.text()).c_str());
    } catch (...) {  // no memory for the whole text
      return CreateStatus(api, f.code(), f.text().c_str());
    }
  } catch (const std::bad_alloc&) {
    return CreateStatus(api, kFail, "qbb: out of memory");
  } catch (...) {
    return CreateStatus(api, kFail, "qbb: unexpected failure");
  }
}

void check(qbb_status status, const char* error) {
  if (status != QBB_OK) throw Failure(status == QBB_INVALID ? kInvalidArgument : kFail, error);
}

// Type and dims of a tensor.
struct Shape {
  ElementType type = kUndefined;
  std::vector<int64_t> dims;

  Shape(const Api* api, const Value* value) {
    TensorInfo* info = nullptr;
    check(api, GetTensorTypeAndShape(api, value, &info));
    const auto release = [api](TensorInfo* p) { ReleaseTensorTypeAndShapeInfo(api, p); };
    const std::unique_ptr<TensorInfo, decltype(release)> owner(info, release);
    read(api, info);
  }
  Shape(const Api* api, const TensorInfo* info) { read(api, info); }

  std::string text() const {
    std::string out = "[";
    for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
    return out + "]";
  }

 private:
  void read(const Api* api, const TensorInfo* info) {
    size_t rank = 0;
    check(api, GetTensorElementType(api, info, &type));
    check(api, GetDimensionsCount(api, info, &rank));
    dims.resize(rank);
    check(api, GetDimensions(api, info, dims.data(), rank));
  }
};

}  // namespace
}  // namespace qbb::ort
