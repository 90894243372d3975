// The one exception of the core; the C interface turns it into a status and a line of text.
#pragma once

#include <stdexcept>
#include <string>

#include "qbb/ops.h"

namespace qbb::core {

class Error : public std::runtime_error {
 public:
  Error(const std::string& what, const std::string& expected, const std::string& got, qbb_status status = QBB_INVALID)
      : std::runtime_error(what + "; expected " + expected + "; got " + got), status_(status) {}

  qbb_status status() const { return status_; }

 private:
  qbb_status status_;
};

}  // namespace qbb::core
