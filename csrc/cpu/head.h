// The LM-head op on the CPU: public interface, free of torch.  head.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace g2rl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
  const void* data;
  int64_t stride0, stride1;  // in elements, any value
};

struct HeadArgs {
  DType dtype;                 // of hidden and weight
  Matrix hidden, weight;       // [N, d], [V, d]
  const int64_t* tokens;       // [N] in [0, V), checked by the caller; with `partial` or `lse`, others belong to other ranks
  const int64_t* cu_seqlens;   // [S + 1], monotone from 0 to N, checked by the caller
  const void* bias;            // [V] or null
  DType bias_dtype;
  int64_t bias_stride;
  const float* token_weights;  // [N] or null (all ones)
  int64_t N, d, V, S;
  float temperature, logit_scale, logit_softcap;        // softcap 0: no softcap
  float *features, *logprobs, *logsumexp, *entropy;     // [S, d], [N], [N], [N]: written in full
  // A rank's rows of a larger vocabulary take two calls.  First: features null, and instead of the other outputs
  // partial [3, N]: max, sum exp(z - max) and sum exp(z - max) (z - max) over all entries but the token, and
  // target [N]: the token's z, -inf if it belongs to another rank; z over temperature.
  // Second: features alone, from the logsumexp [N] and rest = 1 - p(token) [N] of the whole vocabulary.
  double *partial, *target;
  const double *lse, *rest;
};

void head_features(const HeadArgs& args, Isa isa, Parallel parallel);

}  // namespace g2rl
