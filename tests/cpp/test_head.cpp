// head_features (csrc/cpu/head.cpp) against eqs. 5 to 8 in double precision.
//
// head.cpp is included, not linked, for make_plan: it says which path a case takes, and the test ends by checking that
// the cases took them all.
#include "../../csrc/cpu/head.cpp"

#include <set>

#include "head_case.h"

namespace tests {
namespace {

Outputs run_head(const Case& c, Isa isa, g2rl::Parallel parallel = one_thread, const std::vector<float>* known = nullptr) {
  Outputs out(c);
  g2rl::HeadArgs args = arguments(c, out);
  if (known) args.known_logprobs = known->data();
  g2rl::head_features(args, isa, parallel);
  return out;
}

g2rl::Plan plan_of(const Case& c, Isa isa) {
  Outputs out(c);
  const g2rl::HeadKernels& kernels = g2rl::kernels_for(isa);
  const bool pairs = c.dtype == DType::bf16 && kernels.bf16_dot;
  return g2rl::make_plan(arguments(c, out), pairs ? (c.d + 1) / 2 : c.d);
}

struct Exact {
  // Values; tolerances for rounding to float32, to first order; for exponentials kept in 16 bits.
  std::vector<double> features, logprobs, logsumexp, entropy;
  std::vector<double> features_off, logprobs_off, logsumexp_off, entropy_off, features_code;
};

// Eqs. 5 to 8, token by token, with its logits in memory.  Not sanitized, for speed: it is not under test.
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
        const double stored = v == y ? 0 : 0x1p-15 * std::exp(0.75 * (z[v] - top)) / sum;  // kernels/softmax.h, "Codes"
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

struct Coverage {
  std::set<int64_t> widths;
  bool slabs = false;
} covered;

// onepass.cpp: the same statistics; features as exact, be the log-probs right, some of them wrong, or all.
void check_known(const Case& c, Isa isa, const Exact& exact, const Outputs& plain, const std::string& where) {
  for (int64_t wrong : {int64_t(0), int64_t(5), int64_t(1)}) {
    std::vector<float> known(c.N);
    for (int64_t t = 0; t < c.N; t++) {
      const double values[] = {kNan, kInf, -kInf, exact.logprobs[t] - 0.5, 0.0};
      known[t] = float(wrong && t % wrong == 0 ? values[t / wrong % 5] : exact.logprobs[t]);
    }
    const std::string mode = where + ", known but for " + (wrong ? "1 of " + std::to_string(wrong) : "0");
    Outputs out = run_head(c, isa, one_thread, &known);
    expect(out.same(run_head(c, isa, three_threads, &known)), mode, "three threads give other bits than one");
    for (int64_t i = 0; i < c.S * c.d; i++)
      expect_near(out.features[i], exact.features[i], 2 * exact.features_off[i] + exact.features_code[i], mode, "features", i);
    out.features = plain.features;
    expect(out.same(plain), mode, "log-probs, logsumexp or entropy have other bits than without");
  }
}

void check_head(const Options& options) {
  const Case c(options);
  const Exact exact = exact_head(c);
  for (Isa isa : instruction_sets()) {
    const std::string where = std::string(g2rl::isa_name(isa)) + " " + c.name();
    const Outputs out = run_head(c, isa);
    expect(out.same(run_head(c, isa, three_threads)), where, "three threads give other bits than one");
    if (c.N > 0) {
      const g2rl::Plan plan = plan_of(c, isa);
      covered.widths.insert(plan.width), covered.slabs |= plan.slab < c.V;
    }
    for (int64_t t = 0; t < c.N; t++) {
      expect_near(out.logsumexp[t], exact.logsumexp[t], exact.logsumexp_off[t], where, "logsumexp", t);
      expect_near(out.logprobs[t], exact.logprobs[t], exact.logprobs_off[t], where, "logprobs", t);
      expect_near(out.entropy[t], exact.entropy[t], exact.entropy_off[t], where, "entropy", t);
    }
    for (int64_t i = 0; i < c.S * c.d; i++)
      expect_near(out.features[i], exact.features[i], exact.features_off[i] + exact.features_code[i], where, "features", i);
    check_known(c, isa, exact, out, where);
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
    o.bias = Bias::all_but_row_0;  // only the target is possible
    check_head(o);
    o.bias = Bias::some_masked, o.softcap = 2, o.logit_size = 20;  // saturated
    check_head(o);
    o.bias = Bias::peaks, o.softcap = 0, o.logit_size = 12, o.temperature = 0.5f, o.peaks = {95, 96, 192};  // near certainty
    check_head(o);
  }
}

// NaN or infinity in one token makes its outputs and its response NaN, and no others; NaN in the weight reaches all.
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

void check_coverage() {
  const std::set<int64_t> widths(std::begin(g2rl::kWidths), std::end(g2rl::kWidths));
  expect(covered.widths == widths, "coverage", "some chunk width is not met");
  expect(covered.slabs, "coverage", "no vocabulary was cut into slabs");
}

}  // namespace

void test_head() {
  test_head_corners();
  test_head_sweep();
  test_nan();
}

void test_large_vocabularies() {
  Options o;
  o.bias = Bias::peaks;
  o.dtype = DType::f16, o.V = 50021, o.d = 3, o.lengths = {4, 0, 9, 4}, o.peaks = {0, 95, 96, 50015, 50016, 50020};
  check_head(o);
  // widths in between: the widest chunk has no room
  o.dtype = DType::bf16, o.V = 150001, o.d = 2, o.lengths = {30, 0, 22}, o.peaks = {0, 95, 96, 149999, 150000};
  o.bias_dtype = DType::bf16, o.bias_stride = 2, o.token_weights = true;
  check_head(o);
  o.bias_dtype = DType::f32, o.bias_stride = 1, o.token_weights = false;
  // a vocabulary larger than the workspace: more responses than rows of A, and peaks on either side of the cut
  o.dtype = DType::f32, o.V = 430007, o.d = 1, o.lengths = {1, 0, 2, 1, 1, 1, 14};
  Case probe(o);
  const g2rl::Plan plan = plan_of(probe, Isa::plain);
  expect(plan.slab < o.V, "slabs", "this vocabulary should need two slabs");
  o.peaks = {0, plan.slab - 1, std::min(plan.slab, o.V - 1), o.V - 2, o.V - 1};
  check_head(o);
  o.dtype = DType::bf16, o.V = 600011, o.d = 2, o.lengths = {2, 3}, o.softcap = 30, o.peaks = {o.V - 1};
  check_head(o);
  check_coverage();
}

}  // namespace tests
