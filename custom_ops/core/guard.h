// What the C interfaces of all kinds of kernels share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "core/error.h"
#include "core/spec.h"

namespace qbb::core {

// One line, whatever the text quotes.
inline void write_error(char* error, size_t size, const char* text) {
  if (error == nullptr || size == 0) return;
  const size_t length = std::strlen(text) < size ? std::strlen(text) : size - 1;
  for (size_t i = 0; i < length; ++i) error[i] = static_cast<unsigned char>(text[i]) < ' ' ? ' ' : text[i];
  error[length] = '\0';
}

// Runs `body` and turns what it throws into a status: no exception may cross a C interface.
template <class Body>
qbb_status guard(char* error, size_t size, Body body) {
  write_error(error, size, "");
  try {
    body();
    return QBB_OK;
  } catch (const Error& e) {
    write_error(error, size, e.what());
    return e.status();
  } catch (const std::bad_alloc&) {
    write_error(error, size, "out of memory; expected room for the repacked weights; got none");
    return QBB_NO_MEMORY;
  } catch (const std::exception& e) {
    write_error(error, size, e.what());
    return QBB_INVALID;
  }
}

inline void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(std::string("missing argument ") + name, "a pointer", "NULL");
}

inline void check_mode(int32_t mode) {
  if (mode < 0 || mode >= QBB_NUM_MODES) {
    throw Error("unknown mode", "0 (exact), 1 (int8) or 2 (int16)", std::to_string(mode));
  }
}

// Rows of X whose bytes, and those of Y, can be counted.
inline void check_rows(int64_t M, int64_t K, int64_t N) {
  if (M < 0) throw Error("bad number of rows of X", "M >= 0", std::to_string(M));
  int64_t size = 0;
  if (mul_overflows(M, 4, &size) || mul_overflows(size, K > N ? K : N, &size)) {
    throw Error("too many rows of X", "less than 2^63 bytes of X and Y", std::to_string(M));
  }
}

}  // namespace qbb::core
