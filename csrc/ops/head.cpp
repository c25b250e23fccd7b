// The operators of the LM head: schemas, checks, calls of the CPU kernels.
// Fake implementations are registered in Python (g2rl_kernels/head/cpu.py).
#include <vector>

#include "../cpu/head.h"
#include "../cpu/logprobs.h"
#include "arguments.h"

// The first arguments of every schema: hidden, tokens, and HEAD_SCHEMA of g2rl_kernels/head/spec.py.
#define G2RL_HEAD                                                                                     \
  "Tensor hidden, Tensor tokens, Tensor weight, Tensor? bias, float temperature, float logit_scale, " \
  "float logit_softcap, Tensor? temperatures, Tensor? low_hidden, Tensor? low_weight"

// The last results where statistics are asked for; else empty.
#define G2RL_STATISTICS "Tensor sum_p_squared, Tensor top_token, Tensor top_logprob"

namespace g2rl::ops {
namespace {

// The same arguments in C++.
struct Head {
  const Tensor &hidden, &tokens, &weight;
  const std::optional<Tensor>& bias;
  double temperature, logit_scale, logit_softcap;  // softcap 0: no softcap
  const std::optional<Tensor>&temperatures, &low_hidden, &low_weight;
};

// TORCH_BOX takes functions of single arguments. Flat<&op>::call is one for an `op` of a Head and further arguments.
template <auto op>
struct Flat;
template <class Result, class... Rest, Result (*op)(const Head&, Rest...)>
struct Flat<op> {
  static Result call(const Tensor& hidden, const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& bias,
                     double temperature, double logit_scale, double logit_softcap, const std::optional<Tensor>& temperatures,
                     const std::optional<Tensor>& low_hidden, const std::optional<Tensor>& low_weight, Rest... rest) {
    return op({hidden, tokens, weight, bias, temperature, logit_scale, logit_softcap, temperatures, low_hidden, low_weight}, rest...);
  }
};

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  require(false, name, " has a dtype that the kernels do not take; needs float32, bfloat16 or float16");
  return {};
}

// Arguments of the kernels, checked, without outputs. Converted tensors live as long as this object.
struct Checked : HeadArgs {
  explicit Checked(const Head& head) : HeadArgs{} {
    const Tensor &h = head.hidden, &w = head.weight;
    require(h.dim() == 2, "hidden has shape ", shape(h), ", needs [N, d]");
    require(w.dim() == 2 && w.size(1) == h.size(1), "weight has shape ", shape(w), ", needs [V, d] with d = ", h.size(1),
            " as in hidden");
    require(h.scalar_type() == w.scalar_type(), "hidden and weight have to be of one dtype");
    require(head.temperature > 0 && std::isfinite(head.temperature), "temperature = ", head.temperature,
            ", needs a finite number > 0");
    require(head.logit_softcap >= 0 && std::isfinite(head.logit_softcap), "logit_softcap = ", head.logit_softcap,
            ", needs a finite number > 0, or 0 for no softcap");
    N = h.size(0), d = h.size(1), V = w.size(0);
    dtype = dtype_of(h, "hidden");
    hidden = {h.const_data_ptr(), h.stride(0), h.stride(1)};
    weight = {w.const_data_ptr(), w.stride(0), w.stride(1)};
    if (head.low_weight) set_low_rank(head);
    require_vector(head.tokens, "tokens", N, "N");
    tokens = keep(indices(head.tokens, "tokens")).const_data_ptr<int64_t>();
    if (head.bias) {
      require_vector(*head.bias, "bias", V, "V");
      bias = head.bias->const_data_ptr();
      bias_dtype = dtype_of(*head.bias, "bias");
      bias_stride = head.bias->stride(0);
    }
    temperature = static_cast<float>(head.temperature);
    if (head.temperatures) {
      require_vector(*head.temperatures, "temperatures", N, "N");
      temperatures = keep(floats(*head.temperatures, "temperatures")).const_data_ptr<float>();
      for (int64_t i = 0; i < N; ++i)
        require(temperatures[i] > 0 && std::isfinite(temperatures[i]), "temperatures[", i, "] = ", temperatures[i],
                ", needs a finite number > 0");
    }
    logit_scale = static_cast<float>(head.logit_scale);
    logit_softcap = static_cast<float>(head.logit_softcap);
  }

  void set_low_rank(const Head& head) {
    require(head.low_hidden.has_value(), "low_weight is given, needs low_hidden too");
    const Tensor &u = *head.low_hidden, &b = *head.low_weight;
    require(b.dim() == 2 && b.size(0) == V && b.size(1) > 0, "low_weight has shape ", shape(b), ", needs [V, r] with V = ", V, ", r > 0");
    r = b.size(1);
    require(u.dim() == 2 && u.size(0) == N && u.size(1) == r, "low_hidden has shape ", shape(u), ", needs [N, r] = [", N, ", ", r, "]");
    require(u.scalar_type() == head.hidden.scalar_type() && b.scalar_type() == head.hidden.scalar_type(),
            "low_hidden and low_weight have to be of the dtype of hidden");
    low_hidden = {u.const_data_ptr(), u.stride(0), u.stride(1)};
    low_weight = {b.const_data_ptr(), b.stride(0), b.stride(1)};
  }

  void require_tokens_inside() const {
    for (int64_t i = 0; i < N; ++i)
      require(tokens[i] >= 0 && tokens[i] < V, "tokens[", i, "] = ", tokens[i], " is outside [0, ", V, "), the rows of weight");
  }

  void set_responses(const Tensor& ends, const std::optional<Tensor>& alpha) {
    require(ends.dim() == 1 && ends.size(0) >= 1, "cu_seqlens has shape ", shape(ends), ", needs [S + 1]");
    S = ends.size(0) - 1;
    const int64_t* cu = cu_seqlens = keep(indices(ends, "cu_seqlens")).const_data_ptr<int64_t>();
    require(cu[0] == 0, "cu_seqlens[0] = ", cu[0], ", needs 0");
    for (int64_t s = 0; s < S; ++s)
      require(cu[s] <= cu[s + 1], "cu_seqlens decreases: cu_seqlens[", s, "] = ", cu[s], ", cu_seqlens[", s + 1, "] = ", cu[s + 1]);
    require(cu[S] == N, "cu_seqlens ends at ", cu[S], ", needs the number of rows of hidden, ", N);
    if (!alpha) return;
    require_vector(*alpha, "token_weights", N, "N");
    token_weights = keep(floats(*alpha, "token_weights")).const_data_ptr<float>();
  }

  const Tensor& keep(const Tensor& tensor) { return held.emplace_back(tensor); }

 private:
  std::vector<Tensor> held;
};

// sum_p_squared, top_token, top_logprob of N tokens; of none where statistics are not asked for.
std::tuple<Tensor, Tensor, Tensor> new_statistics(const Tensor& like, int64_t N, bool statistics) {
  const int64_t n = statistics ? N : 0;
  const auto made = [&](ScalarType dtype) { return torch::stable::new_empty(like, {n}, dtype); };
  return {made(ScalarType::Float), made(ScalarType::Long), made(ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_features(const Head& head, const Tensor& cu_seqlens,
                                                                                 const std::optional<Tensor>& token_weights,
                                                                                 const std::optional<Tensor>& known_logprobs,
                                                                                 bool statistics) {
  Checked args(head);
  args.require_tokens_inside();
  args.set_responses(cu_seqlens, token_weights);
  if (known_logprobs) {
    require_vector(*known_logprobs, "known_logprobs", args.N, "N");
    args.known_logprobs = args.keep(floats(*known_logprobs, "known_logprobs")).const_data_ptr<float>();
  }

  const Tensor features = torch::stable::new_empty(head.hidden, {args.S, args.d + args.r}, ScalarType::Float);
  const Tensor logprobs = torch::stable::new_empty(head.hidden, {args.N}, ScalarType::Float);
  const Tensor logsumexp = torch::stable::new_empty(head.hidden, {args.N}, ScalarType::Float);
  const Tensor entropy = torch::stable::new_empty(head.hidden, {args.N}, ScalarType::Float);
  args.features = features.mutable_data_ptr<float>();
  args.logprobs = logprobs.mutable_data_ptr<float>();
  args.logsumexp = logsumexp.mutable_data_ptr<float>();
  args.entropy = entropy.mutable_data_ptr<float>();
  const auto [sum_p_squared, top_token, top_logprob] = new_statistics(head.hidden, args.N, statistics);
  args.statistics = statistics;
  args.sum_p_squared = sum_p_squared.mutable_data_ptr<float>();
  args.top_token = top_token.mutable_data_ptr<int64_t>();
  args.top_logprob = top_logprob.mutable_data_ptr<float>();
  g2rl::head_features(args, chosen_isa(), parallel);
  return {features, logprobs, logsumexp, entropy, sum_p_squared, top_token, top_logprob};
}

// weight may be one rank's rows of a larger vocabulary: tokens outside [0, V) belong to other ranks.
// kept: bytes for whole blocks of logits. tokens: those of the forward pass; first: the one that this call begins with.
KeptLogits kept_logits(const HeadArgs& args, const std::optional<Tensor>& kept, int64_t tokens, int64_t first) {
  if (!kept || kept->numel() == 0 || tokens == 0) return {};
  require(kept->dim() == 1 && kept->scalar_type() == ScalarType::Byte && kept->is_contiguous(), "kept has to be contiguous bytes");
  require(0 <= first && first % 16 == 0 && first + args.N <= tokens, "kept_first = ", first, ", needs a multiple of 16, at most ",
          tokens - args.N);
  KeptLogits found{};
  const bool rounded = args.dtype == DType::bf16 && (!args.bias || args.bias_dtype != DType::f32);
  found.size = rounded && args.logit_softcap == 0 ? 2 : 4;
  found.groups = (tokens + 15) / 16;
  found.group = first / 16;
  const int64_t bytes = KeptLogits::block_bytes(found.groups, found.size), all = (args.V + kBlock - 1) / kBlock;
  found.blocks = kept->numel() / bytes;
  found.first = all - found.blocks;
  require(found.blocks * bytes == kept->numel() && found.first >= 0, "kept has ", kept->numel(), " bytes, needs a multiple of ", bytes,
          ", at most ", all * bytes);
  found.data = static_cast<char*>(kept->mutable_data_ptr());
  return found;
}

std::tuple<Tensor, Tensor, Tensor> head_statistics(const Head& head, std::optional<Tensor> kept, bool statistics) {
  Checked args(head);
  args.kept = kept_logits(args, kept, args.N, 0);
  const int64_t all[2] = {0, args.N};
  args.cu_seqlens = all;
  args.S = 1;
  const Tensor partial = torch::stable::new_empty(head.hidden, {1, statistics ? 4 : 3, args.N}, ScalarType::Double);
  const Tensor target = torch::stable::new_empty(head.hidden, {args.N}, ScalarType::Double);
  args.partial = partial.mutable_data_ptr<double>();
  const Tensor top = torch::stable::new_empty(head.hidden, {1, statistics ? args.N : 0}, ScalarType::Long);
  args.target = target.mutable_data_ptr<double>();
  args.top = top.mutable_data_ptr<int64_t>();
  args.statistics = statistics;
  g2rl::head_features(args, chosen_isa(), parallel);
  return {partial, target, top};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_finish(const Tensor& partial, const Tensor& target,
                                                                               const Tensor& tokens, const Tensor& top) {
  const bool statistics = partial.dim() == 3 && partial.size(1) == 4;
  require(partial.dim() == 3 && (statistics || partial.size(1) == 3), "partial has shape ", shape(partial), ", needs [R, 3 or 4, N]");
  const int64_t R = partial.size(0), N = partial.size(2);
  require_vector(target, "target", N, "N");
  require_vector(tokens, "tokens", N, "N");
  require(!statistics || (top.dim() == 2 && top.size(0) == R && top.size(1) == N), "top has shape ", shape(top), ", needs [R, N]");
  const Tensor sums = contiguous(partial, ScalarType::Double), own = contiguous(target, ScalarType::Double);
  const Tensor realised = indices(tokens, "tokens"), first = indices(top, "top");
  const Parts parts{sums.const_data_ptr<double>(), R, own.const_data_ptr<double>(), realised.const_data_ptr<int64_t>(),
                    statistics ? first.const_data_ptr<int64_t>() : nullptr};
  const auto made = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(target, sizes, ScalarType::Float); };
  const Tensor logprobs = made({N}), entropy = made({N}), normaliser = made({2, N}), rest = made({N});
  const auto [sum_p_squared, top_token, top_logprob] = new_statistics(target, N, statistics);
  const auto data = [](const Tensor& t) { return t.mutable_data_ptr<float>(); };
  finish_tokens(parts, N,
                {data(logprobs), data(entropy), data(normaliser), data(rest), data(sum_p_squared), data(top_logprob),
                 top_token.mutable_data_ptr<int64_t>()},
                parallel);
  return {logprobs, entropy, normaliser, rest, sum_p_squared, top_token, top_logprob};
}

Tensor head_terms(const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& logprobs, const Tensor& entropy) {
  require(logprobs.dim() == 1, "logprobs has shape ", shape(logprobs), ", needs [N]");
  const int64_t N = logprobs.size(0);
  const Tensor* given[] = {&grad_logprobs, &grad_entropy, &logprobs, &entropy};
  const char* names[] = {"grad_logprobs", "grad_entropy", "logprobs", "entropy"};
  std::vector<Tensor> rows;
  for (int i = 0; i < 4; ++i) {
    require_vector(*given[i], names[i], N, "N");
    rows.push_back(floats(*given[i], names[i]));
  }
  const Tensor terms = torch::stable::new_empty(logprobs, {3, N}, ScalarType::Float);
  const auto data = [&](int i) { return rows[i].const_data_ptr<float>(); };
  token_terms(data(0), data(1), data(2), data(3), N, terms.mutable_data_ptr<float>(), parallel);
  return terms;
}

Tensor head_features_of_part(const Head& head, const Tensor& cu_seqlens, const std::optional<Tensor>& token_weights,
                             const Tensor& logsumexp, const Tensor& rest) {
  Checked args(head);
  args.set_responses(cu_seqlens, token_weights);
  require_vector(logsumexp, "logsumexp", args.N, "N");
  require_vector(rest, "rest", args.N, "N");
  args.lse = args.keep(contiguous(logsumexp, ScalarType::Double)).const_data_ptr<double>();
  args.rest = args.keep(contiguous(rest, ScalarType::Double)).const_data_ptr<double>();
  const Tensor features = torch::stable::new_empty(head.hidden, {args.S, args.d + args.r}, ScalarType::Float);
  args.features = features.mutable_data_ptr<float>();
  g2rl::head_features(args, chosen_isa(), parallel);
  return features;
}

// Tensors that the kernel reads or writes as they are.
void require_exactly(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == dtype;
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(i) == sizes[i];
  require(fits, name, " has shape ", shape(tensor), ", or another dtype, or is not contiguous");
}

void head_sweep(const Head& head, const Tensor& normaliser, const Tensor& terms, int64_t begin, int64_t end,
                std::optional<Tensor> sum_hidden, std::optional<Tensor> grad_weight, std::optional<Tensor> grad_bias,
                std::optional<Tensor> sum_low_hidden, std::optional<Tensor> sum_low_weight,
                const std::optional<Tensor>& kept, int64_t kept_tokens, int64_t kept_first) {
  const Checked checked(head);
  SweepArgs args{};
  args.head = checked;
  args.head.kept = kept_logits(checked, kept, kept_tokens, kept_first);
  const int64_t N = args.head.N, d = args.head.d, V = args.head.V;
  require(0 <= begin && begin <= end && end <= V, "begin = ", begin, ", end = ", end, ", needs 0 <= begin <= end <= V = ", V);
  require(!args.head.kept.data || begin % kBlock == 0, "begin = ", begin, ", needs a multiple of ", kBlock, " with kept");
  const Tensor two = floats(normaliser, "normaliser"), three = floats(terms, "terms");
  require_exactly(two, "normaliser", ScalarType::Float, {2, N});
  require_exactly(three, "terms", ScalarType::Float, {3, N});
  args.normaliser = two.const_data_ptr<float>();
  args.terms = three.const_data_ptr<float>();
  args.begin = begin;
  args.end = end;
  if (sum_hidden) {
    require_exactly(*sum_hidden, "sum_hidden", ScalarType::Float, {N, d});
    args.sum_hidden = sum_hidden->mutable_data_ptr<float>();
  }
  if (grad_weight) {
    require_exactly(*grad_weight, "grad_weight", head.weight.scalar_type(), {V, d});
    args.grad_weight = grad_weight->mutable_data_ptr();
  }
  if (grad_bias) {
    require_exactly(*grad_bias, "grad_bias", ScalarType::Float, {V});
    args.grad_bias = grad_bias->mutable_data_ptr<float>();
  }
  if (sum_low_hidden) {
    require_exactly(*sum_low_hidden, "sum_low_hidden", ScalarType::Float, {N, args.head.r});
    args.sum_low_hidden = sum_low_hidden->mutable_data_ptr<float>();
  }
  if (sum_low_weight) {
    require_exactly(*sum_low_weight, "sum_low_weight", ScalarType::Float, {V, args.head.r});
    args.sum_low_weight = sum_low_weight->mutable_data_ptr<float>();
  }
  g2rl::head_sweep(args, chosen_isa(), parallel);
}

}  // namespace

G2RL_LIBRARY_FRAGMENT(m) {
  m.def("head_features(" G2RL_HEAD
        ", Tensor cu_seqlens, Tensor? token_weights, Tensor? known_logprobs, bool statistics) "
        "-> (Tensor features, Tensor logprobs, Tensor logsumexp, Tensor entropy, " G2RL_STATISTICS ")");
  m.def("head_statistics(" G2RL_HEAD ", Tensor(a!)? kept, bool statistics) -> (Tensor partial, Tensor target, Tensor top)");
  m.def(
      "head_finish(Tensor partial, Tensor target, Tensor tokens, Tensor top) "
      "-> (Tensor logprobs, Tensor entropy, Tensor normaliser, Tensor rest, " G2RL_STATISTICS ")");
  m.def("head_terms(Tensor grad_logprobs, Tensor grad_entropy, Tensor logprobs, Tensor entropy) -> Tensor");
  m.def("head_features_of_part(" G2RL_HEAD
        ", Tensor cu_seqlens, Tensor? token_weights, Tensor logsumexp, Tensor rest) -> Tensor features");
  m.def("head_sweep(" G2RL_HEAD
        ", Tensor normaliser, Tensor terms, int begin, int end, "
        "Tensor(a!)? sum_hidden, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
        "Tensor(d!)? sum_low_hidden, Tensor(e!)? sum_low_weight, "
        "Tensor? kept, int kept_tokens, int kept_first) -> ()");
}

G2RL_LIBRARY_IMPL(CPU, m) {
  m.impl("head_features", TORCH_BOX(&Flat<&head_features>::call));
  m.impl("head_statistics", TORCH_BOX(&Flat<&head_statistics>::call));
  m.impl("head_finish", TORCH_BOX(&head_finish));
  m.impl("head_terms", TORCH_BOX(&head_terms));
  m.impl("head_features_of_part", TORCH_BOX(&Flat<&head_features_of_part>::call));
  m.impl("head_sweep", TORCH_BOX(&Flat<&head_sweep>::call));
}

}  // namespace g2rl::ops
