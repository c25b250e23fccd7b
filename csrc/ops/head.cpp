// The operators of the LM head: schemas, checks, calls of the CPU kernels.
// Fake implementations are registered in Python (g2rl_kernels/head/cpu.py).
#include "../cpu/logprobs.h"
#include "head.h"

namespace g2rl::ops {
namespace {

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
