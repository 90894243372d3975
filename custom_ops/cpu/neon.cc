// 64-bit Arm: every such CPU has these instructions.
#include "cpu/neon_lanes.h"

namespace qbb::cpu {

void run_neon(const Block& block);
void run_neon(const Block& block) { run<Neon>(block); }

}  // namespace qbb::cpu
