#include "core/spec.h"

#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"

namespace qbb::core {
namespace {

using Dims = std::vector<int64_t>;

std::string to_string(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string dtype_name(int32_t dtype) {
  switch (dtype) {
    case QBB_FLOAT32: return "float32";
    case QBB_FLOAT16: return "float16";
    case QBB_UINT32: return "uint32";
    default: return "ONNX type " + std::to_string(dtype);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

void check_attributes(const qbb_matrix& m) {
  if (m.format != QBB_FORMAT_VERSION) {
    throw Error("unknown format version (written by a newer qbb-export?)", std::to_string(QBB_FORMAT_VERSION),
                std::to_string(m.format));
  }
  if (m.layout < 0 || m.layout >= QBB_NUM_LAYOUTS) {
    throw Error("unknown layout", "0 or 1", std::to_string(m.layout));
  }
  if (m.K < 1 || m.N < 1) {
    throw Error("empty matrix", "K >= 1 and N >= 1", "K=" + std::to_string(m.K) + ", N=" + std::to_string(m.N));
  }
  if (m.bases < 1 || m.bases > QBB_MAX_BASES) {
    throw Error("bad number of bases", "1.." + std::to_string(QBB_MAX_BASES), std::to_string(m.bases));
  }
  const bool grouped = m.group_size > 0 && m.group_size < m.K && m.group_size % QBB_WORD_BITS == 0;
  if (!grouped && m.group_size != m.K) {
    throw Error("bad group_size", "K (" + std::to_string(m.K) + ") or a multiple of 32 below it",
                std::to_string(m.group_size));
  }
}

// Every array, padded to whole tiles, must be addressable: kernels compute offsets in int64 without further checks.
// There are never more groups than words.
void check_size(const Spec& s) {
  int64_t size = 0;
  if (mul_overflows(s.tiles, QBB_TILE_ROWS * QBB_MAX_BASES * 4, &size) || mul_overflows(size, s.words, &size)) {
    throw Error("matrix too large", "less than 2^63 bytes", "K=" + std::to_string(s.K) + ", N=" + std::to_string(s.N));
  }
}

void check_tensor(const std::string& name, const qbb_tensor& tensor, std::initializer_list<int32_t> dtypes,
                  std::initializer_list<Dims> shapes) {
  std::string wanted;
  bool good = false;
  for (const int32_t dtype : dtypes) {
    good = good || tensor.dtype == dtype;
    wanted += (wanted.empty() ? "" : " or ") + dtype_name(dtype);
  }
  if (!good) throw Error("wrong type of " + name, wanted, dtype_name(tensor.dtype));

  if (tensor.rank < 0 || (tensor.rank > 0 && tensor.dims == nullptr)) {
    throw Error("bad shape of " + name, "rank >= 0 and dims", "rank " + std::to_string(tensor.rank));
  }
  const Dims dims(tensor.dims, tensor.dims + tensor.rank);
  wanted.clear();
  good = false;
  for (const Dims& shape : shapes) {
    good = good || dims == shape;
    wanted += (wanted.empty() ? "" : " or ") + to_string(shape);
  }
  if (!good) throw Error("wrong shape of " + name, wanted, to_string(dims));
  if (tensor.data == nullptr) throw Error("no data of " + name, "a pointer", "NULL");
}

}  // namespace

bool mul_overflows(int64_t a, int64_t b, int64_t* product) {
  if (a > std::numeric_limits<int64_t>::max() / b) return true;
  *product = a * b;
  return false;
}

int64_t element_size(int32_t dtype) { return dtype == QBB_FLOAT16 ? 2 : 4; }

Spec validate(const qbb_matrix& m) {
  check_attributes(m);
  const Spec s{m.K,
               m.N,
               m.bases,
               m.group_size,
               m.layout,
               ceil_div(m.K, QBB_WORD_BITS),
               ceil_div(m.K, m.group_size),
               ceil_div(m.N, QBB_TILE_ROWS)};
  check_size(s);
  const bool rows = s.layout == QBB_LAYOUT_ROWS;
  const int64_t lanes = QBB_TILE_ROWS;
  check_tensor("B (planes)", m.planes, {QBB_UINT32},
               {rows ? Dims{s.bases, s.N, s.words} : Dims{s.bases, s.tiles, s.words, lanes}});
  check_tensor("S (scales)", m.scales, {QBB_FLOAT16, QBB_FLOAT32},
               {rows ? Dims{s.bases, s.N, s.groups} : Dims{s.bases, s.tiles, s.groups, lanes}});
  check_tensor("Z (offset)", m.offset, {QBB_FLOAT32},
               {rows ? Dims{s.N, s.groups} : Dims{s.tiles, s.groups, lanes}, Dims{1, 1}});
  check_tensor("C (bias)", m.bias, {QBB_FLOAT32}, {Dims{s.N}, Dims{1}});
  return s;
}

}  // namespace qbb::core
