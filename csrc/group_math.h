// Scalar mathematics of the group geometry (PAPER.md eqs. 2, 9-13), shared by the CPU and the CUDA kernel; how sums
// and extremes run over a group is theirs. Everything is in double: a group is a few rows, and nubar divides small
// differences of nu by each other.
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
enum class Score : int { linear = 0, sqrt = 1 };
enum class Scale : int { none = 0, group = 1, batch = 2 };

struct GroupOptions {
  double lam, clip, eps;  // eps > 0
  Shaping shaping;
  Score score;
  Scale scale;
  bool skip_uniform;
};

// Below this spread of nu in a group every nubar is 0.5 (CONTRACT.md).
constexpr double kFlatSpread = 1e-5;

// A NaN stays, on either side.
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

  // `largest`: of the others' rewards that are no NaN; -INFINITY if there are none. A NaN comes in by `add`.
  G2RL_HOST_DEVICE explicit ScoreSum(double largest)
      : shift(largest == -INFINITY ? 0 : largest), weights(0), sum(0) {}  // then no exponential needs a guard
  G2RL_HOST_DEVICE void add(double reward_j, double similarity_ij) {
    const double exponential = exp(reward_j - shift);
    weights += exponential;
    sum += exponential * similarity_ij * similarity_ij;
  }
  G2RL_HOST_DEVICE double score(const GroupOptions& o) const {
    double nu = 1 - sum / (weights + o.eps * exp(-shift));
    if (nu < 0) nu = 0;  // a NaN stays
    return o.score == Score::sqrt ? ::sqrt(nu) : nu;
  }
};

// Whether a member with this reward is shaped: by Shaping::right only right answers are, and compared with no other.
G2RL_HOST_DEVICE inline bool is_shaped(double reward, const GroupOptions& o) {
  return o.shaping != Shaping::right || reward > 0;
}

// Extremes of the scores and the rewards of one group; of the scores, those that are compared. One NaN score among them
// makes every min-max of its group NaN; a group with a NaN reward is not uniform.
struct Extremes {
  double low_nu, high_nu, low_reward, high_reward;

  G2RL_HOST_DEVICE Extremes()
      : low_nu(INFINITY), high_nu(-INFINITY), low_reward(INFINITY), high_reward(-INFINITY) {}
  G2RL_HOST_DEVICE void add(double nu, double reward, const GroupOptions& o) {
    if (is_shaped(reward, o)) low_nu = smaller(low_nu, nu), high_nu = larger(high_nu, nu);
    low_reward = smaller(low_reward, reward), high_reward = larger(high_reward, reward);
  }
};

// Eqs. 12-13 and the clip of section 2.5, for one member of a group with these extremes; a NaN stays.
G2RL_HOST_DEVICE inline double shaped_reward(double r, double nu, const Extremes& e, const GroupOptions& o) {
  if (o.shaping == Shaping::none || (o.skip_uniform && e.low_reward == e.high_reward)) return r;
  const double spread = e.high_nu - e.low_nu;
  const double nubar = spread <= kFlatSpread ? 0.5 : (nu - e.low_nu) / spread;
  double s = o.shaping == Shaping::equation ? r * (1 + o.lam * r * nubar) : r * (1 + o.lam * (2 * nubar - 1));
  if (!is_shaped(r, o)) s = r;
  return s > o.clip ? o.clip : s < -o.clip ? -o.clip : s;
}

// Eq. 2: what advantages are divided by, from a sum of squared deviations of n rewards from their mean.
G2RL_HOST_DEVICE inline double deviation(double squares, int64_t n, double eps) { return ::sqrt(squares / n + eps); }

}  // namespace g2rl
