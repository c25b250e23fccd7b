// The operators of the head restricted to some ids a token: schemas, checks, calls of the CPU kernels.
// Fake implementations are registered in Python (g2rl_kernels/head/support/cpu.py).
#include "../cpu/support.h"

#include "head.h"

#define G2RL_SUPPORT "Tensor ids, Tensor offsets"

namespace g2rl::ops {
namespace {

// ids and offsets as the kernels take them; converted tensors live as long as `checked`.
SupportArgs with_support(Checked& checked, const Tensor& ids, const Tensor& offsets) {
  require(ids.dim() == 1, "ids has shape ", shape(ids), ", needs [K]");
  require_vector(offsets, "offsets", checked.N + 1, "N + 1");
  const int64_t K = ids.size(0);
  SupportArgs args{};
  args.ids = checked.keep(indices(ids, "ids")).const_data_ptr<int64_t>();
  const int64_t* ends = args.offsets = checked.keep(indices(offsets, "offsets")).const_data_ptr<int64_t>();
  require(ends[0] == 0 && ends[checked.N] == K, "offsets run from ", ends[0], " to ", ends[checked.N], ", need 0 to ", K);
  for (int64_t t = 0; t < checked.N; ++t) require(ends[t] <= ends[t + 1], "offsets fall at entry ", t + 1);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> support_statistics(const Head& head, const Tensor& ids, const Tensor& offsets, bool statistics) {
  Checked checked(head);
  SupportArgs args = with_support(checked, ids, offsets);
  const auto made = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) { return torch::stable::new_empty(head.hidden, sizes, dtype); };
  const Tensor partial = made({1, statistics ? 4 : 3, checked.N}, ScalarType::Double), target = made({checked.N}, ScalarType::Double);
  const Tensor top = made({1, statistics ? checked.N : 0}, ScalarType::Long), x = made({ids.size(0)}, ScalarType::Float);
  args.head = checked;
  args.head.partial = partial.mutable_data_ptr<double>();
  args.head.target = target.mutable_data_ptr<double>();
  args.head.top = top.mutable_data_ptr<int64_t>();
  args.head.statistics = statistics;
  args.x = x.mutable_data_ptr<float>();
  g2rl::support_features(args, chosen_isa(), parallel);
  return {partial, target, top, x};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> support_features(const Head& head, const Tensor& ids,
                                                                                    const Tensor& offsets, const Tensor& cu_seqlens,
                                                                                    const std::optional<Tensor>& token_weights,
                                                                                    bool statistics) {
  Checked checked(head);
  checked.require_tokens_inside();
  checked.set_responses(cu_seqlens, token_weights);
  SupportArgs args = with_support(checked, ids, offsets);
  const int64_t N = checked.N;
  const auto made = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(head.hidden, sizes, ScalarType::Float); };
  const Tensor features = made({checked.S, checked.d + checked.r}), logprobs = made({N}), logsumexp = made({N}), entropy = made({N});
  const auto [sum_p_squared, top_token, top_logprob] = new_statistics(head.hidden, N, statistics);
  args.head = checked;
  args.head.features = features.mutable_data_ptr<float>();
  args.head.logprobs = logprobs.mutable_data_ptr<float>();
  args.head.logsumexp = logsumexp.mutable_data_ptr<float>();
  args.head.entropy = entropy.mutable_data_ptr<float>();
  args.head.statistics = statistics;
  args.head.sum_p_squared = sum_p_squared.mutable_data_ptr<float>();
  args.head.top_token = top_token.mutable_data_ptr<int64_t>();
  args.head.top_logprob = top_logprob.mutable_data_ptr<float>();
  g2rl::support_features(args, chosen_isa(), parallel);
  return {features, logprobs, logsumexp, entropy, sum_p_squared, top_token, top_logprob};
}

Tensor support_terms(const Head& head, const Tensor& ids, const Tensor& offsets, const Tensor& x, const Tensor& normaliser,
                     const Tensor& terms) {
  Checked checked(head);
  SupportArgs args = with_support(checked, ids, offsets);
  args.head = checked;
  require_exactly(x, "x", ScalarType::Float, {ids.size(0)});
  require_exactly(normaliser, "normaliser", ScalarType::Float, {2, checked.N});
  require_exactly(terms, "terms", ScalarType::Float, {3, checked.N});
  args.x = const_cast<float*>(x.const_data_ptr<float>());  // read only
  const Tensor dz = torch::stable::new_empty(x, {ids.size(0)}, ScalarType::Float);
  g2rl::support_terms(args, normaliser.const_data_ptr<float>(), terms.const_data_ptr<float>(), dz.mutable_data_ptr<float>(), parallel);
  return dz;
}

void gather_sum(const Tensor& coefficients, const Tensor& index, const Tensor& offsets, const Tensor& matrix, Tensor out) {
  require(matrix.dim() == 2, "matrix has shape ", shape(matrix), ", needs [M, d]");
  require(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets has shape ", shape(offsets), ", needs [n + 1]");
  GatherSum args{};
  args.K = coefficients.size(0), args.n = offsets.size(0) - 1, args.M = matrix.size(0), args.d = matrix.size(1);
  require_exactly(coefficients, "coefficients", ScalarType::Float, {args.K});
  require_exactly(index, "index", ScalarType::Long, {args.K});
  const Tensor ends = indices(offsets, "offsets");
  args.offsets = ends.const_data_ptr<int64_t>();
  for (int64_t i = 0; i <= args.n; ++i)
    require((i == 0 ? 0 : args.offsets[i - 1]) <= args.offsets[i] && args.offsets[i] <= args.K, "offsets[", i, "] = ", args.offsets[i],
            " falls, or is above the number of coefficients, ", args.K);
  require(out.dim() == 2 && out.size(0) == args.n && out.size(1) == args.d && (out.stride(1) == 1 || args.d == 1), "out has shape ",
          shape(out), ", or strided columns; needs [n, d] = [", args.n, ", ", args.d, "]");
  args.coefficients = coefficients.const_data_ptr<float>();
  args.index = index.const_data_ptr<int64_t>();
  args.dtype = dtype_of(matrix, "matrix");
  args.matrix = {matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1)};
  args.out_dtype = dtype_of(out, "out");
  args.out = static_cast<char*>(out.mutable_data_ptr());
  args.out_stride = out.stride(0);
  g2rl::gather_sum(args, chosen_isa(), parallel);
}

}  // namespace

G2RL_LIBRARY_FRAGMENT(m) {
  m.def("support_sums(" G2RL_HEAD ", " G2RL_SUPPORT ", bool statistics) -> (Tensor partial, Tensor target, Tensor top, Tensor x)");
  m.def("support_head_features(" G2RL_HEAD ", " G2RL_SUPPORT
        ", Tensor cu_seqlens, Tensor? token_weights, bool statistics) "
        "-> (Tensor features, Tensor logprobs, Tensor logsumexp, Tensor entropy, " G2RL_STATISTICS ")");
  m.def("support_terms(" G2RL_HEAD ", " G2RL_SUPPORT ", Tensor x, Tensor normaliser, Tensor terms) -> Tensor dz");
  m.def("gather_sum(Tensor coefficients, Tensor index, Tensor offsets, Tensor matrix, Tensor(a!) out) -> ()");
}

G2RL_LIBRARY_IMPL(CPU, m) {
  m.impl("support_sums", TORCH_BOX(&Flat<&support_statistics>::call));
  m.impl("support_head_features", TORCH_BOX(&Flat<&support_features>::call));
  m.impl("support_terms", TORCH_BOX(&Flat<&support_terms>::call));
  m.impl("gather_sum", TORCH_BOX(&gather_sum));
}

}  // namespace g2rl::ops
