// Picks a kernel by name, by QBB_ISA or by what the CPU can do.
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace qbb::cpu {

struct Kernel {
  const char* name;
  bool (*available)();
  void (*run_floats)(const Block&);
  void (*prepare)(const Block&);
  void (*run_bytes)(const Block&);
};

int32_t num_kernels();
const Kernel* kernel_at(int32_t index);  // NULL past the end

// isa: a name, or NULL for QBB_ISA or the best. Throws core::Error, never falls back.
const Kernel& select_kernel(const char* isa);

}  // namespace qbb::cpu
