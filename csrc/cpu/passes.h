// What head.cpp (two looks at the weight) and onepass.cpp (one) share.
#pragma once
#include "head_kernels.h"
#include "memory.h"

namespace g2rl {

constexpr int64_t kWorkspace = 15500000;  // bytes; with what the caller allocates beside it the total stays below 16 MB
constexpr int64_t kSpan = 16384;          // blocks whose statistics are held and merged together

// The thread's scratch memory. A call of reserve() ends the use of what the one before returned.
Workspace& head_workspace();

// Sums over the vocabulary but the realised token, as merge() leaves them, and that token's logit.
struct TokenSums {
  float target, max, run_sum, lost, run_moment;

  double sum() const { return double(run_sum) - lost; }
  double moment() const { return run_moment * 2.772588722239781; }  // sum exp((z - max) / T) (z - max) / T; 4 log 2
};

constexpr double kKnownTolerance = 0.01;

struct FinishedToken {
  double lse;    // logsumexp of z / T
  double log_p;  // of the realised token
  double scale;  // from exp((z - max) / T) to p
  double rest;   // 1 - p of the realised token
};

// Writes token n's outputs, computed in double.
FinishedToken finish_token(const HeadArgs& args, int64_t n, const TokenSums& sums);

double total_weight(const HeadArgs& args, int64_t begin, int64_t end);  // sum of the tokens' alpha

// A token whose l = known p / p is within kKnownTolerance of 1 counts l times in its feature, others once.
void two_steps(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel);

// Returns false, and does nothing, where V and d are too large for the workspace.
bool one_pass(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel);

}  // namespace g2rl
