// bfloat16 and float16 to float, one number at a time, for any compiler target.
#pragma once
#include <cstdint>
#include <cstring>

namespace g2rl {
namespace {  // internal linkage: each instruction set compiles its own copy

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float((uint32_t)h << 16); }

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) return bits_to_float(sign | 0x33800000) * (float)mantissa;                 // zero, subnormal: mantissa 2^-24
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));                // infinity, NaN
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace
}  // namespace g2rl
