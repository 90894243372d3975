// float16 <-> float32 for CPUs without an instruction for it. Bitwise equal to F16C for all but NaN payloads.
#pragma once

#include <stdint.h>
#include <string.h>

namespace qbb::cpu {
namespace {  // every ISA compiles its own copy with its own flags

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 1023u;
  uint32_t bits = 0;
  if (exponent == 31) {
    bits = 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = ((exponent + 112u) << 23) | (mantissa << 13);
  } else {
    const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;  // exact
    memcpy(&bits, &subnormal, sizeof bits);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint16_t float_to_half(float f) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t out = 0;
  if (bits > 0x7f800000u) {
    out = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
    out = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: the sum with 0.5 has the spacing of a subnormal half, 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof bits);
    out = bits - 0x3f000000u;
  } else {
    out = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | out);
}

}  // namespace
}  // namespace qbb::cpu
