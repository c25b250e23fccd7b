// The backward pass (logprobs.cpp): logits to their gradient dz, and dz times weight and hidden.
#pragma once
#include "project.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

// One number of dz or of a packed operand: a float, or bf16 where products take pairs of it.
template <bool kPairs>
G2RL_INLINE void store_factor(char* p, vf x) {
#ifdef G2RL_HAS_BF16_DOT
  if (kPairs) return store_bf16((uint16_t*)p, x);
#endif
  store((float*)p, x);
}

// logits -> dz, in place; add_realised then writes the realised tokens' own terms
template <bool kCapped>
static void differentiate(const GradientBlock& g, int64_t count, float* logits) {
  const HeadChunk& c = *g.chunk;
  const vf log2e = splat(kLog2e), ln2 = splat(0.6931471805599453f), least = splat(-100.0f), zero = splat(0.0f), one = splat(1.0f);
  const float uncap = kCapped ? 1.0f / c.args->logit_softcap : 0.0f;
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t t = 0; t < c.tile_width; t += kLanes) {
      const int64_t token = p * c.tile_width + t;
      // from d / d(z / temperature) to d / d(W h + b), without the softcap's slope; negative
      const vf factor = splat(-c.args->logit_scale) / load(c.temperature + token);
      const vf per_temperature = one / load(c.temperature + token);
      const vf top = load(g.top + token), log_total = load(g.log_total + token);
      const vf a = load(g.a + token) * factor, e = load(g.e + token) * factor * ln2;
      float* column = logits + p * kBlock * c.tile_width + t;
      for (int64_t r = 0; r < count; r++) {
        const vf z = load(column + r * c.tile_width);
        const vf x = ((z * per_temperature - top) - log_total) * log2e;  // log2 p
        const vf y = at_least(least, x), prob = less(x, least, zero, exp2_negative(y));
        vf dz = prob * fma(e, y, a);
        if (kCapped) dz *= at_least(zero, one - (z * splat(uncap)) * (z * splat(uncap)));
        store(column + r * c.tile_width, dz);
      }
    }
}

static void add_realised(const GradientBlock& g, int64_t v0, int64_t count, float* logits, const float* slope) {
  const HeadChunk& c = *g.chunk;
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    if (r < 0 || r >= count) continue;
    const float factor = c.args->logit_scale / c.temperature[t];
    logits[((t / c.tile_width) * kBlock + r) * c.tile_width + t % c.tile_width] = g.own[t] * factor * slope[t];
  }
}

// The softcap's slope at the realised tokens' logits, before they are overwritten
static void slopes(const GradientBlock& g, int64_t v0, int64_t count, const float* logits, float* slope) {
  const HeadChunk& c = *g.chunk;
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    slope[t] = 1.0f;
    if (c.args->logit_softcap == 0.0f || r < 0 || r >= count) continue;
    const float capped = logits[((t / c.tile_width) * kBlock + r) * c.tile_width + t % c.tile_width] / c.args->logit_softcap;
    slope[t] = capped * capped < 1.0f ? 1.0f - capped * capped : capped == capped ? 0.0f : capped;
  }
}

// dz by vocabulary entry and by token; zeros beyond `count`, up to whole vectors
template <bool kPairs>
static void store_gradient(const GradientBlock& g, int64_t count, const float* logits) {
  const HeadChunk& c = *g.chunk;
  constexpr int64_t size = kPairs ? 2 : 4;
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t t = 0; t < c.tile_width; t += kLanes)
      for (int64_t r = 0; r < count; r += kLanes) {
        vf x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
          x[i] = r + i < count ? load(logits + (p * kBlock + r + i) * c.tile_width + t) : splat(0.0f);
          store_factor<kPairs>(g.by_entry + (r + i) * g.entry_bytes + (p * c.tile_width + t) * size, x[i]);
        }
        if (!g.by_token) continue;
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store_factor<kPairs>(g.by_token + (p * c.tile_width + t + i) * g.token_bytes + r * size, x[i]);
      }
}

static void gradient(const GradientBlock& g, int64_t v0, int64_t count) {
  const HeadChunk& c = *g.chunk;
  alignas(64) float logits[kBlock * kMaxWidth], slope[kMaxWidth];
  if (c.args->kept.has(v0 / kBlock)) {
    kept_logits(c, v0, count, logits);
  } else {
    logits_block_for(c)(c, v0, count, logits);
    finish_logits(c, v0, count, logits);
  }
  slopes(g, v0, count, logits, slope);
  (c.args->logit_softcap != 0.0f ? differentiate<true> : differentiate<false>)(g, count, logits);
  add_realised(g, v0, count, logits, slope);
  if (g.sum_entries)
    for (int64_t r = 0; r < count; r++) {
      vf total = splat(0.0f);
      for (int64_t p = 0; p < c.tiles; p++)
        for (int64_t t = 0; t < c.tile_width; t += kLanes) total += load(logits + (p * kBlock + r) * c.tile_width + t);
      g.sum_entries[r] = sum(total);
    }
  (c.bf16_pairs ? store_gradient<true> : store_gradient<false>)(g, count, logits);
}

// Two rows of 16-bit numbers, side by side in pairs
static void interleave(const uint16_t* first, const uint16_t* second, int64_t n, uint16_t* out) {
  for (int64_t j = 0; j < n; j++) out[2 * j] = first[j], out[2 * j + 1] = second[j];
}

constexpr int kBlockVectors = kLanes == 16 ? 4 : 2;  // of a wide block of columns

static int64_t block_width_for(int64_t columns) {
  for (int64_t vectors = 1; vectors < kBlockVectors; vectors *= 2)
    if (columns <= vectors * kLanes) return vectors * kLanes;
  return kBlockVectors * kLanes;
}

// Rows [row, row + count) of a matrix as the packed operand of a product over them: [units][width] for each block of its
// columns, blocks block_stride floats apart. A unit is a row, or a pair of rows; zeros beyond the edges.
static void pack_rows(const HeadChunk& c, const Matrix& m, int64_t columns, int64_t width, int64_t row, int64_t count, float* out,
                      int64_t block_stride) {
  const int64_t step = c.bf16_pairs ? 2 : 1;
  for (int64_t i = 0; i < count; i += step)
    for (int64_t k = 0; k < columns; k += width) {
      const int64_t n = smaller(width, columns - k);
      float* unit = out + k / width * block_stride + i / step * width;
      if (!c.bf16_pairs) {
        unpack_floats(c.args->dtype, m, row + i, k, n, unit);
      } else {
        const uint16_t* first = (const uint16_t*)m.data + (row + i) * m.stride0 + k * m.stride1;
        const uint16_t* second = first + m.stride0;
        uint16_t* pairs = (uint16_t*)unit;
        if (m.stride1 == 1 && i + 1 < count) interleave(first, second, n, pairs);
        else
          for (int64_t j = 0; j < n; j++) pairs[2 * j] = first[j * m.stride1], pairs[2 * j + 1] = i + 1 < count ? second[j * m.stride1] : (uint16_t)0;
      }
      for (int64_t j = n; j < width; j++) unit[j] = 0.0f;
    }
}

// out[r, :] (+)= rows[r, :] . packed for `count` rows and one block of columns. Rows are readable up to whole tiles.
template <class Dot, int R, int T>
static void product_rows(const char* rows, int64_t row_bytes, int64_t count, const float* packed, int64_t units, float* out,
                         int64_t out_stride, int64_t columns, bool accumulate) {
  alignas(64) float tile[R * T * kLanes];
  for (int64_t r = 0; r < count; r += R, rows += R * row_bytes, out += R * out_stride) {
    if (count - r >= R && columns == T * kLanes) {
      product_tile<Dot, R, T>(rows, row_bytes, packed, units, out, out_stride, accumulate, nullptr);
      continue;
    }
    product_tile<Dot, R, T>(rows, row_bytes, packed, units, tile, T * kLanes, false, nullptr);
    for (int64_t i = 0; i < smaller(R, count - r); i++)
      for (int64_t j = 0; j < columns; j++) out[i * out_stride + j] = (accumulate ? out[i * out_stride + j] : 0.0f) + tile[i * T * kLanes + j];
  }
}

// Narrow blocks take more rows at a time: a sum waits for the one before, so that a few would leave the CPU idle.
template <class Dot>
static void product_of(int64_t width, const char* rows, int64_t row_bytes, int64_t count, const float* packed, int64_t units, float* out,
                       int64_t out_stride, int64_t columns, bool accumulate) {
  constexpr int R = kProductRows;
  if (width == kLanes) {
    const int64_t most = count / (2 * R) * (2 * R);
    product_rows<Dot, 2 * R, 1>(rows, row_bytes, most, packed, units, out, out_stride, columns, accumulate);
    product_rows<Dot, R, 1>(rows + most * row_bytes, row_bytes, count - most, packed, units, out + most * out_stride, out_stride, columns, accumulate);
  } else if (width == 2 * kLanes) {
    product_rows<Dot, R, 2>(rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
  } else {
    product_rows<Dot, R, kBlockVectors>(rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
  }
}

static void product(const HeadChunk& c, const char* rows, int64_t row_bytes, int64_t count, const float* packed, int64_t width,
                    int64_t units, float* out, int64_t out_stride, int64_t columns, bool accumulate) {
#ifdef G2RL_HAS_BF16_DOT
  if (c.bf16_pairs) return product_of<DotBf16>(width, rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
#endif
  product_of<DotFloat>(width, rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
}

static void round_to(DType dtype, const float* x, int64_t n, void* out) {
  if (dtype == DType::f32) std::memcpy(out, x, sizeof(float) * n);
  else if (dtype == DType::bf16)
    for (int64_t j = 0; j < n; j++) ((uint16_t*)out)[j] = float_to_bf16(x[j]);
  else
    for (int64_t j = 0; j < n; j++) ((uint16_t*)out)[j] = float_to_f16(x[j]);
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
