// exp2 and tanh of vectors.
#pragma once

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// one * 2^y for y in [-100, 0]; NaN stays NaN.  Relative error below 1e-7; y = 0 gives `one` itself.
G2RL_INLINE vf exp2_negative(vf y, float one = 1.0f) {
  const vf n = round(y), f = y - n;
  vf p = splat(one * 1.5353362e-4f);  // minimax on [-1/2, 1/2] with p(0) = 1: 2e-9
  p = fma(p, f, splat(one * 1.3398875e-3f));
  p = fma(p, f, splat(one * 9.618437e-3f));
  p = fma(p, f, splat(one * 5.5503324e-2f));
  p = fma(p, f, splat(one * 0.24022648f));
  p = fma(p, f, splat(one * 0.6931472f));
  p = fma(p, f, splat(one));
  return scale_by_pow2(p, n);
}

// z times this is the logarithm to base 2 of exp(z / temperature)
G2RL_INLINE vf to_log2(const float* temperature) { return splat(kLog2e) / load(temperature); }
// a quarter of it: of the fourth root
G2RL_INLINE vf to_quarter_log2(const float* temperature) { return splat(0.25f * kLog2e) / load(temperature); }

// tanh: near 0 by the odd polynomial of Cephes, where 1 - 2 / (e^2x + 1) would cancel
G2RL_INLINE vf tanh(vf x) {
  const vf a = abs(x), x2 = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = fma(p, x2, splat(2.06390887954e-2f));
  p = fma(p, x2, splat(-5.37397155531e-2f));
  p = fma(p, x2, splat(1.33314422036e-1f));
  p = fma(p, x2, splat(-3.33332819422e-1f));
  const vf small = fma(p * x2, x, x);
  const vf e = exp2_negative(at_least(splat(-100.0f), a * splat(-2.0f * kLog2e)));
  const vf large = (splat(1.0f) - e) / (splat(1.0f) + e);
  return less(a, splat(0.625f), small, less(x, splat(0.0f), splat(0.0f) - large, large));
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
