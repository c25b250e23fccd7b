// One call of the head kernels: matrices of any dtype and layout, and random inputs.
#pragma once
#include "../../csrc/cpu/head.h"
#include "check.h"

namespace tests {

using g2rl::DType;

struct Format {
  int digits, bias;  // of the mantissa, of the exponent
};
inline Format format(DType t) { return t == DType::bf16 ? Format{7, 127} : Format{10, 15}; }

inline uint16_t encode(DType t, double x) {  // round to nearest even; |x| in range
  const Format f = format(t);
  const int infinity = (2 * f.bias + 1) << f.digits;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | infinity | 1 << (f.digits - 1);
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - f.bias);
  const int mantissa = int(std::nearbyint(std::ldexp(std::abs(x), f.digits - exponent)));  // a carry moves to the exponent
  return sign | (mantissa >> f.digits == 0 ? mantissa : ((exponent + f.bias - 1) << f.digits) + mantissa);
}

inline double decode(DType t, uint16_t bits) {
  const Format f = format(t);
  const int exponent = (bits & 0x7fff) >> f.digits, mantissa = bits & ((1 << f.digits) - 1);
  double x = std::ldexp(mantissa + (exponent ? 1 << f.digits : 0), std::max(exponent, 1) - f.bias - f.digits);
  if (exponent == 2 * f.bias + 1) x = mantissa ? kNan : kInf;
  return bits & 0x8000 ? -x : x;
}

enum class Layout { contiguous, padded_rows, every_other, columns };

struct Array {
  DType dtype = DType::f32;
  int64_t stride0 = 0, stride1 = 0;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Array() = default;
  Array(DType dtype, int64_t rows, int64_t columns, Layout layout) : dtype(dtype) {
    stride1 = layout == Layout::every_other ? 2 : layout == Layout::columns ? rows : 1;
    stride0 = layout == Layout::columns ? 1 : layout == Layout::padded_rows ? columns + 3 : columns * stride1 + (stride1 == 2);
    const int64_t size = rows == 0 ? 0 : (rows - 1) * stride0 + (columns - 1) * stride1 + 1;
    if (dtype == DType::f32) floats.assign(size, float(kNan));
    else halves.assign(size, encode(dtype, kNan));
  }
  void set(int64_t i, int64_t j, double x) {
    const int64_t at = i * stride0 + j * stride1;
    if (dtype == DType::f32) floats[at] = float(x);
    else halves[at] = encode(dtype, x);
  }
  double get(int64_t i, int64_t j) const {
    const int64_t at = i * stride0 + j * stride1;
    return dtype == DType::f32 ? floats[at] : decode(dtype, halves[at]);
  }
  const void* data() const { return dtype == DType::f32 ? (const void*)floats.data() : halves.data(); }
};

enum class Bias { none, some_masked, peaks, all_but_row_0 };

struct Options {
  DType dtype = DType::f32;
  int64_t V = 1, d = 1;
  std::vector<int64_t> lengths;
  Layout hidden_layout = Layout::contiguous, weight_layout = Layout::contiguous;
  Bias bias = Bias::none;
  DType bias_dtype = DType::f32;
  int64_t bias_stride = 1;
  bool token_weights = false;
  float temperature = 1, scale = 1, softcap = 0;
  double logit_size = 2;
  std::vector<int64_t> peaks;  // rows with a large bias
};

struct Case : Options {
  int64_t N = 0, S = 0;
  Array hidden, weight, bias_values;
  std::vector<int64_t> tokens, cu_seqlens;
  std::vector<float> alpha;

  explicit Case(const Options& options) : Options(options) {
    S = lengths.size();
    cu_seqlens.assign(S + 1, 0);
    for (int64_t s = 0; s < S; s++) N = cu_seqlens[s + 1] = N + lengths[s];
    hidden = Array(dtype, N, d, hidden_layout);
    weight = Array(dtype, V, d, weight_layout);
    for (int64_t t = 0; t < N; t++)
      for (int64_t k = 0; k < d; k++) hidden.set(t, k, bell() * (below(16) ? 1 : 1e-5));  // 1e-5: subnormal in float16
    for (int64_t v = 0; v < V; v++)
      for (int64_t k = 0; k < d; k++) weight.set(v, k, bell() * logit_size / std::sqrt(double(d)));
    tokens.assign(N, 0);
    for (int64_t& token : tokens)
      if (bias != Bias::all_but_row_0) token = peaks.empty() || below(2) ? below(V) : peaks[below(peaks.size())];
    if (token_weights) {
      alpha.assign(N, 0);
      for (float& x : alpha) x = below(4) ? float(2 * uniform()) : 0;
    }
    if (bias == Bias::none) return;
    bias_values = Array(bias_dtype, V, 1, Layout::contiguous);
    if (bias_stride != 1) {
      bias_values.stride0 = bias_stride;
      if (bias_dtype == DType::f32) bias_values.floats.assign((V - 1) * bias_stride + 1, float(kNan));
      else bias_values.halves.assign((V - 1) * bias_stride + 1, encode(bias_dtype, kNan));
    }
    const auto masked = [&](int64_t v) { return v > 0 && (below(8) == 0 || (96 <= v && v < 192)); };  // among them a whole block
    for (int64_t v = 0; v < V; v++) {
      double x = bell();
      if (bias == Bias::some_masked && masked(v)) x = -kInf;
      if (bias == Bias::all_but_row_0 && v > 0) x = -kInf;
      bias_values.set(v, 0, x);
    }
    for (int64_t v : peaks) bias_values.set(v, 0, std::log(double(V)) + bell());
  }

  std::string name() const {
    static const char *const dtypes[] = {"f32", "bf16", "f16"}, *const layouts[] = {"contiguous", "padded", "every other", "columns"};
    char text[300];
    std::snprintf(text, sizeof text, "%s N %lld d %lld V %lld S %lld, hidden %s, weight %s, bias %d %s stride %lld, T %g scale %g cap %g%s",
                  dtypes[int(dtype)], (long long)N, (long long)d, (long long)V, (long long)S, layouts[int(hidden_layout)],
                  layouts[int(weight_layout)], int(bias), dtypes[int(bias_dtype)], (long long)bias_stride, temperature, scale, softcap,
                  token_weights ? ", weighted" : "");
    return text;
  }
};

struct Outputs {
  std::vector<float> features, logprobs, logsumexp, entropy;

  explicit Outputs(const Case& c)  // NaN: shows outputs that are not written
      : features(c.S * c.d, float(kNan)), logprobs(c.N, float(kNan)), logsumexp(c.N, float(kNan)), entropy(c.N, float(kNan)) {}
  bool same(const Outputs& o) const {
    return same_bits(features, o.features) && same_bits(logprobs, o.logprobs) && same_bits(logsumexp, o.logsumexp) &&
           same_bits(entropy, o.entropy);
  }
};

inline g2rl::HeadArgs arguments(const Case& c, Outputs& out) {
  g2rl::HeadArgs a{};
  a.dtype = c.dtype;
  a.hidden = {c.hidden.data(), c.hidden.stride0, c.hidden.stride1};
  a.weight = {c.weight.data(), c.weight.stride0, c.weight.stride1};
  a.tokens = c.tokens.data();
  a.cu_seqlens = c.cu_seqlens.data();
  a.bias = c.bias == Bias::none ? nullptr : c.bias_values.data();
  a.bias_dtype = c.bias_dtype;
  a.bias_stride = c.bias_stride;
  a.token_weights = c.token_weights ? c.alpha.data() : nullptr;
  a.N = c.N, a.d = c.d, a.V = c.V, a.S = c.S;
  a.temperature = c.temperature, a.logit_scale = c.scale, a.logit_softcap = c.softcap;
  a.features = out.features.data(), a.logprobs = out.logprobs.data();
  a.logsumexp = out.logsumexp.data(), a.entropy = out.entropy.data();
  return a;
}

}  // namespace tests
