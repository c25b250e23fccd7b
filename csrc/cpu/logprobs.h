// Gradients of log-probabilities and entropies on the CPU: public interface, free of torch.  logprobs.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "head.h"

namespace g2rl {

struct SweepArgs {
  HeadArgs head;            // hidden, weight, bias, tokens (elsewhere than in [0, V): on another part), N, d, V and the scalars
  const float* normaliser;  // [2, N]: top and log_total, whose sum is the logsumexp of z / temperature
  const float* terms;       // [3, N]: a, e and own, with dz = -p (a + e log p), and own at the token, before factor and slope
  int64_t begin, end;       // vocabulary entries
  float* sum_hidden;        // [N, d]: dz W is added; null: not wanted
  void* grad_weight;        // [V, d] of the weight's dtype: rows begin to end are written; null: not wanted
  float* grad_bias;         // [V]: sums of dz are added; null: not wanted
};

void logprobs_sweep(const SweepArgs& args, Isa isa, Parallel parallel);

}  // namespace g2rl
