// The head restricted to some ids a token, on the CPU: public interface, free of torch. support.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "head.h"

namespace g2rl {

struct SupportArgs {
  HeadArgs head;           // as for head_features: outputs, or `partial`, `target` and `top`
  const int64_t* ids;      // [K]; those outside [0, V) belong to other ranks and count as logits of -inf
  const int64_t* offsets;  // [N + 1]: token t is one of ids[offsets[t]:offsets[t + 1]]; monotone from 0 to K, checked by the caller
  float* x;                // [K]: logits before softcap and temperature are written; null: not kept
};

// With head.partial the statistics alone, of one rank's rows; a token that is not in its list has NaN for its target.
void support_features(const SupportArgs& args, Isa isa, Parallel parallel);

// dz [K]: the gradient by W h + b, from SupportArgs::x and SweepArgs' normaliser [2, N] and terms [3, N].
void support_terms(const SupportArgs& args, const float* normaliser, const float* terms, float* dz, Parallel parallel);

struct GatherSum {
  const float* coefficients;  // [K]
  const int64_t* index;       // [K]; outside [0, M): counts as a row of zeros
  const int64_t* offsets;     // [n + 1], within [0, K], monotone, checked by the caller
  DType dtype;
  Matrix matrix;  // [M, d]
  int64_t K, n, M, d;
  DType out_dtype;
  char* out;           // [n, d], written in full
  int64_t out_stride;  // in elements
};

// out[i] = sum of coefficients[k] matrix[index[k]] over k in offsets[i]:offsets[i + 1], in order, rounded once.
void gather_sum(const GatherSum& args, Isa isa, Parallel parallel);

}  // namespace g2rl
