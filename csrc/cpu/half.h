// Conversions of one number: bfloat16 and float16 to float, float to bfloat16. For any compiler target.
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

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline uint16_t float_to_bf16(float x) {  // round to nearest, ties to even
  const uint32_t bits = float_bits(x);
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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
