// The group geometry's arguments and its scalar mathematics (arXiv 2512.15687, eqs. 2 and 9-13), shared by the CPU and
// the CUDA kernel. Each kernel runs sums and extremes over a group its own way. Everything is in double: a group is a few
// rows, and nubar divides small differences of nu by each other.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define G2RL_HOST_DEVICE __host__ __device__
#else
#define G2RL_HOST_DEVICE
#endif

namespace g2rl {

enum class Shaping : int { none = 0, intent = 1, equation = 2, right = 3 };
enum class ExplorationScore : int { linear = 0, sqrt = 1 };
enum class Scale : int { none = 0, group = 1, batch = 2 };

struct GroupOptions {
  double lam, clip, eps;  // eps > 0
  Shaping shaping;
  ExplorationScore exploration_score;
  Scale scale;
  bool skip_uniform;
};

// One call: pointers to memory of the CPU, or of one GPU.
struct GroupArgs {
  const float* features;   // [S, d], contiguous
  const float* rewards;    // [S]
  const int64_t* members;  // [B, M], rows of `features`, or an empty place
  int64_t S, d, B, M;
  GroupOptions options;
  float *similarity, *exploration_scores, *shaped_rewards, *advantages;  // [B, M, M], [S], [S], [S]; written in full
};

// If nu spreads over no more than this in a group, every nubar is 0.5 (the paper divides by zero there).
constexpr double kFlatSpread = 1e-5;

// A NaN on either side is the result.
G2RL_HOST_DEVICE inline double smaller(double a, double b) { return a != a || a < b ? a : b; }
G2RL_HOST_DEVICE inline double larger(double a, double b) { return a != a || a > b ? a : b; }

// Eq. 9 for one pair: <Phi^_i, Phi^_j> from the inner product and the two norms.
G2RL_HOST_DEVICE inline double cosine(double inner, double norm_i, double norm_j, double eps) {
  return inner / ((norm_i + eps) * (norm_j + eps));
}

// Eqs. 10-11 for one member i, one j != i at a time. The exponentials are taken relative to the largest reward among
// the others, so they cannot overflow; eps is rescaled alike, so the weights are those of eq. 10.
struct ScoreSum {
  double shift, weights, sum;

  // `largest`: largest reward of the others, ignoring NaN; -INFINITY without any. `add` takes the NaN in.
  G2RL_HOST_DEVICE explicit ScoreSum(double largest)
      : shift(largest == -INFINITY ? 0 : largest), weights(0), sum(0) {}  // a finite shift for every `add`
  G2RL_HOST_DEVICE void add(double reward_j, double similarity_ij) {
    const double exponential = exp(reward_j - shift);
    weights += exponential;
    sum += exponential * similarity_ij * similarity_ij;
  }
  G2RL_HOST_DEVICE double exploration_score(const GroupOptions& o) const {
    double nu = 1 - sum / (weights + o.eps * exp(-shift));
    if (nu < 0) nu = 0;  // a NaN stays
    return o.exploration_score == ExplorationScore::sqrt ? ::sqrt(nu) : nu;
  }
};

// Whether a member with this reward is shaped. Shaping::right shapes right answers only, and compares them with each other.
G2RL_HOST_DEVICE inline bool is_shaped(double reward, const GroupOptions& o) {
  return o.shaping != Shaping::right || reward > 0;
}

// Extremes of one group's rewards, and of the exploration scores of its shaped members. One NaN score among these makes
// every nubar of the group NaN; a group with a NaN reward is not uniform.
struct Extremes {
  double low_nu, high_nu, low_reward, high_reward;

  G2RL_HOST_DEVICE Extremes()
      : low_nu(INFINITY), high_nu(-INFINITY), low_reward(INFINITY), high_reward(-INFINITY) {}
  G2RL_HOST_DEVICE void add(double nu, double reward, const GroupOptions& o) {
    if (is_shaped(reward, o)) low_nu = smaller(low_nu, nu), high_nu = larger(high_nu, nu);
    low_reward = smaller(low_reward, reward), high_reward = larger(high_reward, reward);
  }
};

// Eqs. 12-13 and the clip of section 2.5 for one member of a group with these extremes. A NaN score or reward gives NaN.
G2RL_HOST_DEVICE inline double shaped_reward(double r, double nu, const Extremes& e, const GroupOptions& o) {
  if (o.shaping == Shaping::none || (o.skip_uniform && e.low_reward == e.high_reward)) return r;
  const double spread = e.high_nu - e.low_nu;
  const double nubar = spread <= kFlatSpread ? 0.5 : (nu - e.low_nu) / spread;
  double s = o.shaping == Shaping::equation ? r * (1 + o.lam * r * nubar) : r * (1 + o.lam * (2 * nubar - 1));
  if (!is_shaped(r, o)) s = r;
  return s > o.clip ? o.clip : s < -o.clip ? -o.clip : s;
}

// Eq. 2: the divisor of advantages, from the sum of squared deviations of n rewards from their mean.
G2RL_HOST_DEVICE inline double deviation(double squares, int64_t n, double eps) { return ::sqrt(squares / n + eps); }

}  // namespace g2rl
