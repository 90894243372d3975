#include "core/matrix.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

namespace qbb::core {
namespace {

constexpr int64_t kLanes = QBB_TILE_ROWS;
// Whole huge pages: reads from ordinary pages reach half the speed of memory.
constexpr size_t kHugePage = size_t{1} << 21;
constexpr std::align_val_t kAlignment{64};  // one cache line, one 512-bit register

// Bit order of layout 0 to that of layout 1 (see format.h): nibbles 0 1 2 3 4 5 6 7 become 0 4 1 5 2 6 3 7.
uint32_t swizzle(uint32_t word) {
  uint32_t out = 0;
  for (int j = 0; j < 4; ++j) {
    out |= ((word >> (4 * j)) & 15u) << (8 * j);
    out |= ((word >> (16 + 4 * j)) & 15u) << (8 * j + 4);
  }
  return out;
}

// [count, N, depth] to [count, tiles, depth, 16]; rows at or past N stay 0. T is an unsigned integer of the element's
// size; `from` may be unaligned.
template <class T, class Convert>
void tile_rows(const void* from, T* to, int64_t count, const Spec& s, int64_t depth, Convert convert) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < s.N; ++n) {
      T* lane = to + ((i * s.tiles + n / kLanes) * depth) * kLanes + n % kLanes;
      for (int64_t d = 0; d < depth; ++d) {
        T value;
        std::memcpy(&value, bytes + ((i * s.N + n) * depth + d) * static_cast<int64_t>(sizeof(T)), sizeof(T));
        lane[d * kLanes] = convert(value);
      }
    }
  }
}

std::vector<Segment> segments_of(const Spec& s, int64_t group_words) {
  std::vector<Segment> segments;
  for (int64_t w = 0; w < s.words;) {
    const int64_t group = w / group_words;
    const int64_t end = std::min({(w / kSegmentWords + 1) * kSegmentWords, (group + 1) * group_words, s.words});
    segments.push_back(Segment{w, static_cast<int>(end - w), group});
    w = end;
  }
  return segments;
}

bool misaligned(const void* p, size_t size) { return reinterpret_cast<uintptr_t>(p) % size != 0; }

}  // namespace

void Free::operator()(void* p) const {
  ::operator delete(p, huge ? std::align_val_t{kHugePage} : kAlignment);
}

Matrix::Buffer Matrix::allocate(int64_t bytes) {
  const auto wide = static_cast<uint64_t>(bytes);
  if (wide > std::numeric_limits<size_t>::max()) throw std::bad_alloc();
  const auto size = static_cast<size_t>(wide);
  const bool huge = size >= kHugePage;
  Buffer buffer(::operator new(size, huge ? std::align_val_t{kHugePage} : kAlignment), Free{huge});
#if defined(__linux__)
  // Not the last, partial one: it would take memory that nobody uses. A refusal costs speed only.
  if (huge) madvise(buffer.get(), size / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  std::memset(buffer.get(), 0, size);
  return buffer;
}

Matrix::Matrix(const qbb_matrix& m) {
  const Spec s = validate(m);
  const bool rows = s.layout == QBB_LAYOUT_ROWS;
  const int64_t scale_size = element_size(m.scales.dtype);
  const int64_t plane_bytes = s.bases * s.tiles * s.words * kLanes * 4;
  const int64_t scale_bytes = s.bases * s.tiles * s.groups * kLanes * scale_size;
  const int64_t offset_bytes = s.tiles * s.groups * kLanes * 4;
  const auto same = [](auto value) { return value; };

  // A file may put data at any address; kernels want whole elements aligned, so only such odd ones are copied.
  const auto adopt = [](const void* data, int64_t bytes, size_t size, Buffer& own) -> const void* {
    if (!misaligned(data, size)) return data;
    own = allocate(bytes);
    std::memcpy(own.get(), data, static_cast<size_t>(bytes));
    return own.get();
  };

  const void* planes = nullptr;
  const void* scales = nullptr;
  if (rows) {
    planes_ = allocate(plane_bytes);
    tile_rows(m.planes.data, static_cast<uint32_t*>(planes_.get()), s.bases, s, s.words, swizzle);
    planes = planes_.get();
    scales_ = allocate(scale_bytes);
    if (scale_size == 2) {
      tile_rows(m.scales.data, static_cast<uint16_t*>(scales_.get()), s.bases, s, s.groups, same);
    } else {
      tile_rows(m.scales.data, static_cast<uint32_t*>(scales_.get()), s.bases, s, s.groups, same);
    }
    scales = scales_.get();
  } else {
    planes = adopt(m.planes.data, plane_bytes, 4, planes_);
    scales = adopt(m.scales.data, scale_bytes, static_cast<size_t>(scale_size), scales_);
  }

  const void* offset = nullptr;
  if (m.offset.rank == 2 && m.offset.dims[0] == 1 && m.offset.dims[1] == 1) {
    float value = 0;
    std::memcpy(&value, m.offset.data, sizeof value);
    if (value != 0) {  // the same offset everywhere: rare, so spelled out rather than carried through the kernels
      offset_ = allocate(offset_bytes);
      auto* out = static_cast<float*>(offset_.get());
      for (int64_t i = 0; i < s.tiles * s.groups * kLanes; ++i) out[i] = value;
      offset = out;
    }
  } else if (rows) {
    offset_ = allocate(offset_bytes);
    tile_rows(m.offset.data, static_cast<uint32_t*>(offset_.get()), 1, s, s.groups, same);
    offset = offset_.get();
  } else {
    offset = adopt(m.offset.data, offset_bytes, 4, offset_);
  }

  const void* bias = nullptr;
  if (m.bias.dims[0] == s.N) {
    bias = adopt(m.bias.data, s.N * 4, 4, bias_);
  } else {
    float value = 0;
    std::memcpy(&value, m.bias.data, sizeof value);
    if (value != 0) {
      bias_ = allocate(s.N * 4);
      auto* out = static_cast<float*>(bias_.get());
      for (int64_t n = 0; n < s.N; ++n) out[n] = value;
      bias = out;
    }
  }

  const int64_t group_words = s.group_size == s.K ? s.words : s.group_size / QBB_WORD_BITS;
  segments_ = segments_of(s, group_words);
  tiled_ = Tiled{s.K,
                 s.N,
                 s.bases,
                 s.words,
                 s.groups,
                 s.tiles,
                 group_words,
                 static_cast<const uint32_t*>(planes),
                 scales,
                 scale_size == 2,
                 static_cast<const float*>(offset),
                 static_cast<const float*>(bias),
                 segments_.data(),
                 static_cast<int64_t>(segments_.size())};
}

}  // namespace qbb::core
