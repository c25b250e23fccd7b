// The head restricted to some ids a token (csrc/cpu/support.cpp) against its equations in double precision.
#include "../../csrc/cpu/logprobs.h"
#include "../../csrc/cpu/support.h"
#include "head_case.h"

namespace tests {
namespace {

struct Lists {
  std::vector<int64_t> ids, offsets{0};

  // Of random lengths, the realised token at any place, no id twice; some ids of other ranks, if asked for.
  Lists(const Case& c, bool others) {
    std::vector<int64_t> all(c.V);
    for (int64_t v = 0; v < c.V; v++) all[v] = v;
    for (int64_t t = 0; t < c.N; t++) {
      std::shuffle(all.begin(), all.end(), generator);
      const int64_t count = below(4) ? 1 + below(std::min<int64_t>(c.V, 20)) : 1 + below(c.V), at = below(count);
      const int64_t place = std::find(all.begin(), all.end(), c.tokens[t]) - all.begin();
      std::swap(all[at], all[place]);
      for (int64_t i = 0; i < count; i++) {
        ids.push_back(all[i]);
        if (others && !below(3)) ids.push_back(below(2) ? -1 - below(9) : c.V + below(1LL << 40));
      }
      offsets.push_back(ids.size());
    }
  }
};

struct Exact {
  std::vector<double> x, logprobs, logsumexp, entropy, features, hidden, weight;  // gradients of sum g log p + e H
};

struct Incoming {
  std::vector<float> g, e;
};

// In double precision, one token after the other.
__attribute__((no_sanitize("address", "undefined"))) Exact exact(const Case& c, const Lists& l, const Incoming& in) {
  Exact out;
  out.x.assign(l.ids.size(), -kInf);
  for (auto* v : {&out.logprobs, &out.logsumexp, &out.entropy}) v->assign(c.N, 0);
  out.features.assign(c.S * c.d, 0), out.hidden.assign(c.N * c.d, 0), out.weight.assign(c.V * c.d, 0);
  for (int64_t s = 0; s < c.S; s++) {
    double total = 1e-8;
    for (int64_t t = c.cu_seqlens[s]; t < c.cu_seqlens[s + 1]; t++) {
      const double alpha = c.token_weights ? c.alpha[t] : 1.0;
      total += alpha;
      const int64_t first = l.offsets[t], end = l.offsets[t + 1];
      std::vector<double> z(end - first, -kInf), slope(end - first, 1);
      double top = -kInf;
      for (int64_t i = first; i < end; i++) {
        const int64_t v = l.ids[i];
        if (v < 0 || v >= c.V) continue;
        double x = c.bias == Bias::none ? 0 : c.bias_values.get(v, 0);
        for (int64_t k = 0; k < c.d; k++) x += c.hidden.get(t, k) * c.weight.get(v, k);
        out.x[i] = x *= c.scale;
        if (c.softcap != 0 && x != -kInf) {
          const double u = std::tanh(x / c.softcap);
          slope[i - first] = 1 - u * u, x = c.softcap * u;
        }
        z[i - first] = x / c.temperature;
        top = std::max(top, z[i - first]);
      }
      double sum = 0, H = 0;
      for (double one : z) sum += std::exp(one - top);
      const double lse = top + std::log(sum);
      for (double one : z)
        if (one != -kInf) H -= std::exp(one - lse) * (one - lse);
      out.logsumexp[t] = lse, out.entropy[t] = H;
      double others = 0;  // 1 - p
      for (int64_t i = first; i < end; i++)
        if (l.ids[i] != c.tokens[t]) others += std::exp(z[i - first] - lse);
        else out.logprobs[t] = z[i - first] - lse;
      for (int64_t i = first; i < end; i++) {
        const int64_t v = l.ids[i];
        if (v < 0 || v >= c.V) continue;
        const double p = std::exp(z[i - first] - lse), factor = c.scale * slope[i - first];
        const bool mine = v == c.tokens[t];
        const double of_feature = factor * (mine ? others : -p);
        const double log_p = z[i - first] - lse, of_entropy = p == 0 ? 0 : -p * (log_p + H);
        const double dz = (in.g[t] * (mine ? others : -p) + in.e[t] * of_entropy) * factor / c.temperature;
        for (int64_t k = 0; k < c.d; k++) {
          out.features[s * c.d + k] += alpha * of_feature * c.weight.get(v, k);
          out.hidden[t * c.d + k] += dz * c.weight.get(v, k);
          out.weight[v * c.d + k] += dz * c.hidden.get(t, k);
        }
      }
    }
    for (int64_t k = 0; k < c.d; k++) out.features[s * c.d + k] /= total;
  }
  return out;
}

double largest(const std::vector<double>& values) {
  double most = 0;
  for (double x : values)
    if (std::isfinite(x)) most = std::max(most, std::abs(x));
  return most;
}

template <class T>
void expect_all(const std::vector<T>& actual, const std::vector<double>& exactly, double allowed, const std::string& where, const char* what) {
  expect(actual.size() == exactly.size(), where, what);
  for (size_t i = 0; i < exactly.size(); i++) expect_near(actual[i], exactly[i], allowed, where, what, i);
}

struct Found {
  Outputs outputs;
  std::vector<float> x, dz, hidden;
  Array weight;
  std::vector<double> partial, target;
  std::vector<int64_t> top;

  explicit Found(const Case& c) : outputs(c), weight(c.dtype, c.V, c.d, Layout::padded_rows) {}
  bool same(const Found& o) const {
    return outputs.same(o.outputs) && same_bits(x, o.x) && same_bits(dz, o.dz) && same_bits(hidden, o.hidden) &&
           same_bits(weight.floats, o.weight.floats) && weight.halves == o.weight.halves;
  }
};

Found everything(const Case& c, const Lists& l, const Incoming& in, Isa isa, g2rl::Parallel parallel) {
  Found found(c);
  const int64_t K = l.ids.size();
  g2rl::SupportArgs args{};
  args.head = arguments(c, found.outputs), args.ids = l.ids.data(), args.offsets = l.offsets.data();
  g2rl::support_features(args, isa, parallel);

  found.x.assign(K, float(kNan)), found.partial.assign(4 * c.N, kNan), found.target.assign(c.N, kNan), found.top.assign(c.N, -7);
  args.x = found.x.data();
  args.head.features = nullptr, args.head.partial = found.partial.data(), args.head.target = found.target.data();
  args.head.top = found.top.data(), args.head.statistics = true;
  g2rl::support_features(args, isa, parallel);

  std::vector<float> logprobs(c.N), entropy(c.N), normaliser(2 * c.N), rest(c.N), squares(c.N), top_logprob(c.N), terms(3 * c.N);
  std::vector<int64_t> top_token(c.N);
  const g2rl::Parts parts{found.partial.data(), 1, found.target.data(), c.tokens.data(), found.top.data()};
  g2rl::finish_tokens(parts, c.N, {logprobs.data(), entropy.data(), normaliser.data(), rest.data(), squares.data(), top_logprob.data(),
                                   top_token.data()}, parallel);
  expect(same_bits(logprobs, found.outputs.logprobs) && same_bits(entropy, found.outputs.entropy), c.name(),
         "log-probs and entropies of the two calls differ");
  g2rl::token_terms(in.g.data(), in.e.data(), logprobs.data(), entropy.data(), c.N, terms.data(), parallel);
  found.dz.assign(K, float(kNan));
  g2rl::support_terms(args, normaliser.data(), terms.data(), found.dz.data(), parallel);

  found.hidden.assign(c.N * c.d, float(kNan));
  const g2rl::Matrix weight{c.weight.data(), c.weight.stride0, c.weight.stride1};
  g2rl::gather_sum({found.dz.data(), l.ids.data(), l.offsets.data(), c.dtype, weight, K, c.N, c.V, c.d, DType::f32,
                    reinterpret_cast<char*>(found.hidden.data()), c.d}, isa, parallel);

  // Entries in the order of their ids; those outside stand before and behind the lists.
  std::vector<int64_t> order(K), row(K), rows(K), ends(c.V + 1);
  for (int64_t t = 0; t < c.N; t++)
    for (int64_t i = l.offsets[t]; i < l.offsets[t + 1]; i++) order[i] = i, row[i] = t;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return l.ids[a] < l.ids[b]; });
  std::vector<float> sorted(K);
  for (int64_t i = 0; i < K; i++) sorted[i] = found.dz[order[i]], rows[i] = row[order[i]];
  for (int64_t v = 0; v <= c.V; v++)
    ends[v] = std::partition_point(order.begin(), order.end(), [&](int64_t i) { return l.ids[i] < v; }) - order.begin();
  const g2rl::Matrix hidden{c.hidden.data(), c.hidden.stride0, c.hidden.stride1};
  char* out = c.dtype == DType::f32 ? reinterpret_cast<char*>(found.weight.floats.data()) : reinterpret_cast<char*>(found.weight.halves.data());
  g2rl::gather_sum({sorted.data(), rows.data(), ends.data(), c.dtype, hidden, K, c.V, c.N, c.d, c.dtype, out, found.weight.stride0}, isa,
                   parallel);
  return found;
}

void check(const Case& c, bool others) {
  const Lists lists(c, others);
  Incoming in;
  for (int64_t t = 0; t < c.N; t++) in.g.push_back(float(bell())), in.e.push_back(float(bell()));
  const Exact exactly = exact(c, lists, in);
  const double size = largest(exactly.x) / c.temperature + 4, off = kUnit * 30 * size;
  for (Isa isa : instruction_sets()) {
    const std::string where = std::string(g2rl::isa_name(isa)) + " support " + c.name();
    const Found found = everything(c, lists, in, isa, one_thread);
    expect(found.same(everything(c, lists, in, isa, three_threads)), where, "threads change the bits");
    expect_all(found.x, exactly.x, off * c.temperature, where, "x");
    expect_all(found.outputs.logprobs, exactly.logprobs, off, where, "logprobs");
    expect_all(found.outputs.logsumexp, exactly.logsumexp, off, where, "logsumexp");
    expect_all(found.outputs.entropy, exactly.entropy, off * (1 + largest(exactly.entropy)), where, "entropy");
    expect_all(found.outputs.features, exactly.features, off * (largest(exactly.features) + 1), where, "features");
    expect_all(found.hidden, exactly.hidden, off * (largest(exactly.hidden) + 1), where, "gradient of hidden");
    std::vector<double> weight;
    for (int64_t v = 0; v < c.V; v++)
      for (int64_t k = 0; k < c.d; k++) weight.push_back(found.weight.get(v, k));
    const double rounded = c.dtype == DType::f32 ? 0 : c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
    expect_all(weight, exactly.weight, (off + rounded) * (largest(exactly.weight) + 1), where, "gradient of weight");
  }
}

}  // namespace

void test_support() {
  const int64_t dims[] = {1, 6, 16, 33, 64, 700};
  int64_t at = 0;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t V : {1, 7, 96, 400})
      for (int64_t N : {0, 1, 17, 60}) {
        Options o;
        o.dtype = dtype, o.V = V, o.d = dims[at++ % 6], o.lengths = {N / 2, 0, N - N / 2};
        o.hidden_layout = Layout(below(4)), o.weight_layout = Layout(below(2) ? 0 : below(4));
        o.bias_dtype = below(2) ? DType::f32 : dtype, o.bias_stride = 1 + below(2);
        o.token_weights = below(2);
        o.temperature = below(2) ? 1.0f : 0.6f, o.scale = below(2) ? 1.0f : 1.7f, o.softcap = below(3) ? 0.0f : 3.0f;
        // A realised token that is masked has no finite log-probability: unmasked biases only.
        o.bias = V > 1 && below(2) ? Bias::peaks : Bias::none;
        if (o.bias == Bias::peaks) o.peaks = {V / 2};
        check(Case(o), below(2));
      }
}

}  // namespace tests
