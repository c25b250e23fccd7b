// What head.cpp (two looks at the weight) and onepass.cpp (one) share.
#pragma once
#include "finish.h"
#include "head_kernels.h"
#include "memory.h"

namespace g2rl {

constexpr int64_t kWorkspace = 15880000;  // bytes; with what the caller allocates beside it the total stays below 16 MB
constexpr int64_t kStatistics = 5;         // numbers of a token and block; two of them are used with HeadArgs::statistics alone
constexpr int64_t kSpan = 16384;          // blocks whose statistics are held and merged together

// The thread's scratch memory. A call of reserve() ends the use of what the one before returned.
Workspace& head_workspace();

// As merge() leaves them for the token in that lane.
TokenSums sums_of(const RunningSums& run, int64_t t, double temperature);

constexpr double kKnownTolerance = 0.01;

// Writes token n's outputs; z is its logit over temperature.
FinishedToken write_outputs(const HeadArgs& args, int64_t n, const TokenSums& sums, double z);

double total_weight(const HeadArgs& args, int64_t begin, int64_t end);  // sum of the tokens' alpha

// A token whose l = known p / p is within kKnownTolerance of 1 counts l times in its feature, others once.
void two_steps(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel);

// Returns false, and does nothing, where V and d are too large for the workspace.
bool one_pass(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel);

}  // namespace g2rl
