#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"

#if QBB_X86_KERNELS
#include <cpuid.h>
#endif
#if QBB_ARM_KERNELS && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qbb::cpu {

#define QBB_KERNEL(name, available, floats, bytes) \
  void run_floats_##floats(const Block&);          \
  void prepare_##bytes(const Block&);              \
  void run_bytes_##bytes(const Block&);
#include "cpu/kernels.inc"
#undef QBB_KERNEL

namespace {

#if QBB_X86_KERNELS
bool has_f16c() {  // Clang's __builtin_cpu_supports did not know it for long
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const Kernel kKernels[] = {
#define QBB_KERNEL(name, available, floats, bytes) \
  {#name, []() -> bool { return available; }, run_floats_##floats, prepare_##bytes, run_bytes_##bytes},
#include "cpu/kernels.inc"
#undef QBB_KERNEL
};

std::string names(bool only_available) {
  std::string text;
  for (const Kernel& kernel : kKernels) {
    if (!only_available || kernel.available()) text += (text.empty() ? "" : ", ") + std::string(kernel.name);
  }
  return text;
}

}  // namespace

int32_t num_kernels() { return static_cast<int32_t>(sizeof kKernels / sizeof *kKernels); }

const Kernel* kernel_at(int32_t index) { return index < 0 || index >= num_kernels() ? nullptr : &kKernels[index]; }

const Kernel& select_kernel(const char* isa) {
  const char* source = "isa";
  if (isa == nullptr) {
    source = "QBB_ISA";
    isa = std::getenv("QBB_ISA");
  }
  const bool forced = isa != nullptr && *isa != '\0';
  for (const Kernel& kernel : kKernels) {
    if (forced && std::strcmp(isa, kernel.name) != 0) continue;
    if (kernel.available()) return kernel;
    if (forced) {
      throw core::Error(std::string("this CPU cannot run the instruction set named by ") + source,
                        "one of " + names(true), isa, QBB_UNSUPPORTED);
    }
  }
  throw core::Error(std::string("unknown instruction set named by ") + source, "one of " + names(false),
                    isa == nullptr ? "" : isa, QBB_UNSUPPORTED);
}

}  // namespace qbb::cpu
