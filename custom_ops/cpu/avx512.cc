#include "cpu/avx512_lanes.h"

namespace qbb::cpu {

void run_floats_avx512(const Block& block);
void run_floats_avx512(const Block& block) { run_floats<Avx512>(block); }

}  // namespace qbb::cpu
