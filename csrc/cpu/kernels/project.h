// After the softmax: codes to rows of the residual matrix A, and A times the weight.
#pragma once
#include "softmax.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

// weight_t e_t kCodeMax^4 summed over the vectors of `tokens` numbers of one row of codes, lane by lane.  The caller divides
// by kCodeMax^4 as it adds up the lanes.
G2RL_INLINE vf decode_row(const uint16_t* codes, int64_t tokens, const float* weight) {
  vf acc = splat(0.0f);
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const vf root = load_code(codes + t), square = root * root;
    acc = fma(load(weight + t), square * square, acc);
  }
  return acc;
}

// Tokens are added 16 at a time (8 without vectors), whatever the width of tiles, and the realised tokens' own terms behind theirs: a response
// has the same sums in any chunk.
static void collect(const HeadChunk& c, int64_t block) {
  constexpr int64_t kGroup = kLanes < 8 ? 2 * kLanes : 16;  // divides every tile
  const int64_t v0 = block * kBlock, slab = c.slab_end - c.slab_begin, count = smaller(kBlock, slab - v0);
  const vf unscale = splat(1.0f / kCodeMax / kCodeMax / kCodeMax / kCodeMax);
  alignas(64) float weight[kGroup];
  for (int64_t s = 0; s < c.response_count; s++) {
    const ResponseTokens& response = c.responses[s];
    float* out = c.residual + response.row * slab + v0;
    if (response.fresh)
      for (int64_t r = 0; r < count; r++) out[r] = 0.0f;
    for (int64_t g = response.begin / kGroup * kGroup; g < response.end; g += kGroup) {
      for (int64_t t = 0; t < kGroup; t += kLanes) {  // exp(block max - max) in the response's own lanes, 0 in others
        const vf shift = (load(c.block_max + block * c.tiles * c.tile_width + g + t) - load(c.max + g + t)) * to_quarter_log2(c.temperature + g + t);
        const vf root = exp2_negative(at_least(splat(kQuarterLog2Floor), shift)), square = root * root;
        store(weight + t, square * square * load(c.weight + g + t));
        for (int64_t i = t; i < t + kLanes; i++)
          if (g + i < response.begin || g + i >= response.end) weight[i] = 0.0f;
      }
      const uint16_t* codes = c.codes + (block * c.tiles + g / c.tile_width) * kBlock * c.tile_width + g % c.tile_width;
      int64_t r = 0;
      for (; r + kLanes <= count; r += kLanes) {  // the lanes of several rows are added up together, in fewer steps
        vf row[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) row[i] = decode_row(codes + (r + i) * c.tile_width, kGroup, weight);
        store(out + r, load(out + r) - sums(row) * unscale);
      }
      for (; r < count; r++) out[r] -= sum(decode_row(codes + r * c.tile_width, kGroup, weight) * unscale);
      for (int64_t t = g < response.begin ? response.begin : g; t < smaller(g + kGroup, response.end); t++) {
        const int64_t at = c.args->tokens[c.first_token + t] - c.slab_begin - v0;
        if (at >= 0 && at < count) out[at] += c.target_residual[t];
      }
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

// Adds L rows of weight, read once, to the outputs of every row of A
template <class Load, int L>
static void add_to_rows(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t v, const char* lines, int64_t line_bytes,
                        int64_t length, float* out) {
  const int64_t slab = c.slab_end - c.slab_begin, stride = row_stride(c.args->d + c.args->r);
  int64_t j = 0;
  for (; j + 4 <= row_count; j += 4) {
    const float* factor[4];
    for (int q = 0; q < 4; q++) factor[q] = c.residual + rows[j + q] * slab + (v - c.slab_begin);
    add_lines<Load, 4, L>(factor, lines, line_bytes, length, out + j * stride, stride);
  }
  for (; j < row_count; j++) {
    const float* factor[1] = {c.residual + rows[j] * slab + (v - c.slab_begin)};
    add_lines<Load, 1, L>(factor, lines, line_bytes, length, out + j * stride, stride);
  }
}

// Reads the weight once for any number of responses: a few rows and a block of columns at a time, which stay in L1 with
// their share of `out`.  From memory, rows are prefetched kAhead rows ahead.  A block that forward() left in L2 (kCached) is
// taken column by column, so that `out` stays in L1.  Sums have one order either way.
template <class Load, bool kCached>
static void project_as(const HeadChunk& c, const Matrix& w, int64_t columns, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  constexpr int kLines = 6;
  constexpr int64_t kColumns = 128, kAhead = kCached ? kLines : 3 * kLines;
  const DType dtype = c.args->dtype;
  const bool in_place = w.stride1 == 1 && Load::size == element_size(dtype);
  float scratch[kLines * kColumns];
  const int64_t all_rows = kCached ? end - begin : kLines;
  for (int64_t first = begin; first < end; first += all_rows)
    for (int64_t k = 0; k < columns; k += kColumns)
      for (int64_t v = first; v < smaller(first + all_rows, end); v += kLines) {
        const int64_t n = smaller(kLines, end - v), length = smaller(kColumns, columns - k);
        const char* lines = (const char*)scratch;
        int64_t line_bytes = kColumns * 4;
        if (in_place) {
          line_bytes = w.stride0 * Load::size;
          lines = (const char*)w.data + v * line_bytes + k * Load::size;
          for (int64_t i = 0; i < n && v + i + kAhead < end; i++)
            for (int64_t x = 0; x < length * Load::size; x += 64) __builtin_prefetch(lines + (i + kAhead) * line_bytes + x, 0, kCached ? 3 : 2);
        } else {
          for (int64_t i = 0; i < n; i++) unpack_floats(dtype, w, v + i, k, length, scratch + i * kColumns);
        }
        if (n == kLines) add_to_rows<Load, kLines>(c, rows, row_count, v, lines, line_bytes, length, out + k);
        else
          for (int64_t i = 0; i < n; i++) add_to_rows<Load, 1>(c, rows, row_count, v + i, lines + i * line_bytes, line_bytes, length, out + k);
      }
}

template <bool kCached>
static void project_matrix(const HeadChunk& c, const Matrix& w, int64_t columns, const int64_t* rows, int64_t row_count, int64_t begin,
                           int64_t end, float* out) {
  const DType dtype = w.stride1 == 1 ? c.args->dtype : DType::f32;  // strided rows are unpacked to floats
  if (dtype == DType::bf16) project_as<LoadBf16, kCached>(c, w, columns, rows, row_count, begin, end, out);
  else if (dtype == DType::f16) project_as<LoadF16, kCached>(c, w, columns, rows, row_count, begin, end, out);
  else project_as<LoadFloat, kCached>(c, w, columns, rows, row_count, begin, end, out);
}

template <bool kCached>
static void project_rows(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  const HeadArgs& a = *c.args;
  project_matrix<kCached>(c, a.weight, a.d, rows, row_count, begin, end, out);
  if (a.r) project_matrix<kCached>(c, a.low_weight, a.r, rows, row_count, begin, end, out + a.d);
}

static void project(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  std::memset(out, 0, sizeof(float) * row_count * row_stride(c.args->d + c.args->r));
  project_rows<false>(c, rows, row_count, begin, end, out);
}

static void project_cached(const HeadChunk& c, const int64_t* rows, int64_t row_count, int64_t begin, int64_t end, float* out) {
  project_rows<true>(c, rows, row_count, begin, end, out);
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
