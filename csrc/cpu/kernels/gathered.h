// Products with some rows of a matrix, given by their indices: what a restricted head needs (../support.cpp).
//
// An index outside the matrix counts as a row of zeros and is not read.  A result's bits depend on its own rows alone.
#pragma once
#include "gradient.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr int64_t kTogether = 4;  // rows at work: enough loads in flight

// Prefetches a line of a row; rows follow no pattern that the hardware knows.
G2RL_INLINE void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// out[i] = rows[i] . x for R rows; each has two sums, of even and odd vectors
template <class Load, int R>
static void dot_rows(const char* const rows[R], const char* const next[R], const float* x, int64_t n, float* const out[R]) {
  vf even[R], odd[R];
  for (int i = 0; i < R; i++) even[i] = odd[i] = splat(0.0f);
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const vf a = load(x + j), b = load(x + j + kLanes);
    for (int i = 0; i < R; i++) {
      fetch(next[i] + j * Load::size);
      if (2 * kLanes * Load::size > 64) fetch(next[i] + (j + kLanes) * Load::size);
      even[i] = fma(Load::vector(rows[i] + j * Load::size), a, even[i]);
      odd[i] = fma(Load::vector(rows[i] + (j + kLanes) * Load::size), b, odd[i]);
    }
  }
  for (int i = 0; i < R; i++) {
    float total = sum(even[i] + odd[i]);
    for (int64_t k = j; k < n; k++) total += Load::scalar(rows[i] + k * Load::size) * x[k];
    *out[i] = total;
  }
}

// sums[j] += c[i] rows[i][j], one row after the other
template <class Load, int R>
static void add_rows(const char* const rows[R], const char* const next[R], const float c[R], int64_t n, float* sums) {
  vf factor[R];
  for (int i = 0; i < R; i++) factor[i] = splat(c[i]);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    vf s = load(sums + j);
    for (int i = 0; i < R; i++) {
      fetch(next[i] + j * Load::size);
      s = fma(factor[i], Load::vector(rows[i] + j * Load::size), s);
    }
    store(sums + j, s);
  }
  for (; j < n; j++)
    for (int i = 0; i < R; i++) sums[j] += c[i] * Load::scalar(rows[i] + j * Load::size);
}

// Collects the rows inside the matrix, kTogether at a time: each(rows, next, places, count).
template <class Load, class Each>
static void by_rows(const Matrix& m, int64_t M, const int64_t* index, int64_t count, const Each& each) {
  const char *rows[2 * kTogether], *data = (const char*)m.data;
  int64_t places[2 * kTogether], held = 0;
  for (const char*& row : rows) row = data;
  for (int64_t k = 0; k < count; k++) {
    if (index[k] < 0 || index[k] >= M) continue;
    rows[held] = data + index[k] * m.stride0 * Load::size, places[held++] = k;
    if (held < 2 * kTogether) continue;
    each(rows, rows + kTogether, places, kTogether);
    for (int64_t i = 0; i < kTogether; i++) rows[i] = rows[kTogether + i], places[i] = places[kTogether + i];
    held = kTogether;
  }
  for (int64_t i = 0; i < held; i += kTogether)
    each(rows + i, rows + (i + kTogether < held ? i + kTogether : i), places + i, smaller(kTogether, held - i));
}

template <class Load>
static void gather_dot_of(const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* x, int64_t n, float* out) {
  for (int64_t k = 0; k < count; k++) out[k] = 0.0f;
  by_rows<Load>(m, M, index, count, [&](const char* const* rows, const char* const* next, const int64_t* places, int64_t held) {
    float* to[kTogether];
    for (int64_t i = 0; i < held; i++) to[i] = out + places[i];
    if (held == kTogether) return dot_rows<Load, kTogether>(rows, next, x, n, to);
    for (int64_t i = 0; i < held; i++) dot_rows<Load, 1>(rows + i, rows + i, x, n, to + i);
  });
}

template <class Load>
static void gather_add_of(const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* c, int64_t n, float* sums) {
  by_rows<Load>(m, M, index, count, [&](const char* const* rows, const char* const* next, const int64_t* places, int64_t held) {
    float factor[kTogether];
    for (int64_t i = 0; i < held; i++) factor[i] = c[places[i]];
    if (held == kTogether) return add_rows<Load, kTogether>(rows, next, factor, n, sums);
    for (int64_t i = 0; i < held; i++) add_rows<Load, 1>(rows + i, rows + i, factor + i, n, sums);
  });
}

// A column stride other than 1: row by row through a buffer of floats.
template <class Each>
static void by_strided_rows(DType dtype, const Matrix& m, int64_t M, const int64_t* index, int64_t count, int64_t n, const Each& each) {
  float row[kColumnBlock];
  for (int64_t k = 0; k < count; k++) {
    if (index[k] < 0 || index[k] >= M) continue;
    for (int64_t j = 0; j < n; j += kColumnBlock) {
      const int64_t width = smaller(kColumnBlock, n - j);
      unpack_floats(dtype, m, index[k], j, width, row);
      each(k, j, width, row);
    }
  }
}

// out[k] = m[index[k], :] . x, for n columns
static void gather_dot(DType dtype, const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* x, int64_t n, float* out) {
  if (m.stride1 == 1)
    return (dtype == DType::f32    ? gather_dot_of<LoadFloat>
            : dtype == DType::bf16 ? gather_dot_of<LoadBf16>
                                   : gather_dot_of<LoadF16>)(m, M, index, count, x, n, out);
  for (int64_t k = 0; k < count; k++) out[k] = 0.0f;
  by_strided_rows(dtype, m, M, index, count, n, [&](int64_t k, int64_t j, int64_t width, const float* row) {
    float* to[1] = {nullptr};
    float part;
    to[0] = &part;
    const char* rows[1] = {(const char*)row};
    dot_rows<LoadFloat, 1>(rows, rows, x + j, width, to);
    out[k] += part;
  });
}

// sums[j] += sum of c[k] m[index[k], j] over k, in order, for n columns
static void gather_add(DType dtype, const Matrix& m, int64_t M, const int64_t* index, int64_t count, const float* c, int64_t n, float* sums) {
  if (m.stride1 == 1)
    return (dtype == DType::f32    ? gather_add_of<LoadFloat>
            : dtype == DType::bf16 ? gather_add_of<LoadBf16>
                                   : gather_add_of<LoadF16>)(m, M, index, count, c, n, sums);
  by_strided_rows(dtype, m, M, index, count, n, [&](int64_t k, int64_t j, int64_t width, const float* row) {
    const char* rows[1] = {(const char*)row};
    add_rows<LoadFloat, 1>(rows, rows, c + k, width, sums + j);
  });
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
