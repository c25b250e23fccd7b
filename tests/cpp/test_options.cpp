// Options that give a call other inputs or outputs, against calls without them: a temperature a token, statistics, a
// low-rank part beside the weight, known log-probs, and logits that are kept for the gradients.
#include <algorithm>

#include "../../csrc/cpu/head_kernels.h"
#include "../../csrc/cpu/logprobs.h"
#include "head_case.h"

namespace tests {
namespace {

// Columns [begin, end) of a matrix, in memory of their own.
Array columns_of(const Array& from, int64_t rows, int64_t begin, int64_t end, Layout layout) {
  Array found(from.dtype, rows, end - begin, layout);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = begin; j < end; j++) found.set(i, j - begin, from.get(i, j));
  return found;
}

g2rl::Matrix matrix(const Array& a) { return {a.data(), a.stride0, a.stride1}; }

struct Statistics {
  std::vector<float> sum_p_squared, top_logprob;
  std::vector<int64_t> top_token;
};

// c's last r columns as a low-rank part
struct Split {
  const Case& c;
  int64_t r;
  Array hidden, weight, low_hidden, low_weight;
  std::vector<float> temperatures;

  Split(const Case& c, int64_t r)
      : c(c), r(r), hidden(columns_of(c.hidden, c.N, 0, c.d - r, c.hidden_layout)),
        weight(columns_of(c.weight, c.V, 0, c.d - r, c.weight_layout)),
        low_hidden(columns_of(c.hidden, c.N, c.d - r, c.d, Layout::contiguous)),
        low_weight(columns_of(c.weight, c.V, c.d - r, c.d, Layout::contiguous)), temperatures(c.N, c.temperature) {}

  g2rl::HeadArgs arguments(Outputs& out) const {
    g2rl::HeadArgs a = tests::arguments(c, out);
    a.hidden = matrix(hidden), a.weight = matrix(weight);
    a.low_hidden = matrix(low_hidden), a.low_weight = matrix(low_weight);
    a.d = c.d - r, a.r = r;
    a.temperatures = temperatures.data(), a.temperature = 1;
    return a;
  }
};

double largest(const std::vector<float>& values) {
  double found = 1e-30;
  for (float x : values) found = std::max(found, std::abs(double(x)));
  return found;
}

void expect_close(const std::vector<float>& found, const std::vector<float>& right, double off, const std::string& where, const char* what) {
  expect(found.size() == right.size(), where, what);
  const double most = off * largest(right);
  for (size_t i = 0; i < found.size() && i < right.size(); i++) expect_near(found[i], right[i], most, where, what, i);
}

void check_outputs(const Split& split, Isa isa, const std::string& where) {
  const Case& c = split.c;
  Outputs plain(c);
  g2rl::head_features(arguments(c, plain), isa, one_thread);
  for (bool known : {false, true}) {
    Outputs out(c);
    Statistics found{std::vector<float>(c.N, float(kNan)), std::vector<float>(c.N, float(kNan)), std::vector<int64_t>(c.N, -2)};
    g2rl::HeadArgs args = split.arguments(out);
    args.statistics = true;
    args.sum_p_squared = found.sum_p_squared.data(), args.top_logprob = found.top_logprob.data(), args.top_token = found.top_token.data();
    if (known) args.known_logprobs = plain.logprobs.data();
    g2rl::head_features(args, isa, three_threads);
    // Products over d - r and r columns are added, not one over d; exponentials of features are kept in 16 bits.
    const double off = (c.dtype == DType::f32 ? 1e-5 : 1e-4) * (1 + c.logit_size / c.temperature);
    expect_close(out.logprobs, plain.logprobs, off, where, "logprobs, split");
    expect_close(out.logsumexp, plain.logsumexp, off, where, "logsumexp, split");
    expect_close(out.entropy, plain.entropy, off, where, "entropy, split");
    expect_close(out.features, plain.features, 20 * off, where, "features, split");
    for (int64_t t = 0; t < c.N; t++) {
      expect(found.top_token[t] >= 0 && found.top_token[t] < c.V, where, "top_token outside");
      const double p = std::exp(double(found.top_logprob[t])), q = found.sum_p_squared[t];
      expect(p * p <= q * (1 + 1e-5) && q <= p * (1 + 1e-5), where, "sum p^2 beside the largest p");
      expect(out.logprobs[t] <= found.top_logprob[t] + 1e-5, where, "a token likelier than the likeliest");
    }
  }
  Outputs tempered(c);
  g2rl::HeadArgs args = arguments(c, tempered);
  args.temperatures = split.temperatures.data(), args.temperature = 1;
  g2rl::head_features(args, isa, one_thread);
  expect(tempered.same(plain), where, "equal temperatures give other bits than one for all");
}

struct Sums {
  std::vector<float> hidden, weight, low_hidden, low_weight;
};

// Gradients of the sum of log-probs; W's in its dtype. kept: bytes of logits from head_features.
Sums gradients(const Case& c, g2rl::HeadArgs args, const std::vector<float>& logsumexp, const std::vector<float>& logprobs, Isa isa) {
  std::vector<float> normaliser(2 * c.N, 0), terms(3 * c.N, 0);
  for (int64_t t = 0; t < c.N; t++)
    normaliser[t] = logsumexp[t], terms[t] = 1, terms[2 * c.N + t] = float(-std::expm1(double(logprobs[t])));
  Sums out;
  Array weight(c.dtype, c.V, args.d, Layout::contiguous);
  out.hidden.assign(c.N * args.d, 0), out.low_hidden.assign(c.N * args.r, 0), out.low_weight.assign(c.V * args.r, 0);
  void* grad_weight = c.dtype == DType::f32 ? (void*)weight.floats.data() : weight.halves.data();
  g2rl::head_sweep({args, normaliser.data(), terms.data(), 0, c.V, out.hidden.data(), grad_weight, nullptr,
                    args.r ? out.low_hidden.data() : nullptr, args.r ? out.low_weight.data() : nullptr}, isa, three_threads);
  for (int64_t v = 0; v < c.V; v++)
    for (int64_t k = 0; k < args.d; k++) out.weight.push_back(float(weight.get(v, k)));
  return out;
}

std::vector<float> some_columns(const std::vector<float>& all, int64_t columns, int64_t begin, int64_t end) {
  std::vector<float> found;
  for (size_t i = 0; i < all.size(); i += columns) found.insert(found.end(), all.begin() + i + begin, all.begin() + i + end);
  return found;
}

void check_gradients(const Split& split, Isa isa, const std::string& where) {
  const Case& c = split.c;
  Outputs plain(c), unused(c);
  g2rl::head_features(arguments(c, plain), isa, one_thread);
  const Sums whole = gradients(c, arguments(c, unused), plain.logsumexp, plain.logprobs, isa);
  const Sums anew = gradients(c, split.arguments(unused), plain.logsumexp, plain.logprobs, isa);
  const double off = c.dtype == DType::f32 ? 1e-4 : 2e-2;
  const int64_t d = c.d, at = d - split.r;
  expect_close(anew.hidden, some_columns(whole.hidden, d, 0, at), off, where, "hidden's gradient, split");
  expect_close(anew.low_hidden, some_columns(whole.hidden, d, at, d), off, where, "low_hidden's gradient");
  expect_close(anew.weight, some_columns(whole.weight, d, 0, at), off, where, "weight's gradient, split");
  expect_close(anew.low_weight, some_columns(whole.weight, d, at, d), off, where, "low_weight's gradient");

  // Some blocks of logits kept, and all
  const bool rounded = c.dtype == DType::bf16 && (c.bias == Bias::none || c.bias_dtype != DType::f32) && c.softcap == 0;
  const int64_t blocks = (c.V + g2rl::kBlock - 1) / g2rl::kBlock, groups = (c.N + 15) / 16, size = rounded ? 2 : 4;
  for (int64_t count : {int64_t(1), blocks}) {
    std::vector<char> kept(count * g2rl::KeptLogits::block_bytes(groups, size));
    std::vector<double> partial(3 * c.N), target(c.N);
    g2rl::HeadArgs args = split.arguments(unused);
    args.features = nullptr, args.partial = partial.data(), args.target = target.data();
    args.kept = {kept.data(), groups, count, blocks - count, size, 0};
    g2rl::head_features(args, isa, three_threads);
    g2rl::HeadArgs again = split.arguments(unused);
    again.kept = args.kept;
    const Sums found = gradients(c, again, plain.logsumexp, plain.logprobs, isa);
    if (!rounded) {
      expect(same_bits(found.hidden, anew.hidden) && same_bits(found.weight, anew.weight) && same_bits(found.low_weight, anew.low_weight),
             where, "float32 logits that were kept give other bits");
      continue;
    }
    expect_close(found.hidden, anew.hidden, off, where, "hidden's gradient, kept");
    expect_close(found.weight, anew.weight, off, where, "weight's gradient, kept");
    expect_close(found.low_weight, anew.low_weight, off, where, "low_weight's gradient, kept");
  }
}

}  // namespace

void test_options() {
  const int64_t ranks[] = {1, 3, 16, 70}, dims[] = {1, 6, 33, 64};
  int64_t at = 0;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t V : {1, 96, 200, 1000})
      for (int64_t N : {1, 17, 70, 130}) {
        Options o;
        const int64_t r = ranks[at % 4];
        o.dtype = dtype, o.V = V, o.d = dims[at / 4 % 4] + r, o.lengths = {N / 2, 0, N - N / 2};
        at++;
        o.hidden_layout = Layout(below(4)), o.weight_layout = Layout(below(2) ? 0 : below(4));
        o.bias = V > 1 && below(2) ? Bias::some_masked : Bias::none;
        o.bias_dtype = below(2) ? DType::f32 : dtype;
        o.temperature = below(2) ? 1.0f : 0.6f, o.scale = below(2) ? 1.0f : 1.7f, o.softcap = below(3) ? 0.0f : 3.0f;
        const Case c(o);
        const Split split(c, r);
        for (Isa isa : instruction_sets()) {
          const std::string where = std::string(g2rl::isa_name(isa)) + " options, r " + std::to_string(r) + " " + c.name();
          check_outputs(split, isa, where);
          check_gradients(split, isa, where);
        }
      }
}

}  // namespace tests
