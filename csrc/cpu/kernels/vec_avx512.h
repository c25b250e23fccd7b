// Sixteen floats: the vector type of the avx512 and avx512bf16 kernels.  Include under the matching target pragma.
#pragma once
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#define G2RL_INLINE static inline __attribute__((always_inline))

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr int kLanes = 16;
using vf = __m512;

G2RL_INLINE vf splat(float x) { return _mm512_set1_ps(x); }
G2RL_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
G2RL_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
G2RL_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// max that keeps a NaN in x and drops one in bound
G2RL_INLINE vf at_least(vf bound, vf x) { return _mm512_max_ps(bound, x); }
G2RL_INLINE vf abs(vf x) { return _mm512_abs_ps(x); }
G2RL_INLINE vf sqrt(vf x) { return _mm512_sqrt_ps(x); }
G2RL_INLINE float sum(vf x) { return _mm512_reduce_add_ps(x); }
// the sum of each of sixteen vectors: added in pairs that share a vector from then on, 30 shuffles for 16 sums
G2RL_INLINE vf sums(const vf x[16]) {
  vf a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    const vf p = x[i + (i & 4)], q = x[i + (i & 4) + 4];
    a[i] = _mm512_shuffle_f32x4(p, q, 0x44) + _mm512_shuffle_f32x4(p, q, 0xee);
  }
  for (int i = 0; i < 4; i++) b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88) + _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
  for (int i = 0; i < 2; i++) c[i] = _mm512_unpacklo_ps(b[i], b[i + 2]) + _mm512_unpackhi_ps(b[i], b[i + 2]);
  return _mm512_unpacklo_ps(c[0], c[1]) + _mm512_unpackhi_ps(c[0], c[1]);
}
G2RL_INLINE vf less(vf a, vf b, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
G2RL_INLINE vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
G2RL_INLINE vf scale_by_pow2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
// rows to columns
G2RL_INLINE void transpose(vf x[16]) {
  vf a[16];
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {  // x[i + 2 j + k]: column 2 j + k of each quarter, four rows
      const __m512d p = _mm512_castps_pd(a[i + j]), q = _mm512_castps_pd(a[i + j + 2]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
  for (int i = 0; i < 4; i++) {  // quarters: rows become columns 4 q + i
    const vf p = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), q = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    const vf r = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88), s = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    a[i] = _mm512_shuffle_f32x4(p, r, 0x88), a[i + 8] = _mm512_shuffle_f32x4(p, r, 0xdd);
    a[i + 4] = _mm512_shuffle_f32x4(q, s, 0x88), a[i + 12] = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
  for (int i = 0; i < 16; i++) x[i] = a[i];
}

// four bytes at any address, in every lane
G2RL_INLINE vf splat_unit(const char* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm512_castsi512_ps(_mm512_set1_epi32(x));
}
G2RL_INLINE void store_code(uint16_t* p, vf x) {  // round to nearest; NaN becomes 0xffff
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtusepi32_epi16(_mm512_cvtps_epi32(x)));
}
G2RL_INLINE vf load_code(const uint16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
G2RL_INLINE vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
G2RL_INLINE vf load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

inline uint16_t float_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

#ifdef G2RL_HAS_BF16_DOT
G2RL_INLINE void store_bf16(uint16_t* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
G2RL_INLINE vf dot_bf16(vf pairs_a, vf pairs_b, vf c) { return _mm512_dpbf16_ps(c, (__m512bh)pairs_a, (__m512bh)pairs_b); }
#endif

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
