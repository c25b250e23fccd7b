// From the sums over a token's vocabulary to its log-probability, entropy and statistics, in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace g2rl {

inline double larger(double a, double b) { return a != a || a > b ? a : b; }  // NaN, if one is

// Over all entries but the token; z over temperature.
struct TokenSums {
  double max = -INFINITY, sum = 0, moment = 0;  // sum exp(z - max), sum exp(z - max) (z - max)
  double squares = 0;                           // sum exp(2 (z - max)), and
  int64_t top = -1;                             // index of the largest, where statistics are asked for
};

struct FinishedToken {
  double top, log_total;  // the logsumexp is their sum
  double logprob, entropy;
  double scale, rest;  // from exp(z - max of the others) to p; 1 - p of the token
  double sum_p_squared, top_logprob;
  int64_t top_token;
};

// Puts the token back, whose logit is z: 1 - p is a sum over the others, and does not cancel.
inline FinishedToken finish_token(const TokenSums& others, double z, int64_t token) {
  const bool nothing = others.max == -INFINITY;  // only the token is possible
  const double top = larger(others.max, z), below = nothing ? 0.0 : others.max - top, lift = std::exp(below);
  const double rest = lift * others.sum, own = std::exp(z - top), total = rest + own;
  const double moment = lift * (others.moment + others.sum * below) + (own > 0 ? own * (z - top) : 0.0);
  FinishedToken found{};
  found.top = top;
  found.log_total = z >= others.max ? std::log1p(rest) : std::log(total);
  found.logprob = z - top - found.log_total;
  found.entropy = std::max(found.log_total - moment / total, 0.0);
  found.scale = (nothing ? 0.0 : lift) / total;
  found.rest = rest / total;
  found.sum_p_squared = (lift * lift * others.squares + own * own) / (total * total);
  const bool mine = z > others.max || (z == others.max && token < others.top);  // of equals the first
  const bool known = total == total;
  found.top_token = !known ? -1 : mine ? token : others.top;
  found.top_logprob = !known ? std::numeric_limits<double>::quiet_NaN() : mine ? found.logprob : others.max - top - found.log_total;
  return found;
}

}  // namespace g2rl
