// The CPU kernels without torch, against plain double-precision oracles, on every instruction set of this CPU.
// tests/test_cpp.py builds and runs it under AddressSanitizer and UndefinedBehaviorSanitizer.  Every input is allocated
// to the element and every gap between its elements is NaN, so that a read out of place is either caught or seen.
//
// head.cpp is included, not linked, for make_plan: it says which path a case takes, and the test ends by checking that
// the cases took them all.
#include "../../csrc/cpu/head.cpp"

#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "../../csrc/cpu/group.h"
#include "../../csrc/cpu/logprobs.h"

namespace {

using g2rl::DType;
using g2rl::Isa;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;  // of rounding to float32

int failures = 0, comparisons = 0;

void fail(const std::string& where, const std::string& what) {
  static std::string last;
  if (failures++ < 1000 && where != last) std::printf("FAIL %s: %s\n", where.c_str(), what.c_str());
  last = where;  // the first of a case says enough
}

void expect(bool ok, const std::string& where, const std::string& what) {
  comparisons++;
  if (!ok) fail(where, what);
}

void expect_near(double actual, double exact, double allowed, const std::string& where, const char* what, int64_t i) {
  comparisons++;
  if (actual == exact || (std::isnan(actual) && std::isnan(exact)) || std::abs(actual - exact) <= allowed) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld] = %.9g, exactly %.9g, off by %.3g, allowed %.3g", what, (long long)i, actual, exact,
                actual - exact, allowed);
  fail(where, text);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// ---- random numbers, the same on every platform --------------------------------------------------------------------

std::mt19937 generator(1);

int64_t below(int64_t n) { return int64_t(generator() % uint64_t(n)); }
double uniform() { return generator() * 0x1p-32; }
double bell() { return std::sqrt(3.0) * (uniform() + uniform() + uniform() + uniform() - 2); }  // variance 1

// ---- threads -------------------------------------------------------------------------------------------------------

void one_thread(int64_t n, void* ctx, void (*body)(void*, int64_t)) {
  for (int64_t i = 0; i < n; i++) body(ctx, i);
}

// Three threads, each from its last index to its first.
void three_threads(int64_t n, void* ctx, void (*body)(void*, int64_t)) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < std::min<int64_t>(n, 3); first++)
    threads.emplace_back([=] {
      for (int64_t i = first + (n - 1 - first) / 3 * 3; i >= 0; i -= 3) body(ctx, i);
    });
  for (std::thread& thread : threads) thread.join();
}

// ---- matrices of any dtype and layout ------------------------------------------------------------------------------

struct Format {
  int digits, bias;  // of the mantissa, of the exponent
};
Format format(DType t) { return t == DType::bf16 ? Format{7, 127} : Format{10, 15}; }

uint16_t encode(DType t, double x) {  // round to nearest even; |x| in range
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

double decode(DType t, uint16_t bits) {
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

// ---- head: cases ---------------------------------------------------------------------------------------------------

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

  explicit Outputs(const Case& c)  // NaN: what is not written shows
      : features(c.S * c.d, float(kNan)), logprobs(c.N, float(kNan)), logsumexp(c.N, float(kNan)), entropy(c.N, float(kNan)) {}
  bool same(const Outputs& o) const {
    return same_bits(features, o.features) && same_bits(logprobs, o.logprobs) && same_bits(logsumexp, o.logsumexp) &&
           same_bits(entropy, o.entropy);
  }
};

g2rl::HeadArgs arguments(const Case& c, Outputs& out) {
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

Outputs run_head(const Case& c, Isa isa, g2rl::Parallel parallel = one_thread) {
  Outputs out(c);
  g2rl::head_features(arguments(c, out), isa, parallel);
  return out;
}

g2rl::Plan plan_of(const Case& c, Isa isa) {
  Outputs out(c);
  const g2rl::HeadKernels& kernels = g2rl::kernels_for(isa);
  const bool pairs = c.dtype == DType::bf16 && kernels.bf16_dot;
  return g2rl::make_plan(arguments(c, out), pairs ? (c.d + 1) / 2 : c.d);
}

// ---- head: oracle --------------------------------------------------------------------------------------------------

struct Exact {
  // values; what rounding to float32 may add, to first order; what exponentials kept in 16 bits may add
  std::vector<double> features, logprobs, logsumexp, entropy;
  std::vector<double> features_off, logprobs_off, logsumexp_off, entropy_off, features_code;
};

// Eqs. 5 to 8, token by token, with its logits in memory.  Not sanitized, for speed: it is not what is under test.
__attribute__((no_sanitize("address", "undefined"))) Exact exact_head(const Case& c) {
  const int64_t N = c.N, V = c.V, d = c.d;
  Exact out;
  for (auto* v : {&out.features, &out.features_off, &out.features_code}) v->assign(c.S * d, 0);
  for (auto* v : {&out.logprobs, &out.logsumexp, &out.entropy, &out.logprobs_off, &out.logsumexp_off, &out.entropy_off}) v->assign(N, 0);
  std::vector<double> hidden(d), weights(V * d), bias(V, 0), logits(V), slopes(V, 1), spread(d), code(d);
  for (int64_t v = 0; v < V; v++) {
    for (int64_t k = 0; k < d; k++) weights[v * d + k] = c.weight.get(v, k);
    if (c.bias != Bias::none) bias[v] = c.bias_values.get(v, 0);
  }
  const double *W = weights.data(), *b = bias.data(), *h = hidden.data();
  double *z = logits.data(), *slope = slopes.data();
  for (int64_t s = 0; s < c.S; s++) {
    double total_alpha = 1e-8;
    for (int64_t t = c.cu_seqlens[s]; t < c.cu_seqlens[s + 1]; t++) total_alpha += c.token_weights ? c.alpha[t] : 1;
    for (int64_t t = c.cu_seqlens[s]; t < c.cu_seqlens[s + 1]; t++) {
      for (int64_t k = 0; k < d; k++) hidden[k] = c.hidden.get(t, k);
      double top = -kInf, size = 0;
      for (int64_t v = 0; v < V; v++) {
        double x = 0, square = 0;
        for (int64_t k = 0; k < d; k++) {
          const double product = h[k] * W[v * d + k];
          x += product, square += product * product;
        }
        x = c.scale * (x + b[v]);
        if (b[v] != -kInf) size = std::max(size, std::max(std::abs(x), std::sqrt(square + b[v] * b[v]) * c.scale) / c.temperature);
        if (c.softcap != 0) {
          const double bent = std::tanh(x / c.softcap);
          slope[v] = 1 - bent * bent;
          if (b[v] != -kInf) x = c.softcap * bent;  // a masked entry stays masked
        }
        z[v] = x / c.temperature;
        top = std::max(top, z[v]);
      }
      const int64_t y = c.tokens[t];
      double sum = 0, others = 0, sum_z = 0;
      for (int64_t v = 0; v < V; v++) {
        const double e = std::exp(z[v] - top);
        sum += e, others += v == y ? 0 : e, sum_z += e == 0 ? 0 : e * (z[v] - top);
      }
      const double H = std::log(sum) - sum_z / sum, rest = others / sum;  // rest: 1 - p(y), without cancellation
      // float32 logits: sums of d terms, signs at random; 4: exp, log, a division and the last rounding
      const double relative = 2 * kUnit * ((3 + std::sqrt(double(d))) * size + 4);
      out.logsumexp[t] = top + std::log(sum), out.logsumexp_off[t] = relative + kUnit * std::abs(out.logsumexp[t]);
      out.logprobs[t] = rest < 0.5 ? std::log1p(-rest) : z[y] - out.logsumexp[t];
      out.logprobs_off[t] = (relative + kUnit * std::abs(out.logprobs[t])) * rest;
      // near certainty of the target, entropy keeps its digits; near certainty of another token it is a difference from 1
      out.entropy[t] = H, out.entropy_off[t] = relative * (H + (z[y] < top ? 1 : 0));
      const double share = (c.token_weights ? c.alpha[t] : 1) / total_alpha * c.scale;
      for (int64_t k = 0; k < d; k++) spread[k] = code[k] = 0;
      for (int64_t v = 0; v < V; v++) {
        const double p = std::exp(z[v] - top) / sum, residual = v == y ? rest : -p;
        const double stored = v == y ? 0 : 0x1p-15 * std::exp(0.75 * (z[v] - top)) / sum;  // head_kernels_impl.h, "Codes"
        for (int64_t k = 0; k < d; k++) {
          const double w = W[v * d + k];
          out.features[s * d + k] += share * residual * slope[v] * w;
          spread[k] += residual * w * residual * w, code[k] += stored * w * stored * w;
        }
      }
      for (int64_t k = 0; k < d; k++) {
        out.features_off[s * d + k] += share * std::sqrt(spread[k]) * (relative + kUnit * std::sqrt(double(V)));  // sums over V
        out.features_code[s * d + k] += share * std::sqrt(code[k]) * 3;  // signs at random: 5 standard deviations
      }
    }
  }
  return out;
}

// ---- head: checks --------------------------------------------------------------------------------------------------

std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets;
  for (int i = 0; i <= int(g2rl::best_isa()); i++) sets.push_back(Isa(i));
  return sets;
}

struct Coverage {
  std::set<int64_t> widths;
  bool spans = false;
} covered;

void check_head(const Options& options) {
  const Case c(options);
  const Exact exact = exact_head(c);
  for (Isa isa : instruction_sets()) {
    const std::string where = std::string(g2rl::isa_name(isa)) + " " + c.name();
    const Outputs out = run_head(c, isa);
    expect(out.same(run_head(c, isa, three_threads)), where, "three threads give other bits than one");
    if (c.N > 0) {
      const g2rl::Plan plan = plan_of(c, isa);
      covered.widths.insert(plan.width), covered.spans |= plan.spans(c.V) > 1;
    }
    for (int64_t t = 0; t < c.N; t++) {
      expect_near(out.logsumexp[t], exact.logsumexp[t], exact.logsumexp_off[t], where, "logsumexp", t);
      expect_near(out.logprobs[t], exact.logprobs[t], exact.logprobs_off[t], where, "logprobs", t);
      expect_near(out.entropy[t], exact.entropy[t], exact.entropy_off[t], where, "entropy", t);
    }
    for (int64_t i = 0; i < c.S * c.d; i++)
      expect_near(out.features[i], exact.features[i], exact.features_off[i] + exact.features_code[i], where, "features", i);
  }
}

// N tokens in responses of random lengths; in one case of two the first, a middle one and the last are empty.
std::vector<int64_t> random_lengths(int64_t N) {
  std::vector<int64_t> cuts = {0, N};
  for (int64_t i = below(10); i > 0; i--) cuts.push_back(below(N + 1));
  if (below(2)) {
    const int64_t twice = cuts[below(cuts.size())];
    for (int64_t cut : {int64_t(0), twice, N}) cuts.push_back(cut);
  }
  std::sort(cuts.begin(), cuts.end());
  std::vector<int64_t> lengths;
  for (size_t i = 1; i < cuts.size(); i++) lengths.push_back(cuts[i] - cuts[i - 1]);
  return lengths;
}

void test_head_sweep() {
  const int64_t dims[] = {1, 7, 64, 300};
  int64_t at = 0;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t V : {1, 7, 95, 96, 97, 1000})
      for (int64_t N : {0, 1, 17, 28, 40, 60, 130, 300}) {  // a chunk of each width
        Options o;
        o.dtype = dtype, o.V = V, o.d = dims[at++ % 4], o.lengths = random_lengths(N);
        if (N * V * o.d > 10'000'000) o.d = 7;
        o.hidden_layout = Layout(below(4)), o.weight_layout = Layout(below(2) ? 0 : below(4));
        o.bias = V > 1 && below(2) ? Bias::some_masked : Bias::none;
        o.bias_dtype = below(2) ? DType::f32 : dtype, o.bias_stride = 1 + below(2);
        o.token_weights = below(2);
        o.temperature = below(2) ? 1.0f : 0.6f, o.scale = below(2) ? 1.0f : 1.7f, o.softcap = below(3) ? 0.0f : 3.0f;
        check_head(o);
      }
}

void test_head_corners() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Options o;
    o.dtype = dtype, o.V = 193, o.d = 5;
    o.lengths = {};
    check_head(o);
    o.lengths = {0, 0};
    check_head(o);
    o.lengths = {3, 0, 20};
    o.bias = Bias::all_but_row_0;  // nothing but the target is possible
    check_head(o);
    o.bias = Bias::some_masked, o.softcap = 2, o.logit_size = 20;  // saturated
    check_head(o);
    o.bias = Bias::peaks, o.softcap = 0, o.logit_size = 12, o.temperature = 0.5f, o.peaks = {95, 96, 192};  // near certainty
    check_head(o);
  }
}

void test_large_vocabularies() {
  Options o;
  o.bias = Bias::peaks;
  o.dtype = DType::f16, o.V = 50021, o.d = 3, o.lengths = {4, 0, 9, 4}, o.peaks = {0, 95, 96, 50015, 50016, 50020};
  check_head(o);
  // the widths between, which a wide chunk has no room for
  o.dtype = DType::bf16, o.V = 150001, o.d = 2, o.lengths = {30, 0, 22}, o.peaks = {0, 95, 96, 149999, 150000};
  o.bias_dtype = DType::bf16, o.bias_stride = 2, o.token_weights = true;
  check_head(o);
  o.bias_dtype = DType::f32, o.bias_stride = 1, o.token_weights = false;
  // a vocabulary larger than the workspace: more responses than rows of A, and peaks on either side of the cut
  o.dtype = DType::f32, o.V = 430007, o.d = 1, o.lengths = {1, 0, 2, 1, 1, 1, 14};
  Case probe(o);
  const g2rl::Plan plan = plan_of(probe, Isa::plain);
  expect(plan.span < o.V, "spans", "this vocabulary was to need two spans");
  o.peaks = {0, plan.span - 1, std::min(plan.span, o.V - 1), o.V - 2, o.V - 1};
  check_head(o);
  o.dtype = DType::bf16, o.V = 600011, o.d = 2, o.lengths = {2, 3}, o.softcap = 30, o.peaks = {o.V - 1};
  check_head(o);
}

// What is not finite in one token or in the weight is NaN where it belongs, and nowhere else.
void check_nan(const Options& options, Isa isa) {
  Case c(options);
  const std::string where = std::string(g2rl::isa_name(isa)) + " NaN, " + c.name();
  const Outputs clean = run_head(c, isa);
  const int64_t bad = 2, token = c.cu_seqlens[bad] + c.lengths[bad] / 2, k = c.d / 2;
  const double was = c.hidden.get(token, k);
  for (double x : {kNan, kInf, -kInf}) {
    c.hidden.set(token, k, x);
    const Outputs out = run_head(c, isa, three_threads);
    for (int64_t t = 0; t < c.N; t++) {
      const bool same = out.logprobs[t] == clean.logprobs[t] && out.logsumexp[t] == clean.logsumexp[t] &&
                        out.entropy[t] == clean.entropy[t];
      const bool nan = std::isnan(out.logprobs[t]) && std::isnan(out.logsumexp[t]) && std::isnan(out.entropy[t]);
      if (t != token) expect(same, where, "token " + std::to_string(t) + " changed");
      else if (std::isnan(x) || c.softcap == 0) expect(nan, where, "the token is not NaN");
    }
    for (int64_t s = 0; s < c.S; s++)
      for (int64_t i = s * c.d; i < (s + 1) * c.d; i++)
        if (s != bad) expect(out.features[i] == clean.features[i], where, "response " + std::to_string(s) + " changed");
        else if (std::isnan(x) || c.softcap == 0) expect(std::isnan(out.features[i]), where, "the response is not NaN");
  }
  c.hidden.set(token, k, was);
  c.weight.set(c.V - 1, k, kNan);
  const Outputs out = run_head(c, isa);
  for (int64_t t = 0; t < c.N; t++) expect(std::isnan(out.logprobs[t]) && std::isnan(out.entropy[t]), where, "NaN in weight is lost");
  for (int64_t i = 0; i < c.S * c.d; i++)
    expect(c.lengths[i / c.d] ? std::isnan(out.features[i]) : out.features[i] == 0, where, "NaN in weight: features");
}

void test_nan() {
  for (Isa isa : instruction_sets())
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      Options o;
      o.dtype = dtype, o.V = 201, o.d = 7, o.lengths = {0, 5, 40, 0, 1, 50, 34, 0};
      for (float softcap : {0.0f, 3.0f}) {
        o.softcap = softcap;
        check_nan(o, isa);
      }
    }
}

// ---- gradients -----------------------------------------------------------------------------------------------------

struct Gradients {
  std::vector<float> hidden, bias;
  Array weight;

  // NaN in weight: what is not written shows
  explicit Gradients(const Case& c) : hidden(c.N * c.d, 0), bias(c.V, 0), weight(c.dtype, c.V, c.d, Layout::contiguous) {}
  bool same(const Gradients& o) const {
    return same_bits(hidden, o.hidden) && same_bits(bias, o.bias) && same_bits(weight.floats, o.weight.floats) &&
           weight.halves == o.weight.halves;
  }
};

struct ExactGradients {
  std::vector<double> hidden, bias, weight, hidden_off, bias_off, weight_off;
  std::vector<float> normaliser, terms;  // what the kernel is given
};

// dz = -p (g + e (log p + H)), and at the token g (1 - p) - p e (log p + H), times scale / temperature and the softcap's slope
__attribute__((no_sanitize("address", "undefined"))) ExactGradients exact_gradients(const Case& c, bool pairs) {
  const int64_t N = c.N, V = c.V, d = c.d;
  ExactGradients out;
  for (auto* v : {&out.hidden, &out.hidden_off}) v->assign(N * d, 0);
  for (auto* v : {&out.weight, &out.weight_off}) v->assign(V * d, 0);
  for (auto* v : {&out.bias, &out.bias_off}) v->assign(V, 0);
  out.normaliser.assign(2 * N, 0), out.terms.assign(3 * N, 0);
  std::vector<double> z(V), slope(V), h(d), weights(V * d);
  for (int64_t v = 0; v < V; v++)
    for (int64_t k = 0; k < d; k++) weights[v * d + k] = c.weight.get(v, k);
  for (int64_t t = 0; t < N; t++) {
    for (int64_t k = 0; k < d; k++) h[k] = c.hidden.get(t, k);
    double top = -kInf, size = 0, total = 0, H = 0;
    for (int64_t v = 0; v < V; v++) {
      double x = c.bias == Bias::none ? 0 : c.bias_values.get(v, 0);
      const bool masked = x == -kInf;
      for (int64_t k = 0; k < d; k++) x += h[k] * weights[v * d + k];
      x *= c.scale, slope[v] = 1;
      if (!masked) size = std::max(size, std::abs(x) / c.temperature);
      if (c.softcap != 0) {
        const double bent = std::tanh(x / c.softcap);
        slope[v] = 1 - bent * bent, x = masked ? -kInf : c.softcap * bent;
      }
      z[v] = x / c.temperature, top = std::max(top, z[v]);
    }
    for (int64_t v = 0; v < V; v++) total += std::exp(z[v] - top);
    const double log_total = std::log(total);
    for (int64_t v = 0; v < V; v++) {
      const double log_p = z[v] - top - log_total;
      if (z[v] != -kInf) H -= std::exp(log_p) * log_p;
    }
    const int64_t y = c.tokens[t];
    const bool here = y >= 0 && y < V;
    const double g = bell(), e = below(3) ? bell() : 0;
    double others = 0;
    for (int64_t v = 0; v < V; v++) others += v == y ? 0 : std::exp(z[v] - top);
    const double p_y = here ? std::exp(z[y] - top - log_total) : 0, rest = others / total;
    const double own = g * rest - (p_y > 0 ? p_y * e * (z[y] - top - log_total + H) : 0);
    out.normaliser[t] = float(top), out.normaliser[N + t] = float(log_total + (top - float(top)));
    out.terms[t] = float(g + e * H), out.terms[N + t] = float(e), out.terms[2 * N + t] = float(own);
    const double relative = 2 * kUnit * ((3 + std::sqrt(double(d))) * size + 8) + (c.softcap != 0 ? 16 * kUnit : 0);
    for (int64_t v = 0; v < V; v++) {
      const double log_p = z[v] - top - log_total, p = std::exp(log_p), factor = c.scale / c.temperature;
      const double dz = factor * slope[v] * (v == y ? own : p > 0 ? -p * (g + e * (log_p + H)) : 0);
      const double weight = v == y ? std::abs(own) : p > 0 ? p * (std::abs(g) + std::abs(e) * (std::abs(log_p) + H + 1)) : 0;
      // dz in bf16 is off by at most 2^-8 of itself, signs at random: twice that is 5 standard deviations of a sum
      const double off = factor * (weight * relative + (pairs ? 0x1p-7 * std::abs(dz) / factor : 0));
      out.bias[v] += dz, out.bias_off[v] += off * off;
      for (int64_t k = 0; k < d; k++) {
        const double w = weights[v * d + k];
        out.hidden[t * d + k] += dz * w, out.hidden_off[t * d + k] += off * w * off * w;
        out.weight[v * d + k] += dz * h[k], out.weight_off[v * d + k] += off * h[k] * off * h[k];
      }
    }
  }
  const double sums = 1 + std::sqrt(double(std::max(N, V))) / 8;  // float32 sums of so many terms
  for (auto* v : {&out.hidden_off, &out.weight_off, &out.bias_off})
    for (double& x : *v) x = std::sqrt(x) * sums + 1e-37;
  const double half = c.dtype == DType::f32 ? kUnit : c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;  // the last rounding
  for (int64_t i = 0; i < V * d; i++) out.weight_off[i] += half * std::abs(out.weight[i]) + (c.dtype == DType::f16 ? 0x1p-25 : 0);
  return out;
}

Gradients run_sweep(const Case& c, const ExactGradients& given, Isa isa, g2rl::Parallel parallel, const std::vector<int64_t>& cuts) {
  Outputs unused(c);
  Gradients out(c);
  void* weight = c.dtype == DType::f32 ? (void*)out.weight.floats.data() : out.weight.halves.data();
  for (size_t i = 0; i + 1 < cuts.size(); i++)
    g2rl::logprobs_sweep({arguments(c, unused), given.normaliser.data(), given.terms.data(), cuts[i], cuts[i + 1], out.hidden.data(),
                          weight, out.bias.data()}, isa, parallel);
  return out;
}

void check_gradients(const Options& options) {
  Case c(options);
  if (below(2) && c.N > 0) c.tokens[below(c.N)] = below(2) ? -1 : c.V;  // elsewhere: on another part of the vocabulary
  const std::vector<int64_t> cuts = below(2) ? std::vector<int64_t>{0, c.V} : std::vector<int64_t>{0, below(c.V + 1), c.V};
  for (Isa isa : instruction_sets()) {
    const std::string where = std::string(g2rl::isa_name(isa)) + " gradients " + c.name();
    const bool pairs = c.dtype == DType::bf16 && g2rl::kernels_for(isa).bf16_dot;
    const std::mt19937 before = generator;
    const ExactGradients exact = exact_gradients(c, pairs);
    if (isa != instruction_sets().back()) generator = before;  // the same gradients for all
    const Gradients out = run_sweep(c, exact, isa, one_thread, cuts);
    expect(out.same(run_sweep(c, exact, isa, three_threads, cuts)), where, "three threads give other bits than one");
    for (int64_t i = 0; i < c.N * c.d; i++) expect_near(out.hidden[i], exact.hidden[i], exact.hidden_off[i], where, "hidden", i);
    for (int64_t v = 0; v < c.V; v++) expect_near(out.bias[v], exact.bias[v], exact.bias_off[v], where, "bias", v);
    for (int64_t i = 0; i < c.V * c.d; i++)
      expect_near(out.weight.get(i / c.d, i % c.d), exact.weight[i], exact.weight_off[i], where, "weight", i);
  }
}

void test_gradients() {
  const int64_t dims[] = {1, 7, 64, 131};
  int64_t at = 0;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t V : {1, 95, 193, 1700})  // beyond a strip
      for (int64_t N : {0, 1, 17, 63, 130, 1100}) {  // beyond a chunk
        Options o;
        o.dtype = dtype, o.V = V, o.d = dims[at++ % 4], o.lengths = {N};
        if (N * V * o.d > 3'000'000) o.d = 3;
        if (N * V * o.d > 3'000'000) o.V = 97;
        o.hidden_layout = Layout(below(4)), o.weight_layout = Layout(below(2) ? 0 : below(4));
        o.bias = o.V > 1 && below(2) ? Bias::some_masked : Bias::none;
        o.bias_dtype = below(2) ? DType::f32 : dtype, o.bias_stride = 1 + below(2);
        o.temperature = below(2) ? 1.0f : 0.6f, o.scale = below(2) ? 1.0f : 1.7f, o.softcap = below(3) ? 0.0f : 3.0f;
        check_gradients(o);
      }
}

// ---- groups --------------------------------------------------------------------------------------------------------

struct GroupCase {
  int64_t S, d, B = 0, M = 0;
  std::vector<int64_t> ids, members;
  std::vector<float> features, rewards;
};

struct GroupOutputs {
  std::vector<float> similarity, score, shaped, advantages;
};

// ids to members, as written in the contract: groups in order of first appearance
void list_members(GroupCase& c) {
  std::vector<int64_t> index(c.S);
  const g2rl::GroupShape shape = g2rl::index_groups(c.ids.data(), c.S, index.data());
  c.B = shape.B, c.M = shape.M;
  c.members.assign(c.B * c.M, -9);
  g2rl::fill_members(index.data(), c.S, shape, c.members.data());
  std::vector<std::vector<int64_t>> groups;
  for (int64_t i = 0; i < c.S; i++) {
    if (c.ids[i] < 0) continue;
    size_t b = 0;
    while (b < groups.size() && c.ids[groups[b][0]] != c.ids[i]) b++;
    if (b == groups.size()) groups.emplace_back();
    groups[b].push_back(i);
  }
  size_t largest = 0;
  for (const auto& group : groups) largest = std::max(largest, group.size());
  bool ok = c.B == int64_t(groups.size()) && c.M == int64_t(largest);
  for (int64_t b = 0; ok && b < c.B; b++)
    for (int64_t j = 0; j < c.M; j++) ok = ok && c.members[b * c.M + j] == (j < int64_t(groups[b].size()) ? groups[b][j] : -1);
  expect(ok, "group", "members");
  expect(g2rl::bad_member(c.members.data(), c.B * c.M, c.S) == -1, "group", "good members are called bad");
}

GroupOutputs run_group(const GroupCase& c, const g2rl::GroupOptions& options, g2rl::Parallel parallel) {
  const float nan = float(kNan);
  GroupOutputs out{std::vector<float>(c.B * c.M * c.M, nan), std::vector<float>(c.S, nan), std::vector<float>(c.S, nan),
                   std::vector<float>(c.S, nan)};
  g2rl::group_geometry({c.features.data(), c.rewards.data(), c.members.data(), c.S, c.d, c.B, c.M, options, out.similarity.data(),
                        out.score.data(), out.shaped.data(), out.advantages.data()},
                       parallel);
  return out;
}

double spread_of(const std::vector<double>& x, double eps) {
  double mean = 0, variance = 0;
  for (double v : x) mean += v / x.size();
  for (double v : x) variance += (v - mean) * (v - mean) / x.size();
  return std::sqrt(variance + eps);
}

// Eqs. 9 to 13 and 2 as they are written.  long double holds exp(1e4), so nothing needs care.
void check_group(const GroupCase& c, const g2rl::GroupOptions& o) {
  const auto feature = [&](int64_t i, int64_t k) { return double(c.features[i * c.d + k]); };
  std::vector<double> similarity(c.B * c.M * c.M, 0), score(c.S, 0), shaped(c.S, 0), advantages(c.S, 0), all;
  for (int64_t b = 0; b < c.B; b++) {
    std::vector<int64_t> rows;
    for (int64_t j = 0; j < c.M; j++)
      if (c.members[b * c.M + j] >= 0) rows.push_back(c.members[b * c.M + j]);
    const int64_t m = rows.size();
    std::vector<double> nu(m), value(m), norm(m, 0);
    for (int64_t i = 0; i < m; i++) {
      for (int64_t k = 0; k < c.d; k++) norm[i] += feature(rows[i], k) * feature(rows[i], k);
      norm[i] = std::sqrt(norm[i]);
    }
    bool uniform_rewards = true;
    for (int64_t i = 0; i < m; i++) {
      uniform_rewards = uniform_rewards && c.rewards[rows[i]] == c.rewards[rows[0]];
      long double denominator = o.eps, sum = 0;
      for (int64_t j = 0; j < m; j++)
        if (j != i) denominator += std::exp((long double)c.rewards[rows[j]]);
      for (int64_t j = 0; j < m; j++) {
        double inner = 0;
        for (int64_t k = 0; k < c.d; k++) inner += feature(rows[i], k) * feature(rows[j], k);
        const double cosine = inner / ((norm[i] + o.eps) * (norm[j] + o.eps));
        similarity[(b * c.M + i) * c.M + j] = cosine;
        if (j != i) sum += std::exp((long double)c.rewards[rows[j]]) / denominator * cosine * cosine;
      }
      nu[i] = sum > 1 ? 0 : double(1 - sum);
      if (o.score == g2rl::Score::sqrt) nu[i] = std::sqrt(nu[i]);
    }
    const auto compared = [&](int64_t i) { return o.shaping != g2rl::Shaping::right || c.rewards[rows[i]] > 0; };
    std::vector<double> scores;
    for (int64_t i = 0; i < m; i++)
      if (compared(i)) scores.push_back(nu[i]);
    const double low = scores.empty() ? 0 : *std::min_element(scores.begin(), scores.end());
    const double high = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
    for (int64_t i = 0; i < m; i++) {
      const double r = c.rewards[rows[i]], nubar = high - low <= 1e-5 ? 0.5 : (nu[i] - low) / (high - low);
      value[i] = o.shaping == g2rl::Shaping::equation ? r * (1 + o.lam * r * nubar) : r * (1 + o.lam * (2 * nubar - 1));
      if (!compared(i)) value[i] = r;
      value[i] = std::min(std::max(value[i], -o.clip), o.clip);
      if (o.shaping == g2rl::Shaping::none || (o.skip_uniform && uniform_rewards)) value[i] = r;
      score[rows[i]] = nu[i], shaped[rows[i]] = value[i], all.push_back(value[i]);
    }
    for (int64_t i = 0; i < m; i++) {
      double mean = 0;
      for (double v : value) mean += v / m;
      advantages[rows[i]] = (value[i] - mean) / (o.scale == g2rl::Scale::group ? spread_of(value, o.eps) : 1);
    }
  }
  if (o.scale == g2rl::Scale::batch)
    for (double& x : advantages) x /= all.empty() ? 1 : spread_of(all, o.eps);

  char where[160];
  std::snprintf(where, sizeof where, "group S %lld d %lld B %lld M %lld shaping %d score %d scale %d skip %d", (long long)c.S,
                (long long)c.d, (long long)c.B, (long long)c.M, int(o.shaping), int(o.score), int(o.scale), int(o.skip_uniform));
  const GroupOutputs out = run_group(c, o, one_thread), again = run_group(c, o, three_threads);
  expect(same_bits(out.similarity, again.similarity) && same_bits(out.score, again.score) && same_bits(out.shaped, again.shaped) &&
             same_bits(out.advantages, again.advantages),
         where, "three threads give other bits than one");
  const auto compare = [&](const std::vector<float>& actual, const std::vector<double>& exact, const char* what) {
    for (size_t i = 0; i < actual.size(); i++)  // one rounding to float32, of numbers that rounding in double has touched
      expect_near(actual[i], exact[i], 2 * kUnit * std::abs(exact[i]) + 2e-7, where, what, i);
  };
  compare(out.similarity, similarity, "similarity");
  compare(out.score, score, "score");
  compare(out.shaped, shaped, "shaped_rewards");
  compare(out.advantages, advantages, "advantages");
}

std::vector<g2rl::GroupOptions> group_options() {
  std::vector<g2rl::GroupOptions> all;
  for (int shaping = 0; shaping < 4; shaping++)
    for (int score = 0; score < 2; score++)
      for (int scale = 0; scale < 3; scale++)
        for (bool skip : {false, true})
          all.push_back({0.5, 1.2, 1e-6, g2rl::Shaping(shaping), g2rl::Score(score), g2rl::Scale(scale), skip});
  return all;
}

GroupCase group_case(int64_t d, std::vector<int64_t> ids) {
  GroupCase c;
  c.S = ids.size(), c.d = d, c.ids = std::move(ids);
  list_members(c);
  for (int64_t i = 0; i < c.S; i++) {
    const int64_t kind = below(6);  // now and then no feature at all, or the one before, or its opposite
    for (int64_t k = 0; k < d; k++) {
      const float before = i ? c.features[(i - 1) * d + k] : 1;
      c.features.push_back(kind == 0 ? 0 : kind == 1 ? before : kind == 2 ? -before : float(bell()));
    }
    c.rewards.push_back(below(2) ? 1 : -1);
  }
  return c;
}

void test_groups() {
  for (int64_t d : {1, 3, 8, 65})
    for (const std::vector<int64_t>& ids : std::vector<std::vector<int64_t>>{{},
                                                                             {-1, -1},
                                                                             {4},
                                                                             {7, 7, 7, 7},
                                                                             {5, 3, -1, 5, 9, 3, 5},
                                                                             {1, 2, 3, -4, 1},
                                                                             {-1, 8, 8, 0, 8, 0, 8, 8, 2, 2, 8, 0, -1}}) {
      GroupCase c = group_case(d, ids);
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
      for (float& reward : c.rewards) reward = 1;
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
      for (float& reward : c.rewards) reward = below(3) == 0 ? 1e4f : below(2) ? -1e4f : float(bell());
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
    }
}

// NaN in one feature makes its group NaN where it should, and touches no other.
void test_nan_in_a_group() {
  GroupCase c = group_case(9, {5, 3, -1, 5, 9, 3, 5});
  c.rewards[0] = c.rewards[6] = 1, c.rewards[3] = -1;
  for (const g2rl::GroupOptions& o : group_options()) {
    if (o.scale == g2rl::Scale::batch) continue;  // one standard deviation for all
    c.features.assign(c.S * c.d, 0.25f);
    const GroupOutputs clean = run_group(c, o, one_thread);
    c.features[3 * c.d + c.d - 1] = float(kNan);  // row 3, of group 0 = rows 0, 3, 6
    const GroupOutputs out = run_group(c, o, three_threads);
    for (int64_t i = 0; i < c.S; i++) {
      const bool touched = c.ids[i] == 5;
      const std::string where = "NaN in a group, row " + std::to_string(i);
      expect(touched ? std::isnan(out.score[i]) : out.score[i] == clean.score[i], where, "score");
      const bool shaped = touched && o.shaping != g2rl::Shaping::none;
      const bool left = o.shaping == g2rl::Shaping::right && c.rewards[i] < 0;
      expect(shaped && !left ? std::isnan(out.shaped[i]) : out.shaped[i] == clean.shaped[i], where, "shaped reward");
      expect(shaped ? std::isnan(out.advantages[i]) : out.advantages[i] == clean.advantages[i], where, "advantage");
    }
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t i = 0; i < c.M; i++)
        for (int64_t j = 0; j < c.M; j++) {
          const int64_t at = (b * c.M + i) * c.M + j;
          const bool touched = b == 0 && (i == 1 || j == 1);
          expect(touched ? std::isnan(out.similarity[at]) : out.similarity[at] == clean.similarity[at], "NaN in a group", "similarity");
        }
  }
}

void test_bad_members() {
  const auto bad = [](std::vector<int64_t> members, int64_t S) { return g2rl::bad_member(members.data(), members.size(), S); };
  expect(bad({}, 0) == -1, "bad_member", "none");
  expect(bad({2, -1, 0, -7}, 3) == -1, "bad_member", "empty places");
  expect(bad({0, 3, 1}, 3) == 1, "bad_member", "out of range");
  expect(bad({0}, 0) == 0, "bad_member", "no rows");
  expect(bad({0, 1, -1, 0}, 3) == 3, "bad_member", "twice");
  expect(bad({INT64_MAX, 1}, 3) == 0, "bad_member", "largest");
}

void check_coverage() {
  const std::set<int64_t> widths(std::begin(g2rl::kWidths), std::end(g2rl::kWidths));
  expect(covered.widths == widths, "coverage", "some chunk width is not met");
  expect(covered.spans, "coverage", "no vocabulary was cut into spans");
}

}  // namespace

int main() {
  test_bad_members();
  test_groups();
  test_nan_in_a_group();
  test_head_corners();
  test_head_sweep();
  test_nan();
  test_gradients();
  test_large_vocabularies();
  check_coverage();
  std::printf("%d comparisons on", comparisons);
  for (Isa isa : instruction_sets()) std::printf(" %s", g2rl::isa_name(isa));
  std::printf(": %d failures\n", failures);
  return failures != 0;
}
