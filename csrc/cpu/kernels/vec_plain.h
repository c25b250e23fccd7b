// Four floats in the compiler's own vector type: the kernels for any CPU (SSE2 on x86-64, NEON on ARM).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../half.h"

#define G2RL_INLINE static inline __attribute__((always_inline))

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr int kLanes = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

G2RL_INLINE vf splat(float x) { return vf{x, x, x, x}; }
G2RL_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, 16);
  return x;
}
G2RL_INLINE void store(float* p, vf x) { std::memcpy(p, &x, 16); }
G2RL_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
// max that keeps a NaN in x and drops one in bound
G2RL_INLINE vf at_least(vf bound, vf x) { return bound > x ? bound : x; }
G2RL_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
G2RL_INLINE vf sqrt(vf x) { return vf{std::sqrt(x[0]), std::sqrt(x[1]), std::sqrt(x[2]), std::sqrt(x[3])}; }
G2RL_INLINE float sum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
G2RL_INLINE vf sums(const vf x[kLanes]) { return vf{sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3])}; }
G2RL_INLINE vf less(vf a, vf b, vf yes, vf no) { return a < b ? yes : no; }
G2RL_INLINE vf round(vf x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22: 1.5 2^23 leaves no fraction bits
// x 2^n for whole n in [-126, 127]; a product, so that a NaN in x survives
G2RL_INLINE vf scale_by_pow2(vf x, vf n) { return x * (vf)(((vi)(n + 12582912.0f) << 23) + (127 << 23)); }
// rows to columns
G2RL_INLINE void transpose(vf x[kLanes]) {
  const vf a = {x[0][0], x[1][0], x[2][0], x[3][0]}, b = {x[0][1], x[1][1], x[2][1], x[3][1]};
  const vf c = {x[0][2], x[1][2], x[2][2], x[3][2]}, d = {x[0][3], x[1][3], x[2][3], x[3][3]};
  x[0] = a, x[1] = b, x[2] = c, x[3] = d;
}

// four bytes at any address, in every lane
G2RL_INLINE vf splat_unit(const char* p) {
  float x;
  std::memcpy(&x, p, 4);
  return splat(x);
}
G2RL_INLINE void store_code(uint16_t* p, vf x) {  // round to nearest
  const vi i = (vi)(x + 12582912.0f);
  for (int j = 0; j < kLanes; j++) p[j] = (uint16_t)i[j];
}
G2RL_INLINE vf load_code(const uint16_t* p) { return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
G2RL_INLINE vf load_bf16(const uint16_t* p) {
  return vf{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
G2RL_INLINE vf load_f16(const uint16_t* p) {
  return vf{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
// round to nearest, ties to even
inline uint16_t float_to_f16(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);                                      // NaN
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                                     // 65520 and beyond: infinity
  if (size < 0x38800000)                                                                        // below 2^-14: steps of 2^-24,
    return (uint16_t)(sign | (float_bits(bits_to_float(size) + 0.5f) - 0x3f000000));           // which are those of floats at 1/2
  return (uint16_t)(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
