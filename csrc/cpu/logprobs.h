// Gradients of log-probabilities and entropies on the CPU: public interface, free of torch.  logprobs.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "head.h"

namespace g2rl {

struct SweepArgs {
  HeadArgs head;            // the matrices, bias, tokens (outside [0, V): of other ranks), N, d, V and the scalars
  const float* normaliser;  // [2, N]: top and log_total, whose sum is the logsumexp of z / temperature
  const float* terms;       // [3, N]: a, e and own, with dz = -p (a + e log p), and own at the token, before factor and slope
  int64_t begin, end;       // vocabulary entries
  float* sum_hidden;        // [N, d]: dz W is added; or null
  void* grad_weight;        // [V, d] of the weight's dtype: rows begin to end are written; or null
  float* grad_bias;         // [V]: sums of dz are added; or null
  float* sum_low_hidden;    // [N, r]: dz low_weight is added; or null
  float* sum_low_weight;    // [V, r]: dz^T low_hidden is added; or null
};

void head_sweep(const SweepArgs& args, Isa isa, Parallel parallel);

// Sums over the parts of a vocabulary, as HeadArgs::partial has them.
struct Parts {
  const double* sums;  // [count, 3, N], with statistics [count, 4, N]
  int64_t count;
  const double* target;   // [N]
  const int64_t* tokens;  // [N]
  const int64_t* top;     // [count, N], as tokens counted over all parts; null without statistics
};

// What is known of N tokens once every part of the vocabulary has been summed.
struct Finished {
  float *logprobs, *entropy;  // [N]
  float* normaliser;          // [2, N]
  float* rest;                // [N], 1 - p of the token
  float *sum_p_squared, *top_logprob;  // [N], with statistics
  int64_t* top_token;
};

// Parts are added in order.
void finish_tokens(const Parts& parts, int64_t N, const Finished& out, Parallel parallel);

// SweepArgs::terms [3, N], from the gradients of log-probabilities and entropies; 0 where both are.
void token_terms(const float* grad_logprobs, const float* grad_entropy, const float* logprobs, const float* entropy, int64_t N,
                 float* terms, Parallel parallel);

}  // namespace g2rl
