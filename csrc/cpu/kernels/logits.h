// The matrix product of all kernels (product_tile), and with it the logits of a block.
#pragma once
#include "exp_tanh.h"
#include "rows.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

struct DotFloat {
  G2RL_INLINE vf apply(vf w, vf h, vf acc) { return fma(w, h, acc); }
};
#ifdef G2RL_HAS_BF16_DOT
struct DotBf16 {
  G2RL_INLINE vf apply(vf w, vf h, vf acc) { return dot_bf16(w, h, acc); }
};
#endif

// Some rows of so many units, at equal distances
struct Rows {
  const char* data;
  int64_t bytes, units;
  Rows from(int64_t r) const { return {data + r * bytes, bytes, units}; }
};

// out[r, t] (+)= rows[r, :] . packed[:, t] for R rows and T vectors (of tokens, or other columns), all sums in registers.  The
// old value of out is added last: many small terms of one sign, each added to a large sum, would lose their digits.
// Rows go on in `more`, where they have further columns.  The rows that follow, `next`, are prefetched into L2, a cache line a row for each line consumed, and the row's own next
// line into L1.  Together they take the product from 0.85 to 0.95 of the CPU's peak.
template <class Dot, int R, int T>
static __attribute__((noinline)) void product_tile(const char* rows, int64_t row_bytes, const float* packed, int64_t units, float* out,
                                                   int64_t out_stride, bool accumulate, const char* next, Rows more = {}) {
  vf acc[R][T];
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[r][t] = splat(0.0f);
  for (int64_t k = 0; k < units; k += 16) {
    if (next) {
#pragma GCC unroll 32
      for (int r = 0; r < R; r++) {
        __builtin_prefetch(next + r * row_bytes + k * 4, 0, 2);
        __builtin_prefetch(rows + r * row_bytes + 64, 0, 3);
      }
    }
    const int64_t end = smaller(16, units - k);
#pragma GCC unroll 1
    for (int64_t i = 0; i < end; i++) {
      vf h[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) h[t] = load(packed + t * kLanes);
      packed += T * kLanes;
#pragma GCC unroll 32
      for (int r = 0; r < R; r++) {
        const vf w = splat_unit(rows + r * row_bytes);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) acc[r][t] = Dot::apply(w, h[t], acc[r][t]);
      }
      rows += 4;
    }
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < more.units; i++) {
    vf h[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) h[t] = load(packed + t * kLanes);
    packed += T * kLanes;
#pragma GCC unroll 32
    for (int r = 0; r < R; r++) {
      const vf w = splat_unit(more.data + r * more.bytes + i * 4);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) acc[r][t] = Dot::apply(w, h[t], acc[r][t]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      float* o = out + r * out_stride + t * kLanes;
      store(o, accumulate ? load(o) + acc[r][t] : acc[r][t]);
    }
}

// logits[tile][row][token] of `count` rows of weight from v0
using LogitsBlock = void (*)(const HeadChunk&, int64_t v0, int64_t count, float* logits);
static LogitsBlock logits_block_for(const HeadChunk&);  // these two pick the register tile: tiles_*.h
static int64_t tile_width_for(int64_t width);

constexpr int64_t kLowUnits = 64;  // of low_weight that are taken up behind those of weight in one sum; more are added

// logits (+)= rows of w, of so many columns, times units [first, first + units) of the packed tokens, and rows of `low`
template <class Dot, int R, int T>
static void add_product(const HeadChunk& c, const Matrix& w, int64_t columns, int64_t first, int64_t units, const Matrix* low, int64_t v0,
                        int64_t count, float* logits) {
  const bool in_place = readable_in_place(c, w, columns), low_in_place = low && readable_in_place(c, *low, c.args->r);
  const int64_t step = in_place ? units : kColumnBlock, size = element_size(c.args->dtype);
  float scratch[R * kColumnBlock], low_scratch[R * kLowUnits];
  for (int64_t r = 0; r < count; r += R) {
    const int64_t n = smaller(R, count - r);
    Rows more{};
    if (low_in_place) more = {(const char*)low->data + (v0 + r) * low->stride0 * size, low->stride0 * size, c.low_units};
    else if (low) {
      for (int64_t i = 0; i < n; i++) unpack_units(c, *low, c.args->r, v0 + r + i, 0, c.low_units, low_scratch + i * kLowUnits);
      more = {(const char*)low_scratch, kLowUnits * 4, c.low_units};
    }
    for (int64_t k = 0; k < units; k += step) {
      const int64_t length = smaller(step, units - k);
      const bool accumulate = first + k > 0;
      const char *rows = (const char*)scratch, *next = nullptr;
      int64_t row_bytes = kColumnBlock * 4;
      if (in_place) {
        row_bytes = w.stride0 * size;
        rows = (const char*)w.data + (v0 + r) * row_bytes;
        if (v0 + r + 2 * R <= c.args->V) next = rows + R * row_bytes;
      } else {
        for (int64_t i = 0; i < n; i++) unpack_units(c, w, columns, v0 + r + i, k, length, scratch + i * kColumnBlock);
      }
      const Rows last = k + length == units ? more : Rows{};
      for (int64_t p = 0; p < c.tiles; p++) {
        const float* h = c.packed + (p * c.units + first + k) * c.tile_width;
        float* out = logits + (p * kBlock + r) * c.tile_width;
        if (n == R) product_tile<Dot, R, T>(rows, row_bytes, h, length, out, c.tile_width, accumulate, p == 0 ? next : nullptr, last);
        else
          for (int64_t i = 0; i < n; i++)
            product_tile<Dot, 1, T>(rows + i * row_bytes, row_bytes, h, length, out + i * c.tile_width, c.tile_width, accumulate, nullptr, last.from(i));
      }
    }
  }
}

template <class Dot, int R, int T>
static void logits_block(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  const HeadArgs& a = *c.args;
  const int64_t units = c.units - c.low_units;
  const bool together = c.low_units && c.low_units <= kLowUnits;
  add_product<Dot, R, T>(c, a.weight, a.d, 0, units, together ? &a.low_weight : nullptr, v0, count, logits);
  if (c.low_units > kLowUnits) add_product<Dot, R, T>(c, a.low_weight, a.r, units, c.low_units, nullptr, v0, count, logits);
}

// z = softcap(logit_scale (W h + b)), in place
static void finish_logits(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  const HeadArgs& a = *c.args;
  if (!a.bias && a.logit_scale == 1.0f && a.logit_softcap == 0.0f) return;
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t r = 0; r < count; r++) {
      const float bias = a.bias ? load_element(a.bias_dtype, a.bias, (v0 + r) * a.bias_stride) : 0.0f;
      float* row = logits + (p * kBlock + r) * c.tile_width;
      for (int64_t t = 0; t < c.tile_width; t += kLanes) {
        vf z = (load(row + t) + splat(bias)) * splat(a.logit_scale);
        if (a.logit_softcap != 0.0f) z = splat(a.logit_softcap) * tanh(z / splat(a.logit_softcap));
        if (bias == -__builtin_inff()) z = splat(bias);  // a masked entry stays masked behind the cap
        store(row + t, z);
      }
    }
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
