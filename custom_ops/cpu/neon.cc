// 64-bit Arm: every such CPU has these instructions.
#include "cpu/neon_lanes.h"

namespace qbb::cpu {

void run_floats_neon(const Block& block);
void run_floats_neon(const Block& block) { run_floats<Neon>(block); }

}  // namespace qbb::cpu
