// Rows of weight and hidden, of any dtype and stride, in the form that products read; hidden transposed into tiles.
#pragma once
#include "../half.h"
#include "../head_kernels.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr int64_t kColumnBlock = 256;  // numbers of a row that are unpacked at a time: the rows at work stay in L1
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }

inline float load_element(DType t, const void* data, int64_t i) {
  if (t == DType::f32) return ((const float*)data)[i];
  const uint16_t h = ((const uint16_t*)data)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// Contiguous numbers of each dtype, as floats
struct LoadFloat {
  static constexpr int64_t size = 4;
  G2RL_INLINE vf vector(const char* p) { return load((const float*)p); }
  G2RL_INLINE float scalar(const char* p) { return *(const float*)p; }
};
struct LoadBf16 {
  static constexpr int64_t size = 2;
  G2RL_INLINE vf vector(const char* p) { return load_bf16((const uint16_t*)p); }
  G2RL_INLINE float scalar(const char* p) { return bf16_to_float(*(const uint16_t*)p); }
};
struct LoadF16 {
  static constexpr int64_t size = 2;
  G2RL_INLINE vf vector(const char* p) { return load_f16((const uint16_t*)p); }
  G2RL_INLINE float scalar(const char* p) { return f16_to_float(*(const uint16_t*)p); }
};

// Converts as many of n contiguous numbers as fill whole vectors; returns their count.
template <class Load>
static int64_t unpack_vectors(const void* data, int64_t offset, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, Load::vector((const char*)data + (offset + j) * Load::size));
  return j;
}

// Elements [begin, begin + n) of row i as floats.
static void unpack_floats(DType t, const Matrix& m, int64_t i, int64_t begin, int64_t n, float* out) {
  const int64_t offset = i * m.stride0 + begin * m.stride1;
  int64_t j = 0;
  if (m.stride1 == 1)
    j = (t == DType::f32    ? unpack_vectors<LoadFloat>
         : t == DType::bf16 ? unpack_vectors<LoadBf16>
                            : unpack_vectors<LoadF16>)(m.data, offset, n, out);
  for (; j < n; j++) out[j] = load_element(t, m.data, offset + j * m.stride1);
}

// Units [begin, begin + n) of row i, of so many columns, for the dot product: floats, or pairs of bf16 (the last one padded
// with 0).
static void unpack_units(const HeadChunk& c, const Matrix& m, int64_t columns, int64_t i, int64_t begin, int64_t n, float* out) {
  if (!c.bf16_pairs) return unpack_floats(c.args->dtype, m, i, begin, n, out);
  const uint16_t* data = (const uint16_t*)m.data + i * m.stride0;
  for (int64_t j = 0; j < n; j++) {
    const int64_t k = 2 * (begin + j);
    const uint16_t pair[2] = {data[k * m.stride1], k + 1 < columns ? data[(k + 1) * m.stride1] : (uint16_t)0};
    std::memcpy(out + j, pair, 4);
  }
}

// Whether a row of units can be read in place.
inline bool readable_in_place(const HeadChunk& c, const Matrix& m, int64_t columns) {
  return m.stride1 == 1 && (c.bf16_pairs ? columns % 2 == 0 : c.args->dtype == DType::f32);
}

// Units [begin, end) of one matrix, from its own unit `begin - first` on
static void pack_units(const HeadChunk& c, const Matrix& m, int64_t columns, int64_t first, int64_t tile, int64_t unit_begin,
                       int64_t unit_end) {
  float* out = c.packed + tile * c.units * c.tile_width;
  float row[kColumnBlock];
  for (int64_t k0 = unit_begin; k0 < unit_end; k0 += kColumnBlock) {
    const int64_t n = smaller(kColumnBlock, unit_end - k0);
    for (int64_t t = 0; t < c.tile_width; t++) {
      const int64_t token = tile * c.tile_width + t;
      if (token < c.tokens) unpack_units(c, m, columns, c.first_token + token, k0 - first, n, row);
      else std::memset(row, 0, sizeof(float) * n);
      for (int64_t k = 0; k < n; k++) std::memcpy(out + (k0 + k) * c.tile_width + t, row + k, 4);
    }
  }
}

static void pack(const HeadChunk& c, int64_t tile, int64_t unit_begin, int64_t unit_end) {
  const HeadArgs& a = *c.args;
  const int64_t low = c.units - c.low_units;
  if (unit_begin < low) pack_units(c, a.hidden, a.d, 0, tile, unit_begin, smaller(unit_end, low));
  if (unit_end > low) pack_units(c, a.low_hidden, a.r, low, tile, unit_begin > low ? unit_begin : low, unit_end);
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
