// Scalar mathematics of the group geometry (PAPER.md eqs. 2, 9-13), shared by the CPU and the CUDA kernel.
// Everything is in double: a group is a few rows, and nubar divides small differences of nu by each other.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define G2RL_HOST_DEVICE __host__ __device__
#else
#define G2RL_HOST_DEVICE
#endif

namespace g2rl {

enum class Shaping : int { none = 0, intent = 1, equation = 2 };
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

// Eq. 9 for one pair: <Phi^_i, Phi^_j> from the inner product and the two norms.
G2RL_HOST_DEVICE inline double cosine(double inner, double norm_i, double norm_j, double eps) {
  return inner / ((norm_i + eps) * (norm_j + eps));
}

// Eqs. 10-11 for member i of a group, one j at a time. The exponentials are taken relative to the largest reward
// among the others, so they cannot overflow; eps is rescaled alike, so the weights are those of eq. 10.
struct ScoreSum {
  double shift, denominator, sum;

  G2RL_HOST_DEVICE void begin(const float* rewards, const int64_t* members, int64_t M, int64_t S, int64_t i,
                              double eps) {
    shift = -INFINITY;
    sum = 0;
    for (int64_t j = 0; j < M; ++j)
      if (j != i && uint64_t(members[j]) < uint64_t(S) && !(rewards[members[j]] <= shift)) {
        shift = rewards[members[j]];
        if (shift != shift) break;  // a NaN reward stays: nothing compares as larger
      }
    if (shift == -INFINITY) shift = 0;  // a group of one, or only -inf rewards: no exponential to guard
    denominator = eps * exp(-shift);
    for (int64_t j = 0; j < M; ++j)
      if (j != i && uint64_t(members[j]) < uint64_t(S)) denominator += exp(rewards[members[j]] - shift);
  }
  G2RL_HOST_DEVICE void add(float reward_j, double similarity_ij) {
    sum += exp(reward_j - shift) / denominator * similarity_ij * similarity_ij;
  }
  G2RL_HOST_DEVICE double score(Score kind) const {
    double nu = 1 - sum;
    if (nu < 0) nu = 0;  // a NaN stays
    return kind == Score::sqrt ? ::sqrt(nu) : nu;
  }
};

// Eqs. 12-13 and the clip of section 2.5; a NaN stays.
G2RL_HOST_DEVICE inline double shaped_reward(double r, double nubar, const GroupOptions& o) {
  double s = o.shaping == Shaping::intent ? r * (1 + o.lam * (2 * nubar - 1)) : r * (1 + o.lam * r * nubar);
  return s > o.clip ? o.clip : s < -o.clip ? -o.clip : s;
}

// Eqs. 12-13 and 2 for one group, from its scores. `nu` and `value` hold M doubles; value[j] is the shaped reward
// on return. Advantages are written unless the scale is the batch's, which needs every group first.
G2RL_HOST_DEVICE inline void finish_group(const float* rewards, const int64_t* members, int64_t M, int64_t S,
                                          const GroupOptions& o, const double* nu, double* value, float* score,
                                          float* shaped, float* advantages) {
  double low = INFINITY, high = -INFINITY, mean = 0, first = 0;
  int64_t n = 0;
  bool uniform = true, bad = false;
  for (int64_t j = 0; j < M; ++j) {
    if (uint64_t(members[j]) >= uint64_t(S)) continue;
    double r = rewards[members[j]];
    if (n++ == 0) first = r;
    uniform = uniform && r == first;
    bad = bad || nu[j] != nu[j];
    low = nu[j] < low ? nu[j] : low;
    high = nu[j] > high ? nu[j] : high;
  }
  if (n == 0) return;
  const bool raw = o.shaping == Shaping::none || (o.skip_uniform && uniform);
  const double spread = bad ? NAN : high - low;  // one NaN score makes every min-max of its group NaN
  for (int64_t j = 0; j < M; ++j) {
    if (uint64_t(members[j]) >= uint64_t(S)) continue;
    const double nubar = spread <= kFlatSpread ? 0.5 : (nu[j] - low) / spread;
    value[j] = raw ? double(rewards[members[j]]) : shaped_reward(rewards[members[j]], nubar, o);
    score[members[j]] = float(nu[j]);
    shaped[members[j]] = float(value[j]);
    mean += value[j];
  }
  mean /= n;
  double variance = 0;
  for (int64_t j = 0; j < M; ++j)
    if (uint64_t(members[j]) < uint64_t(S)) variance += (value[j] - mean) * (value[j] - mean);
  const double scale = o.scale == Scale::group ? ::sqrt(variance / n + o.eps) : 1;
  for (int64_t j = 0; j < M; ++j)
    if (uint64_t(members[j]) < uint64_t(S)) advantages[members[j]] = float((value[j] - mean) / scale);
}

// Eq. 2 with the batch's standard deviation: divides the centred advantages of finish_group. `value` is [B, M].
// Two passes, in order of members, so that the result depends on nothing else.
G2RL_HOST_DEVICE inline double batch_scale(const int64_t* members, int64_t count, int64_t S, const double* value,
                                           double eps) {
  double mean = 0, variance = 0;
  int64_t n = 0;
  for (int64_t k = 0; k < count; ++k)
    if (uint64_t(members[k]) < uint64_t(S)) mean += value[k], ++n;
  if (n == 0) return 1;
  mean /= n;
  for (int64_t k = 0; k < count; ++k)
    if (uint64_t(members[k]) < uint64_t(S)) variance += (value[k] - mean) * (value[k] - mean);
  return ::sqrt(variance / n + eps);
}

}  // namespace g2rl
