// The gradients of linear_logprobs (csrc/cpu/logprobs.cpp) against their equation in double precision.
#include "../../csrc/cpu/head_kernels.h"
#include "../../csrc/cpu/logprobs.h"
#include "head_case.h"

namespace tests {
namespace {

struct Gradients {
  std::vector<float> hidden, bias;
  Array weight;

  // NaN in weight: shows rows that are not written
  explicit Gradients(const Case& c) : hidden(c.N * c.d, 0), bias(c.V, 0), weight(c.dtype, c.V, c.d, Layout::contiguous) {}
  bool same(const Gradients& o) const {
    return same_bits(hidden, o.hidden) && same_bits(bias, o.bias) && same_bits(weight.floats, o.weight.floats) &&
           weight.halves == o.weight.halves;
  }
};

struct ExactGradients {
  std::vector<double> hidden, bias, weight, hidden_off, bias_off, weight_off;
  std::vector<float> normaliser, terms;  // inputs of the kernel
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
    g2rl::head_sweep({arguments(c, unused), given.normaliser.data(), given.terms.data(), cuts[i], cuts[i + 1], out.hidden.data(),
                          weight, out.bias.data()}, isa, parallel);
  return out;
}

void check_gradients(const Options& options) {
  Case c(options);
  if (below(2) && c.N > 0) c.tokens[below(c.N)] = below(2) ? -1 : c.V;  // belongs to another rank
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

}  // namespace

void test_gradients() {
  const int64_t dims[] = {1, 7, 64, 131};
  int64_t at = 0;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t V : {1, 95, 193, 1700})  // beyond a slab
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

}  // namespace tests
