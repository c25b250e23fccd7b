// The head pass on the CPU: raw pointers in, raw pointers out; no torch.
#pragma once

#include <cstdint>

#include "isa.h"

namespace g2rl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
  const void* data;
  int64_t stride0, stride1;  // in elements
};

struct HeadArgs {
  DType dtype;
  Matrix hidden, weight;       // [N, d], [V, d]
  const int64_t* tokens;       // [N], contiguous, within [0, V)
  const int64_t* cu_seqlens;   // [S+1], contiguous, 0 = first <= ... <= last = N
  const void* bias;            // [V] or null
  DType bias_dtype;
  int64_t bias_stride;
  const float* token_weights;  // [N] or null (all ones)
  int64_t N, d, V, S;
  float temperature, logit_scale, logit_softcap;     // softcap 0: none
  float *features, *logprobs, *logsumexp, *entropy;  // [S, d], [N], [N], [N]; written in full
};

// parallel(n, ctx, body): body(ctx, i) for i in 0..n-1, in any order, on any threads
using Parallel = void (*)(int64_t n, void* ctx, void (*body)(void* ctx, int64_t i));

void head_features(const HeadArgs&, Isa, Parallel);

}  // namespace g2rl
