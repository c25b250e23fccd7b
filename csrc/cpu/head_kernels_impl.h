// The kernels of the head op, written once over a vector type and compiled once per instruction set: the including
// file sets the target, includes a vec_*.h first and defines the register tiles.  head.cpp says how they fit together.
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
constexpr float kCodeMax = 65535.0f;
constexpr int64_t kSlice = 256;     // numbers of a row that are unpacked at a time: the rows in work stay in L1
constexpr float kQuarterLog2Floor = -30.0f;  // exp(z - max) below 2^-120 counts as 2^-120: never subnormal, code 0
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// one * 2^y for y in [-100, 0]; NaN stays NaN.  Relative error below 1e-7; y = 0 gives `one` itself.
G2RL_INLINE vf exp2_negative(vf y, float one = 1.0f) {
  const vf n = round(y), f = y - n;
  vf p = splat(one * 1.5353362e-4f);  // minimax on [-1/2, 1/2] with p(0) = 1: 2e-9
  p = fma(p, f, splat(one * 1.3398875e-3f));
  p = fma(p, f, splat(one * 9.618437e-3f));
  p = fma(p, f, splat(one * 5.5503324e-2f));
  p = fma(p, f, splat(one * 0.24022648f));
  p = fma(p, f, splat(one * 0.6931472f));
  p = fma(p, f, splat(one));
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
  const vf e = exp2_negative(at_least(splat(-100.0f), a * splat(-2.0f * kLog2e)));
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

// As many of n contiguous numbers as fill whole vectors; returns how many that were.
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
    j = (t == DType::f32 ? unpack_vectors<LoadFloat> : t == DType::bf16 ? unpack_vectors<LoadBf16> : unpack_vectors<LoadF16>)(m.data, offset, n, out);
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

// out[r, t] (+)= rows[r, :] . packed[:, t] for R rows and T vectors (of tokens, or other columns), all sums in registers.
// `next` are the rows that follow: fetched into L2 meanwhile, a cache line a row for each line consumed; the row's own
// next line is fetched into L1.  Together they take the product from 0.85 to 0.95 of the CPU's peak.
template <class Dot, int R, int T>
static __attribute__((noinline)) void product_tile(const char* rows, int64_t row_bytes, const float* packed, int64_t units, float* out,
                                                   int64_t out_stride, bool accumulate, const char* next) {
  vf acc[R][T];
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[r][t] = accumulate ? load(out + r * out_stride + t * kLanes) : splat(0.0f);
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
    for (int t = 0; t < T; t++) store(out + r * out_stride + t * kLanes, acc[r][t]);
}

// logits[panel][row][token] of `count` rows of weight from v0
using LogitsBlock = void (*)(const HeadChunk&, int64_t v0, int64_t count, float* logits);
static LogitsBlock logits_block_for(const HeadChunk&);  // these two pick the register tile: the including file
static int64_t panel_for(int64_t width);

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
        if (n == R) product_tile<Dot, R, T>(rows, row_bytes, h, length, out, c.panel, k > 0, p == 0 ? next : nullptr);
        else
          for (int64_t i = 0; i < n; i++) product_tile<Dot, 1, T>(rows + i * row_bytes, row_bytes, h, length, out + i * c.panel, c.panel, k > 0, nullptr);
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
        if (bias == -__builtin_inff()) z = splat(bias);  // a masked entry stays masked behind the cap
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

// Codes.  With e = exp((z - block max) / temperature) in (0, 1] we store the 16-bit number round(65535 e^(1/4)).  The fourth
// root spreads the numbers: e keeps a relative error of at most 3e-5 e^(-1/4), absolutely 3e-5 e^(3/4), and the largest of
// the block is exact; float16 would be ten times coarser.  Under a softcap the code holds e times the cap's derivative.
//
// One block of one panel, U vectors of tokens at a time for instruction-level parallelism; what varies by call is a
// template argument, to keep the common loop free of branches.
template <int U, bool kCapped, bool kKeep>
static void softmax_columns(const HeadChunk& c, int64_t count, const float* z, uint16_t* code, float* block_max, float* block_sum,
                            float* block_moment) {
  const vf quarter = splat(0.25f * kLog2e / c.args->temperature), floor = splat(kQuarterLog2Floor), one = splat(1.0f);
  const vf uncap = splat(kCapped ? 1.0f / c.args->logit_softcap : 0.0f);
  vf max[U], base[U], total[U], moment[U];
  for (int u = 0; u < U; u++) max[u] = splat(-__builtin_inff()), total[u] = moment[u] = splat(0.0f);
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) max[u] = at_least(load(z + r * c.panel + u * kLanes), max[u]);  // drops NaN: met again below
  for (int u = 0; u < U; u++) base[u] = less(splat(-__builtin_inff()), max[u], max[u], splat(0.0f));  // all -inf: any finite base
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const vf x = load(z + r * c.panel + u * kLanes), y = at_least(floor, (x - base[u]) * quarter);
      vf root = exp2_negative(y, kCodeMax);
      const vf square = root * root, e = square * square;  // kCodeMax^4 too large until the sums are stored
      total[u] += e;
      moment[u] = fma(e, y, moment[u]);
      if (kCapped) root *= sqrt(sqrt(at_least(splat(0.0f), one - (x * uncap) * (x * uncap))));
      if (kKeep) store_code(code + r * c.panel + u * kLanes, root);
    }
  const vf unscale = splat(1.0f / kCodeMax) * splat(1.0f / kCodeMax);
  for (int u = 0; u < U; u++) {
    store(block_max + u * kLanes, max[u]);
    store(block_sum + u * kLanes, total[u] * unscale * unscale);
    store(block_moment + u * kLanes, moment[u] * unscale * unscale);
  }
}

template <int U, bool kCapped, bool kKeep>
static void softmax_panels(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  for (int64_t p = 0; p < c.panels; p++)
    for (int64_t t = 0; t < c.panel; t += U * kLanes) {
      const int64_t at = (block * c.panels + p) * c.panel + t;
      uint16_t* code = kKeep ? c.codes + (block * c.panels + p) * kBlock * c.panel + t : nullptr;
      softmax_columns<U, kCapped, kKeep>(c, count, logits + p * kBlock * c.panel + t, code, c.block_max + at, c.block_sum + at,
                                         c.block_moment + at);
    }
}

template <bool kCapped, bool kKeep>
static void softmax_block(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  const int64_t vectors = c.panel / kLanes;
  if (vectors % 4 == 0) softmax_panels<4, kCapped, kKeep>(c, block, count, logits);
  else if (vectors % 3 == 0) softmax_panels<3, kCapped, kKeep>(c, block, count, logits);
  else if (vectors % 2 == 0) softmax_panels<2, kCapped, kKeep>(c, block, count, logits);
  else softmax_panels<1, kCapped, kKeep>(c, block, count, logits);
}

static void forward(const HeadChunk& c, int64_t block) {
  alignas(64) float logits[kBlock * kMaxWidth];
  const int64_t v0 = c.span_begin + block * kBlock, count = smaller(kBlock, c.span_end - v0);
  logits_block_for(c)(c, v0, count, logits);
  finish_logits(c, v0, count, logits);
  take_targets(c, v0, count, logits);
  const bool capped = c.args->logit_softcap != 0.0f;
  if (c.codes) (capped ? softmax_block<true, true> : softmax_block<false, true>)(c, block, count, logits);
  else (capped ? softmax_block<true, false> : softmax_block<false, false>)(c, block, count, logits);
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

// weight_t e_t summed over the vectors [first, last) of one row of codes, lane by lane.  Times kCodeMax^4: undone where the
// lanes are added up.
G2RL_INLINE vf decode_row(const uint16_t* codes, int64_t first, int64_t last, const float* weight) {
  vf acc = splat(0.0f);
  for (int64_t t = first; t < last; t += kLanes) {
    const vf root = load_code(codes + t), square = root * root;
    acc = fma(load(weight + t), square * square, acc);
  }
  return acc;
}

static void collect(const HeadChunk& c, int64_t block) {
  const int64_t v0 = block * kBlock, span = c.span_end - c.span_begin, count = smaller(kBlock, span - v0);
  const vf quarter = splat(0.25f * kLog2e / c.args->temperature), unscale = splat(1.0f / kCodeMax / kCodeMax / kCodeMax / kCodeMax);
  alignas(64) float weight[kMaxWidth];
  for (int64_t s = 0; s < c.segment_count; s++) {
    const Segment& segment = c.segments[s];
    float* out = c.residual + segment.row * span + v0;
    if (segment.fresh)
      for (int64_t r = 0; r < count; r++) out[r] = 0.0f;
    for (int64_t p = segment.begin / c.panel; p * c.panel < segment.end; p++) {
      const int64_t begin = p * c.panel < segment.begin ? segment.begin - p * c.panel : 0;  // columns of this panel
      const int64_t end = smaller(segment.end - p * c.panel, c.panel), first = begin / kLanes * kLanes;
      for (int64_t t = first; t < end; t += kLanes) {  // exp(block max - max), then only the segment's own lanes
        const int64_t token = p * c.panel + t;
        const vf shift = (load(c.block_max + block * c.panels * c.panel + token) - load(c.max + token)) * quarter;
        const vf root = exp2_negative(at_least(splat(kQuarterLog2Floor), shift)), square = root * root;
        store(weight + t, square * square * load(c.weight + token));
        for (int64_t i = t; i < t + kLanes; i++)
          if (i < begin || i >= end) weight[i] = 0.0f;
      }
      const uint16_t* codes = c.codes + (block * c.panels + p) * kBlock * c.panel;
      int64_t r = 0;
      for (; r + kLanes <= count; r += kLanes) {  // the lanes of several rows are added up together, in fewer steps
        vf row[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) row[i] = decode_row(codes + (r + i) * c.panel, first, end, weight);
        store(out + r, load(out + r) - sums(row) * unscale);
      }
      for (; r < count; r++) out[r] -= sum(decode_row(codes + r * c.panel, first, end, weight) * unscale);
    }
  }
}

// out[j, :] += sum_i factor[j][i] line[i][:] for J rows of A and L rows of weight
template <class Load, int J, int L>
static void add_lines(const float* const factor[J], const char* lines, int64_t line_bytes, int64_t length, float* out, int64_t out_stride) {
  vf f[J][L];
  for (int j = 0; j < J; j++)
    for (int i = 0; i < L; i++) f[j][i] = splat(factor[j][i]);
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    vf x[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) x[j] = load(out + j * out_stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < L; i++) {
      const vf w = Load::vector(lines + i * line_bytes + k * Load::size);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) x[j] = fma(f[j][i], w, x[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) store(out + j * out_stride + k, x[j]);
  }
  for (; k < length; k++)
    for (int j = 0; j < J; j++)
      for (int i = 0; i < L; i++) out[j * out_stride + k] += factor[j][i] * Load::scalar(lines + i * line_bytes + k * Load::size);
}

// L rows of weight, once, against every row of A
template <class Load, int L>
static void add_to_rows(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t v, const char* lines, int64_t line_bytes,
                        int64_t length, float* out) {
  const int64_t span = c.span_end - c.span_begin, stride = row_stride(c.args->d);
  int64_t j = 0;
  for (; j + 4 <= row_count; j += 4) {
    const float* factor[4];
    for (int q = 0; q < 4; q++) factor[q] = c.residual + rows[j + q] * span + (v - c.span_begin);
    add_lines<Load, 4, L>(factor, lines, line_bytes, length, out + j * stride, stride);
  }
  for (; j < row_count; j++) {
    const float* factor[1] = {c.residual + rows[j] * span + (v - c.span_begin)};
    add_lines<Load, 1, L>(factor, lines, line_bytes, length, out + j * stride, stride);
  }
}

// The weight is read once, whatever the number of responses: a few rows and a slice of columns at a time, which stay in
// L1 with their part of `out`; the rows are fetched three groups ahead.
template <class Load>
static void project_as(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  constexpr int kLines = 6;
  constexpr int64_t kColumns = 128, kAhead = 3 * kLines;
  const HeadArgs& a = *c.args;
  const Matrix& w = a.weight;
  const bool in_place = w.stride1 == 1 && Load::size == element_size(a.dtype);
  float scratch[kLines * kColumns];
  for (int64_t v = begin; v < end; v += kLines) {
    const int64_t n = smaller(kLines, end - v);
    for (int64_t k = 0; k < a.d; k += kColumns) {
      const int64_t length = smaller(kColumns, a.d - k);
      const char* lines = (const char*)scratch;
      int64_t line_bytes = kColumns * 4;
      if (in_place) {
        line_bytes = w.stride0 * Load::size;
        lines = (const char*)w.data + v * line_bytes + k * Load::size;
        for (int64_t i = 0; i < n && v + i + kAhead < end; i++)
          for (int64_t x = 0; x < length * Load::size; x += 64) __builtin_prefetch(lines + (i + kAhead) * line_bytes + x, 0, 2);
      } else {
        for (int64_t i = 0; i < n; i++) unpack_floats(a.dtype, w, v + i, k, length, scratch + i * kColumns);
      }
      if (n == kLines) add_to_rows<Load, kLines>(c, rows, row_count, v, lines, line_bytes, length, out + k);
      else
        for (int64_t i = 0; i < n; i++) add_to_rows<Load, 1>(c, rows, row_count, v + i, lines + i * line_bytes, line_bytes, length, out + k);
    }
  }
}

static void project(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  std::memset(out, 0, sizeof(float) * row_count * row_stride(c.args->d));
  const DType dtype = c.args->weight.stride1 == 1 ? c.args->dtype : DType::f32;  // strided rows are unpacked to floats
  if (dtype == DType::bf16) project_as<LoadBf16>(c, rows, row_count, begin, end, out);
  else if (dtype == DType::f16) project_as<LoadF16>(c, rows, row_count, begin, end, out);
  else project_as<LoadFloat>(c, rows, row_count, begin, end, out);
}

// ---- gradients (logprobs.cpp) ------------------------------------------------------------------------------------

// One number of dz or of a packed operand: a float, or where products take bf16 pairs, half of one.
template <bool kPairs>
G2RL_INLINE void store_factor(char* p, vf x) {
#ifdef G2RL_HAS_BF16_DOT
  if (kPairs) return store_bf16((uint16_t*)p, x);
#endif
  store((float*)p, x);
}

// logits -> dz, in place, then the realised tokens' own term
template <bool kCapped>
static void differentiate(const GradientBlock& g, int64_t count, float* logits) {
  const HeadChunk& c = *g.chunk;
  const vf per_temperature = splat(1.0f / c.args->temperature), log2e = splat(kLog2e), ln2 = splat(0.6931471805599453f);
  const vf least = splat(-100.0f), zero = splat(0.0f), one = splat(1.0f), factor = splat(-g.factor);
  const float uncap = kCapped ? 1.0f / c.args->logit_softcap : 0.0f;
  for (int64_t p = 0; p < c.panels; p++)
    for (int64_t t = 0; t < c.panel; t += kLanes) {
      const int64_t token = p * c.panel + t;
      const vf top = load(g.top + token), log_total = load(g.log_total + token);
      const vf a = load(g.a + token) * factor, e = load(g.e + token) * factor * ln2;
      float* column = logits + p * kBlock * c.panel + t;
      for (int64_t r = 0; r < count; r++) {
        const vf z = load(column + r * c.panel);
        const vf x = ((z * per_temperature - top) - log_total) * log2e;  // log2 p
        const vf y = at_least(least, x), prob = less(x, least, zero, exp2_negative(y));
        vf dz = prob * fma(e, y, a);
        if (kCapped) dz *= at_least(zero, one - (z * splat(uncap)) * (z * splat(uncap)));
        store(column + r * c.panel, dz);
      }
    }
}

static void add_realised(const GradientBlock& g, int64_t v0, int64_t count, float* logits, const float* slope) {
  const HeadChunk& c = *g.chunk;
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    if (r >= 0 && r < count) logits[((t / c.panel) * kBlock + r) * c.panel + t % c.panel] = g.own[t] * g.factor * slope[t];
  }
}

// The softcap's slope at the realised tokens' logits, before they are overwritten
static void slopes(const GradientBlock& g, int64_t v0, int64_t count, const float* logits, float* slope) {
  const HeadChunk& c = *g.chunk;
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    slope[t] = 1.0f;
    if (c.args->logit_softcap == 0.0f || r < 0 || r >= count) continue;
    const float capped = logits[((t / c.panel) * kBlock + r) * c.panel + t % c.panel] / c.args->logit_softcap;
    slope[t] = capped * capped < 1.0f ? 1.0f - capped * capped : capped == capped ? 0.0f : capped;
  }
}

// dz by vocabulary entry and by token; zeros beyond `count`, up to whole vectors
template <bool kPairs>
static void store_gradient(const GradientBlock& g, int64_t count, const float* logits) {
  const HeadChunk& c = *g.chunk;
  constexpr int64_t size = kPairs ? 2 : 4;
  for (int64_t p = 0; p < c.panels; p++)
    for (int64_t t = 0; t < c.panel; t += kLanes)
      for (int64_t r = 0; r < count; r += kLanes) {
        vf x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
          x[i] = r + i < count ? load(logits + (p * kBlock + r + i) * c.panel + t) : splat(0.0f);
          store_factor<kPairs>(g.by_entry + (r + i) * g.entry_bytes + (p * c.panel + t) * size, x[i]);
        }
        if (!g.by_token) continue;
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store_factor<kPairs>(g.by_token + (p * c.panel + t + i) * g.token_bytes + r * size, x[i]);
      }
}

static void gradient(const GradientBlock& g, int64_t v0, int64_t count) {
  const HeadChunk& c = *g.chunk;
  alignas(64) float logits[kBlock * kMaxWidth], slope[kMaxWidth];
  logits_block_for(c)(c, v0, count, logits);
  finish_logits(c, v0, count, logits);
  slopes(g, v0, count, logits, slope);
  (c.args->logit_softcap != 0.0f ? differentiate<true> : differentiate<false>)(g, count, logits);
  add_realised(g, v0, count, logits, slope);
  if (g.sum_entries)
    for (int64_t r = 0; r < count; r++) {
      vf total = splat(0.0f);
      for (int64_t p = 0; p < c.panels; p++)
        for (int64_t t = 0; t < c.panel; t += kLanes) total += load(logits + (p * kBlock + r) * c.panel + t);
      g.sum_entries[r] = sum(total);
    }
  (c.bf16_pairs ? store_gradient<true> : store_gradient<false>)(g, count, logits);
}

// Two rows of 16-bit numbers, side by side in pairs
static void interleave(const uint16_t* first, const uint16_t* second, int64_t n, uint16_t* out) {
  for (int64_t j = 0; j < n; j++) out[2 * j] = first[j], out[2 * j + 1] = second[j];
}

// Rows [row, row + count) of a matrix as the packed operand of a product over them: [units][kColumns] for each slice of its
// columns, slices slice_stride floats apart. A unit is a row, or a pair of them; zeros beyond the edges.
static void pack_rows(const HeadChunk& c, const Matrix& m, int64_t row, int64_t count, float* out, int64_t slice_stride) {
  const int64_t d = c.args->d, columns = panel_for(kMaxWidth), step = c.bf16_pairs ? 2 : 1;
  for (int64_t i = 0; i < count; i += step)
    for (int64_t k = 0; k < d; k += columns) {
      const int64_t n = smaller(columns, d - k);
      float* unit = out + k / columns * slice_stride + i / step * columns;
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
      for (int64_t j = n; j < columns; j++) unit[j] = 0.0f;
    }
}

// out[r, :] (+)= rows[r, :] . packed for `count` rows and one slice of columns. Rows are readable up to whole tiles.
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

static void product(const HeadChunk& c, const char* rows, int64_t row_bytes, int64_t count, const float* packed, int64_t units,
                    float* out, int64_t out_stride, int64_t columns, bool accumulate) {
  constexpr int T = kLanes == 16 ? 4 : 2;
#ifdef G2RL_HAS_BF16_DOT
  if (c.bf16_pairs) return product_rows<DotBf16, kProductRows, T>(rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
#endif
  product_rows<DotFloat, kProductRows, T>(rows, row_bytes, count, packed, units, out, out_stride, columns, accumulate);
}

static void round_to(DType dtype, const float* x, int64_t n, void* out) {
  if (dtype == DType::f32) std::memcpy(out, x, sizeof(float) * n);
  else if (dtype == DType::bf16)
    for (int64_t j = 0; j < n; j++) ((uint16_t*)out)[j] = float_to_bf16(x[j]);
  else
    for (int64_t j = 0; j < n; j++) ((uint16_t*)out)[j] = float_to_f16(x[j]);
}

#ifdef G2RL_HAS_BF16_DOT
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif
constexpr HeadKernels kKernels = {kBf16Dot, panel_for, pack, forward, merge, collect, project, gradient, pack_rows, product, round_to};

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
