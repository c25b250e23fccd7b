// The LM-head op on the CPU: public interface, free of torch.  head.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "isa.h"

namespace g2rl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
  const void* data;
  int64_t stride0, stride1;  // in elements, any value
};

struct HeadArgs {
  DType dtype;                 // of hidden and weight
  Matrix hidden, weight;       // [N, d], [V, d]
  const int64_t* tokens;       // [N], each in [0, V): the caller has checked
  const int64_t* cu_seqlens;   // [S + 1], monotone from 0 to N: the caller has checked
  const void* bias;            // [V] or null
  DType bias_dtype;
  int64_t bias_stride;
  const float* token_weights;  // [N] or null (all ones)
  int64_t N, d, V, S;
  float temperature, logit_scale, logit_softcap;        // softcap 0: none
  float *features, *logprobs, *logsumexp, *entropy;     // [S, d], [N], [N], [N]: written in full
};

// Calls body(ctx, i) for i in 0..n-1, in any order, on any threads, and returns when all are done.
using Parallel = void (*)(int64_t n, void* ctx, void (*body)(void* ctx, int64_t i));

void head_features(const HeadArgs& args, Isa isa, Parallel parallel);

}  // namespace g2rl
