// Eight floats: the vector type of the avx2 kernels.  Include under the matching target pragma.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define G2RL_INLINE static inline __attribute__((always_inline))

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr int kLanes = 8;
using vf = __m256;

G2RL_INLINE vf splat(float x) { return _mm256_set1_ps(x); }
G2RL_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
G2RL_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
G2RL_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// max that keeps a NaN in x and drops one in bound
G2RL_INLINE vf at_least(vf bound, vf x) { return _mm256_max_ps(bound, x); }
G2RL_INLINE vf abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
G2RL_INLINE vf sqrt(vf x) { return _mm256_sqrt_ps(x); }
G2RL_INLINE float sum(vf x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
G2RL_INLINE vf sums(const vf x[kLanes]) { return _mm256_setr_ps(sum(x[0]), sum(x[1]), sum(x[2]), sum(x[3]), sum(x[4]), sum(x[5]), sum(x[6]), sum(x[7])); }
G2RL_INLINE vf less(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
G2RL_INLINE vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for whole n in [-126, 127]; a product, so that a NaN in x survives
G2RL_INLINE vf scale_by_pow2(vf x, vf n) {
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// rows to columns
G2RL_INLINE void transpose(vf x[kLanes]) {
  float t[kLanes][kLanes];
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < kLanes; j++) t[j][i] = x[i][j];
  for (int i = 0; i < kLanes; i++) x[i] = load(t[i]);
}

// four bytes at any address, in every lane
G2RL_INLINE vf splat_unit(const char* p) {
  float x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_ps(x);
}
G2RL_INLINE void store_code(uint16_t* p, vf x) {  // round to nearest; NaN becomes 0
  __m256i i = _mm256_cvtps_epi32(x);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}
G2RL_INLINE vf load_code(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)));
}
G2RL_INLINE vf load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
G2RL_INLINE vf load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline uint16_t float_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
