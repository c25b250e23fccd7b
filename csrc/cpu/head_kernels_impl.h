// The kernels of the head op, written once over a vector type and compiled once per instruction set: the including
// file sets the target, includes a vec_*.h first and defines logits_block_for().  head.cpp says how they fit together.
//
// Tokens are vector lanes.  Hidden is packed transposed, so that one row of the weight needs one broadcast a number
// and no packing: the weight is streamed straight from where the caller left it, once a chunk of tokens.
// No torch, no std templates: code shared through them would carry this file's instructions to other CPUs.
#include "half.h"
#include "head_kernels.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int64_t kSlice = 512;     // units of a row that are unpacked at a time
constexpr float kQuarterLog2Floor = -30.0f;  // exp(z - max) below 2^-120 counts as 2^-120: never subnormal, code 0
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^y for y in [-126, 0]; NaN stays NaN.  Relative error below 1e-7; 2^0 is exactly 1.
G2RL_INLINE vf exp2_negative(vf y) {
  const vf n = round(y), f = y - n;
  vf p = splat(1.5353362e-4f);  // minimax on [-1/2, 1/2] with p(0) = 1: 2e-9
  p = fma(p, f, splat(1.3398875e-3f));
  p = fma(p, f, splat(9.618437e-3f));
  p = fma(p, f, splat(5.5503324e-2f));
  p = fma(p, f, splat(0.24022648f));
  p = fma(p, f, splat(0.6931472f));
  p = fma(p, f, splat(1.0f));
  return scale_by_pow2(p, n);
}

// tanh by the odd polynomial of Cephes near 0 (1 - 2 / (e^2x + 1) would cancel there)
G2RL_INLINE vf tanh(vf x) {
  const vf a = abs(x), x2 = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, x2, splat(2.06390887954e-2f));
  p = fma(p, x2, splat(-5.37397155531e-2f));
  p = fma(p, x2, splat(1.33314422036e-1f));
  p = fma(p, x2, splat(-3.33332819422e-1f));
  const vf small = fma(p * x2, x, x);
  const vf e = exp2_negative(at_least(splat(-126.0f), a * splat(-2.0f * kLog2e)));
  const vf large = (splat(1.0f) - e) / (splat(1.0f) + e);
  return less(a, splat(0.625f), small, less(x, splat(0.0f), splat(0.0f) - large, large));
}

// ---- weight and hidden of any dtype and stride -------------------------------------------------------------------

inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }

inline float load_element(DType t, const void* data, int64_t i) {
  if (t == DType::f32) return ((const float*)data)[i];
  const uint16_t h = ((const uint16_t*)data)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// Elements [begin, begin + n) of row i as floats.
static void unpack_floats(DType t, const Matrix& m, int64_t i, int64_t begin, int64_t n, float* out) {
  const int64_t offset = i * m.stride0 + begin * m.stride1;
  int64_t j = 0;
  if (m.stride1 == 1 && t == DType::f32) for (; j + kLanes <= n; j += kLanes) store(out + j, load((const float*)m.data + offset + j));
  if (m.stride1 == 1 && t == DType::bf16) for (; j + kLanes <= n; j += kLanes) store(out + j, load_bf16((const uint16_t*)m.data + offset + j));
  if (m.stride1 == 1 && t == DType::f16) for (; j + kLanes <= n; j += kLanes) store(out + j, load_f16((const uint16_t*)m.data + offset + j));
  for (; j < n; j++) out[j] = load_element(t, m.data, offset + j * m.stride1);
}

// Units [begin, begin + n) of row i, as the dot product wants them: floats, or pairs of bf16 (the last one padded with 0).
static void unpack_units(const HeadChunk& c, const Matrix& m, int64_t i, int64_t begin, int64_t n, float* out) {
  if (!c.bf16_pairs) return unpack_floats(c.args->dtype, m, i, begin, n, out);
  const uint16_t* data = (const uint16_t*)m.data + i * m.stride0;
  for (int64_t j = 0; j < n; j++) {
    const int64_t k = 2 * (begin + j);
    const uint16_t pair[2] = {data[k * m.stride1], k + 1 < c.args->d ? data[(k + 1) * m.stride1] : (uint16_t)0};
    std::memcpy(out + j, pair, 4);
  }
}

// Can a row of units be read in place?
inline bool readable_in_place(const HeadChunk& c, const Matrix& m) {
  return m.stride1 == 1 && (c.bf16_pairs ? c.args->d % 2 == 0 : c.args->dtype == DType::f32);
}

static void pack(const HeadChunk& c, int64_t panel, int64_t unit_begin, int64_t unit_end) {
  float* out = c.packed + panel * c.units * c.panel;
  float row[kSlice];
  for (int64_t k0 = unit_begin; k0 < unit_end; k0 += kSlice) {
    const int64_t n = smaller(kSlice, unit_end - k0);
    for (int64_t t = 0; t < c.panel; t++) {
      const int64_t token = panel * c.panel + t;
      if (token < c.tokens) unpack_units(c, c.args->hidden, c.first_token + token, k0, n, row);
      else std::memset(row, 0, sizeof(float) * n);
      for (int64_t k = 0; k < n; k++) std::memcpy(out + (k0 + k) * c.panel + t, row + k, 4);
    }
  }
}

// ---- logits ------------------------------------------------------------------------------------------------------

struct DotFloat {
  G2RL_INLINE vf apply(vf w, vf h, vf acc) { return fma(w, h, acc); }
};
#ifdef G2RL_HAS_BF16_DOT
struct DotBf16 {
  G2RL_INLINE vf apply(vf w, vf h, vf acc) { return dot_bf16(w, h, acc); }
};
#endif

// out[r, t] (+)= rows[r, :] . packed[:, t] for R rows and T vectors of tokens, all sums in registers.
// `next` are the rows that follow: fetched into L2 meanwhile, a cache line a row for each line consumed; the row's own
// next line is fetched into L1.  Together they take the product from 0.85 to 0.95 of the CPU's peak.
template <class Dot, int R, int T>
static __attribute__((noinline)) void logits_tile(const char* rows, int64_t row_bytes, const float* packed, int64_t units, float* out,
                                                   bool accumulate, const char* next) {
  vf acc[R][T];
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[r][t] = accumulate ? load(out + (r * T + t) * kLanes) : splat(0.0f);
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
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) store(out + (r * T + t) * kLanes, acc[r][t]);
}

// logits[panel][row][token] of `count` rows of weight from v0
using LogitsBlock = void (*)(const HeadChunk&, int64_t v0, int64_t count, float* logits);
static LogitsBlock logits_block_for(const HeadChunk&);  // the including file picks the register tile

template <class Dot, int R, int T>
static void logits_block(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  const Matrix& w = c.args->weight;
  const bool in_place = readable_in_place(c, w);
  const int64_t slice = in_place ? c.units : kSlice;
  float scratch[R * kSlice];
  for (int64_t r = 0; r < count; r += R) {
    const int64_t n = smaller(R, count - r);
    for (int64_t k = 0; k < c.units; k += slice) {
      const int64_t length = smaller(slice, c.units - k);
      const char *rows = (const char*)scratch, *next = nullptr;
      int64_t row_bytes = kSlice * 4;
      if (in_place) {
        row_bytes = w.stride0 * element_size(c.args->dtype);
        rows = (const char*)w.data + (v0 + r) * row_bytes;
        if (v0 + r + 2 * R <= c.args->V) next = rows + R * row_bytes;
      } else {
        for (int64_t i = 0; i < n; i++) unpack_units(c, w, v0 + r + i, k, length, scratch + i * kSlice);
      }
      for (int64_t p = 0; p < c.panels; p++) {
        const float* h = c.packed + (p * c.units + k) * c.panel;
        float* out = logits + (p * kBlock + r) * c.panel;
        if (n == R) logits_tile<Dot, R, T>(rows, row_bytes, h, length, out, k > 0, p == 0 ? next : nullptr);
        else
          for (int64_t i = 0; i < n; i++) logits_tile<Dot, 1, T>(rows + i * row_bytes, row_bytes, h, length, out + i * c.panel, k > 0, nullptr);
      }
    }
  }
}

// ---- softmax of a block ------------------------------------------------------------------------------------------

// z = softcap(logit_scale (W h + b)), in place
static void finish_logits(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  const HeadArgs& a = *c.args;
  if (!a.bias && a.logit_scale == 1.0f && a.logit_softcap == 0.0f) return;
  for (int64_t p = 0; p < c.panels; p++)
    for (int64_t r = 0; r < count; r++) {
      const float bias = a.bias ? load_element(a.bias_dtype, a.bias, (v0 + r) * a.bias_stride) : 0.0f;
      float* row = logits + (p * kBlock + r) * c.panel;
      for (int64_t t = 0; t < c.panel; t += kLanes) {
        vf z = (load(row + t) + splat(bias)) * splat(a.logit_scale);
        if (a.logit_softcap != 0.0f) z = splat(a.logit_softcap) * tanh(z / splat(a.logit_softcap));
        store(row + t, z);
      }
    }
}

// The target's logit leaves its block: kept in full precision, it is merged last (head.cpp), so that 1 - p(target) is
// a sum of the others and never a difference.
static void take_targets(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    if (r < 0 || r >= count) continue;
    float* z = logits + ((t / c.panel) * kBlock + r) * c.panel + t % c.panel;
    c.target_logit[t] = *z;
    *z = -__builtin_inff();
  }
}

// Codes.  With e = exp((z - block max) / temperature) in (0, 1] we store the 16-bit number round(65535 e^(1/4)): e keeps a
// relative error of at most 3e-5 e^(-1/4) down to 1e-15, no worse than 1e-5 e^(3/4) absolutely, and the largest of the
// block is exact.  float16 would be ten times coarser.  Under a softcap the code holds e times the cap's derivative.
static void softmax_block(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  const HeadArgs& a = *c.args;
  const vf quarter = splat(0.25f * kLog2e / a.temperature), cap = splat(a.logit_softcap == 0.0f ? 0.0f : 1.0f / a.logit_softcap);
  const int64_t width = c.panels * c.panel;
  for (int64_t p = 0; p < c.panels; p++) {
    for (int64_t t = 0; t < c.panel; t += kLanes) {
      const float* z = logits + p * kBlock * c.panel + t;
      uint16_t* code = c.codes ? c.codes + (block * c.panels + p) * kBlock * c.panel + t : nullptr;
      vf max = splat(-__builtin_inff());
      for (int64_t r = 0; r < count; r++) max = at_least(load(z + r * c.panel), max);  // a NaN logit is met again below
      const vf base = less(splat(-__builtin_inff()), max, max, splat(0.0f));           // every logit -inf: any finite base
      vf total = splat(0.0f), moment = splat(0.0f);
      for (int64_t r = 0; r < count; r++) {
        const vf x = load(z + r * c.panel);
        const vf y = at_least(splat(kQuarterLog2Floor), (x - base) * quarter);
        vf root = exp2_negative(y);
        const vf square = root * root, e = square * square;
        total += e;
        moment = fma(e, y, moment);
        if (a.logit_softcap != 0.0f) root *= sqrt(sqrt(at_least(splat(0.0f), splat(1.0f) - (x * cap) * (x * cap))));
        if (code) store_code(code + r * c.panel, root * splat(kCodeMax));
      }
      const int64_t at = block * width + p * c.panel + t;
      store(c.block_max + at, max);
      store(c.block_sum + at, total);
      store(c.block_moment + at, moment);
    }
  }
}

static void forward(const HeadChunk& c, int64_t block) {
  alignas(64) float logits[kBlock * kMaxWidth];
  const int64_t v0 = c.span_begin + block * kBlock, count = smaller(kBlock, c.span_end - v0);
  logits_block_for(c)(c, v0, count, logits);
  finish_logits(c, v0, count, logits);
  take_targets(c, v0, count, logits);
  softmax_block(c, block, count, logits);
}

// ---- after the vocabulary ----------------------------------------------------------------------------------------

// The span's blocks into the running statistics, one after the other: the same bits whoever computed them.
// sum is compensated (Neumaier would do; Kahan suffices for terms >= 0), moment is in quarter log2, relative to max.
static void merge(const HeadChunk& c, float* max, float* sum, float* compensation, float* moment) {
  const int64_t blocks = (c.span_end - c.span_begin + kBlock - 1) / kBlock, width = c.panels * c.panel;
  const vf quarter = splat(0.25f * kLog2e / c.args->temperature), none = splat(-__builtin_inff());
  for (int64_t t = 0; t < width; t += kLanes) {
    const vf old = load(max + t);
    vf top = old;
    for (int64_t b = 0; b < blocks; b++) top = at_least(top, load(c.block_max + b * width + t));
    const vf base = less(none, top, top, splat(0.0f));
    vf total = splat(0.0f), lost = splat(0.0f), mom = splat(0.0f);
    for (int64_t b = -1; b < blocks; b++) {
      const bool first = b < 0;
      const vf shift = at_least(splat(kQuarterLog2Floor), ((first ? old : load(c.block_max + b * width + t)) - base) * quarter);
      const vf root = exp2_negative(shift), square = root * root, weight = square * square;
      const vf s = first ? load(sum + t) - load(compensation + t) : load(c.block_sum + b * width + t);
      const vf term = weight * s - lost, next = total + term;
      lost = (next - total) - term;
      total = next;
      mom = fma(weight, fma(s, shift, first ? load(moment + t) : load(c.block_moment + b * width + t)), mom);
    }
    store(max + t, top);
    store(sum + t, total);
    store(compensation + t, lost);
    store(moment + t, mom);
  }
}

static void collect(const HeadChunk& c, int64_t block) {
  const int64_t v0 = block * kBlock, span = c.span_end - c.span_begin, count = smaller(kBlock, span - v0), width = c.panels * c.panel;
  const vf quarter = splat(0.25f * kLog2e / c.args->temperature), decode = splat(1.0f / kCodeMax);
  const uint16_t* codes = c.codes + block * c.panels * kBlock * c.panel;
  alignas(64) float weight[kMaxWidth];
  for (int64_t s = 0; s < c.segment_count; s++) {
    const Segment& segment = c.segments[s];
    const int64_t begin = segment.begin / kLanes * kLanes;
    for (int64_t t = begin; t < segment.end; t += kLanes) {  // exp(block max - max), then only the segment's own lanes
      const vf shift = at_least(splat(kQuarterLog2Floor), (load(c.block_max + block * width + t) - load(c.max + t)) * quarter);
      const vf root = exp2_negative(shift), square = root * root;
      store(weight + t, square * square * load(c.weight + t));
      for (int64_t i = t; i < t + kLanes; i++)
        if (i < segment.begin || i >= segment.end) weight[i] = 0.0f;
    }
    float* out = c.residual + segment.row * span + v0;
    for (int64_t r = 0; r < count; r++) {
      vf acc = splat(0.0f);
      for (int64_t t = begin; t < segment.end; t += kLanes) {
        const vf root = load_code(codes + (t / c.panel * kBlock + r) * c.panel + t % c.panel) * decode, square = root * root;
        acc = fma(load(weight + t), square * square, acc);
      }
      out[r] = (segment.fresh ? 0.0f : out[r]) - sum(acc);
    }
  }
}

// Four rows of weight at a time against every row of A: the weight is read once, whatever the number of responses.
static void project(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  const HeadArgs& a = *c.args;
  const Matrix& w = a.weight;
  const int64_t span = c.span_end - c.span_begin, d = a.d;
  const bool in_place = a.dtype == DType::f32 && w.stride1 == 1;
  float scratch[4][kSlice];
  std::memset(out, 0, sizeof(float) * row_count * d);
  for (int64_t v = begin; v < end; v += 4) {
    const int64_t n = smaller(4, end - v);
    for (int64_t k0 = 0; k0 < d; k0 += kSlice) {
      const int64_t length = smaller(kSlice, d - k0);
      const float* line[4];
      for (int64_t i = 0; i < n; i++) {
        line[i] = in_place ? (const float*)w.data + (v + i) * w.stride0 + k0 : scratch[i];
        if (!in_place) unpack_floats(a.dtype, w, v + i, k0, length, scratch[i]);
        if (v + i + 8 < end && w.stride1 == 1)
          for (int64_t k = 0; k < length; k += 64 / element_size(a.dtype))
            __builtin_prefetch((const char*)w.data + ((v + i + 8) * w.stride0 + k0 + k) * element_size(a.dtype), 0, 2);
      }
      for (int64_t j = 0; j < row_count; j++) {
        const float* f = c.residual + rows[j] * span + (v - c.span_begin);
        float* o = out + j * d + k0;
        int64_t k = 0;
        if (n == 4) {
          const vf f0 = splat(f[0]), f1 = splat(f[1]), f2 = splat(f[2]), f3 = splat(f[3]);
          for (; k + kLanes <= length; k += kLanes) {
            vf x = fma(f0, load(line[0] + k), load(o + k));
            x = fma(f1, load(line[1] + k), x);
            x = fma(f2, load(line[2] + k), x);
            store(o + k, fma(f3, load(line[3] + k), x));
          }
        }
        for (; k < length; k++)
          for (int64_t i = 0; i < n; i++) o[k] += f[i] * line[i][k];
      }
    }
  }
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
