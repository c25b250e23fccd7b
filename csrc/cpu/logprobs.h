// Gradients of log-probabilities and entropies on the CPU: public interface, free of torch.  logprobs.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "head.h"

namespace g2rl {

struct SweepArgs {
  HeadArgs head;            // hidden, weight, bias, tokens (outside [0, V): of other ranks), N, d, V and the scalars
  const float* normaliser;  // [2, N]: top and log_total, whose sum is the logsumexp of z / temperature
  const float* terms;       // [3, N]: a, e and own, with dz = -p (a + e log p), and own at the token, before factor and slope
  int64_t begin, end;       // vocabulary entries
  float* sum_hidden;        // [N, d]: dz W is added; or null
  void* grad_weight;        // [V, d] of the weight's dtype: rows begin to end are written; or null
  float* grad_bias;         // [V]: sums of dz are added; or null
};

void head_sweep(const SweepArgs& args, Isa isa, Parallel parallel);

}  // namespace g2rl
