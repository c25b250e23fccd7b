// The torch ops (namespace g2rl) and the Python module _C.
//
// Only glue: it checks whatever could make a kernel read out of bounds, brings small tensors into the form that kernels want
// (hidden and weight are never copied: kernels take strides), allocates the outputs, and calls. Values that are merely
// senseless (a negative weight, a NaN) are for the Python layer to refuse.
//
// Everything here is PyTorch's stable ABI at its 2.11 level (TORCH_TARGET_VERSION, setup.py), valid in C++17 and C++20.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/group.h"
#include "cpu/head.h"
#include "cpu/isa.h"
#include "cpu/logprobs.h"
#ifdef WITH_CUDA
#include "cuda/group.h"
#include "cuda/stream.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python sees a ValueError.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

void require_vector(const Tensor& tensor, const char* name, int64_t length, const char* length_name) {
  require(tensor.dim() == 1 && tensor.size(0) == length, name, " has shape ", shape(tensor), ", needs [", length_name, "] = [",
          length, "]");
}

bool is_float(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::BFloat16:
    case ScalarType::Half: return true;
    default: return false;
  }
}

g2rl::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return g2rl::DType::f32;
    case ScalarType::BFloat16: return g2rl::DType::bf16;
    case ScalarType::Half: return g2rl::DType::f16;
    default: break;
  }
  require(false, name, " has a dtype that the kernels do not take; needs float32, bfloat16 or float16");
  return {};
}

Tensor contiguous(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

Tensor indices(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Long || dtype == ScalarType::Int, name, " has to be int64 or int32");
  return contiguous(tensor, ScalarType::Long);
}

Tensor floats(const Tensor& tensor, const char* name) {
  require(is_float(tensor), name, " has to be a floating-point tensor");
  return contiguous(tensor, ScalarType::Float);
}

void parallel(int64_t n, void* ctx, void (*body)(void* ctx, int64_t i)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(ctx, i);
  });
}

void require_tokens(const int64_t* tokens, int64_t N, int64_t V) {
  for (int64_t i = 0; i < N; ++i)
    require(tokens[i] >= 0 && tokens[i] < V, "tokens[", i, "] = ", tokens[i], " is outside [0, ", V, "), the rows of weight");
}

void require_cu_seqlens(const int64_t* cu, int64_t S, int64_t N) {
  require(cu[0] == 0, "cu_seqlens[0] = ", cu[0], ", needs 0");
  for (int64_t s = 0; s < S; ++s)
    require(cu[s] <= cu[s + 1], "cu_seqlens decreases: cu_seqlens[", s, "] = ", cu[s], ", cu_seqlens[", s + 1, "] = ", cu[s + 1]);
  require(cu[S] == N, "cu_seqlens ends at ", cu[S], ", needs the number of rows of hidden, ", N);
}

// The head's own arguments.  Small tensors that had to be brought into another form live in `kept`.
g2rl::HeadArgs head_args(const Tensor& hidden, const Tensor& weight, const Tensor& tokens, const std::optional<Tensor>& bias,
                         double temperature, double logit_scale, double logit_softcap, std::vector<Tensor>& kept) {
  require(hidden.dim() == 2, "hidden has shape ", shape(hidden), ", needs [N, d]");
  require(weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight has shape ", shape(weight), ", needs [V, d] with d = ",
          hidden.size(1), " as in hidden");
  require(hidden.scalar_type() == weight.scalar_type(), "hidden and weight have to be of one dtype");
  require(temperature > 0 && std::isfinite(temperature), "temperature = ", temperature, ", needs a finite number > 0");
  require(logit_softcap >= 0 && std::isfinite(logit_softcap), "logit_softcap = ", logit_softcap, ", needs a finite number > 0");

  g2rl::HeadArgs args{};
  args.N = hidden.size(0);
  args.d = hidden.size(1);
  args.V = weight.size(0);
  args.dtype = dtype_of(hidden, "hidden");
  args.hidden = {hidden.const_data_ptr(), hidden.stride(0), hidden.stride(1)};
  args.weight = {weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  require_vector(tokens, "tokens", args.N, "N");
  kept.push_back(indices(tokens, "tokens"));
  args.tokens = kept.back().const_data_ptr<int64_t>();
  if (bias) {
    require_vector(*bias, "bias", args.V, "V");
    args.bias = bias->const_data_ptr();
    args.bias_dtype = dtype_of(*bias, "bias");
    args.bias_stride = bias->stride(0);
  }
  args.temperature = static_cast<float>(temperature);
  args.logit_scale = static_cast<float>(logit_scale);
  args.logit_softcap = static_cast<float>(logit_softcap);
  return args;
}

void add_responses(g2rl::HeadArgs& args, const Tensor& cu_seqlens, const std::optional<Tensor>& token_weights, std::vector<Tensor>& kept) {
  require(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens has shape ", shape(cu_seqlens), ", needs [S + 1]");
  args.S = cu_seqlens.size(0) - 1;
  kept.push_back(indices(cu_seqlens, "cu_seqlens"));
  args.cu_seqlens = kept.back().const_data_ptr<int64_t>();
  require_cu_seqlens(args.cu_seqlens, args.S, args.N);
  if (token_weights) {
    require_vector(*token_weights, "token_weights", args.N, "N");
    kept.push_back(floats(*token_weights, "token_weights"));
    args.token_weights = kept.back().const_data_ptr<float>();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> head_features(const Tensor& hidden, const Tensor& weight, const Tensor& tokens,
                                                         const Tensor& cu_seqlens, const std::optional<Tensor>& bias,
                                                         const std::optional<Tensor>& token_weights,
                                                         const std::optional<Tensor>& known_logprobs, double temperature,
                                                         double logit_scale, double logit_softcap) {
  std::vector<Tensor> kept;
  g2rl::HeadArgs args = head_args(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, kept);
  require_tokens(args.tokens, args.N, args.V);
  add_responses(args, cu_seqlens, token_weights, kept);
  // The CPU pass has the logsumexp of a token before it needs it, so it gains nothing from known_logprobs.
  if (known_logprobs) require_vector(*known_logprobs, "known_logprobs", args.N, "N");

  const Tensor features = torch::stable::new_empty(hidden, {args.S, args.d}, ScalarType::Float);
  const Tensor logprobs = torch::stable::new_empty(hidden, {args.N}, ScalarType::Float);
  const Tensor logsumexp = torch::stable::new_empty(hidden, {args.N}, ScalarType::Float);
  const Tensor entropy = torch::stable::new_empty(hidden, {args.N}, ScalarType::Float);
  args.features = features.mutable_data_ptr<float>();
  args.logprobs = logprobs.mutable_data_ptr<float>();
  args.logsumexp = logsumexp.mutable_data_ptr<float>();
  args.entropy = entropy.mutable_data_ptr<float>();

  g2rl::head_features(args, g2rl::chosen_isa(), parallel);
  return {features, logprobs, logsumexp, entropy};
}

// Of a vocabulary, or of a part of it: tokens outside [0, V) are elsewhere.
std::tuple<Tensor, Tensor> head_statistics(const Tensor& hidden, const Tensor& weight, const Tensor& tokens,
                                           const std::optional<Tensor>& bias, double temperature, double logit_scale,
                                           double logit_softcap) {
  std::vector<Tensor> kept;
  g2rl::HeadArgs args = head_args(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, kept);
  const int64_t all[2] = {0, args.N};
  args.cu_seqlens = all;
  args.S = 1;
  const Tensor partial = torch::stable::new_empty(hidden, {1, 3, args.N}, ScalarType::Double);
  const Tensor target = torch::stable::new_empty(hidden, {args.N}, ScalarType::Double);
  args.partial = partial.mutable_data_ptr<double>();
  args.target = target.mutable_data_ptr<double>();
  g2rl::head_features(args, g2rl::chosen_isa(), parallel);
  return {partial, target};
}

Tensor head_features_of_part(const Tensor& hidden, const Tensor& weight, const Tensor& tokens, const Tensor& cu_seqlens,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& token_weights, const Tensor& logsumexp,
                             const Tensor& rest, double temperature, double logit_scale, double logit_softcap) {
  std::vector<Tensor> kept;
  g2rl::HeadArgs args = head_args(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, kept);
  add_responses(args, cu_seqlens, token_weights, kept);
  require_vector(logsumexp, "logsumexp", args.N, "N");
  require_vector(rest, "rest", args.N, "N");
  const Tensor lse = contiguous(logsumexp, ScalarType::Double), others = contiguous(rest, ScalarType::Double);
  args.lse = lse.const_data_ptr<double>();
  args.rest = others.const_data_ptr<double>();
  const Tensor features = torch::stable::new_empty(hidden, {args.S, args.d}, ScalarType::Float);
  args.features = features.mutable_data_ptr<float>();
  g2rl::head_features(args, g2rl::chosen_isa(), parallel);
  return features;
}

void require_sum(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == dtype;
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(i) == sizes[i];
  require(fits, name, " has shape ", shape(tensor), ", or another dtype, or is not contiguous");
}

void logprobs_sweep(const Tensor& hidden, const Tensor& weight, const Tensor& tokens, const std::optional<Tensor>& bias,
                    const Tensor& normaliser, const Tensor& terms, double temperature, double logit_scale, double logit_softcap,
                    int64_t begin, int64_t end, std::optional<Tensor> sum_hidden, std::optional<Tensor> grad_weight,
                    std::optional<Tensor> grad_bias) {
  std::vector<Tensor> kept;
  g2rl::SweepArgs args{};
  args.head = head_args(hidden, weight, tokens, bias, temperature, logit_scale, logit_softcap, kept);
  const int64_t N = args.head.N, d = args.head.d, V = args.head.V;
  require(0 <= begin && begin <= end && end <= V, "begin = ", begin, ", end = ", end, ", needs 0 <= begin <= end <= V = ", V);
  const Tensor two = floats(normaliser, "normaliser"), three = floats(terms, "terms");
  require_sum(two, "normaliser", ScalarType::Float, {2, N});
  require_sum(three, "terms", ScalarType::Float, {3, N});
  args.normaliser = two.const_data_ptr<float>();
  args.terms = three.const_data_ptr<float>();
  args.begin = begin;
  args.end = end;
  if (sum_hidden) {
    require_sum(*sum_hidden, "sum_hidden", ScalarType::Float, {N, d});
    args.sum_hidden = sum_hidden->mutable_data_ptr<float>();
  }
  if (grad_weight) {
    require_sum(*grad_weight, "grad_weight", weight.scalar_type(), {V, d});
    args.grad_weight = grad_weight->mutable_data_ptr();
  }
  if (grad_bias) {
    require_sum(*grad_bias, "grad_bias", ScalarType::Float, {V});
    args.grad_bias = grad_bias->mutable_data_ptr<float>();
  }
  g2rl::logprobs_sweep(args, g2rl::chosen_isa(), parallel);
}

// What group_geometry takes and gives, on whatever device.
struct Group {
  Tensor features, rewards, members;
  Tensor similarity, score, shaped_rewards, advantages;
  int64_t S, d, B, M;
  g2rl::GroupOptions options;
};

Group prepare_group(const Tensor& features, const Tensor& rewards, const Tensor& members, double lam, double clip, int64_t shaping,
                    int64_t score, int64_t scale, bool skip_uniform, double eps) {
  require(features.dim() == 2, "features has shape ", shape(features), ", needs [S, d]");
  require_vector(rewards, "rewards", features.size(0), "S");
  require(members.dim() == 2, "members has shape ", shape(members), ", needs [B, M]");
  require(shaping >= 0 && shaping <= 3, "shaping = ", shaping, ", needs 0 (none), 1 (intent), 2 (equation) or 3 (right)");
  require(score >= 0 && score <= 1, "score = ", score, ", needs 0 (linear) or 1 (sqrt)");
  require(scale >= 0 && scale <= 2, "scale = ", scale, ", needs 0 (none), 1 (group) or 2 (batch)");
  require(eps > 0 && std::isfinite(eps), "eps = ", eps, ", needs a finite number > 0");

  const int64_t S = features.size(0), d = features.size(1), B = members.size(0), M = members.size(1);
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(features, size, ScalarType::Float);
  };
  return {floats(features, "features"),
          floats(rewards, "rewards"),
          indices(members, "members"),
          empty({B, M, M}),
          empty({S}),
          empty({S}),
          empty({S}),
          S,
          d,
          B,
          M,
          {lam, clip, eps, static_cast<g2rl::Shaping>(shaping), static_cast<g2rl::Score>(score), static_cast<g2rl::Scale>(scale),
           skip_uniform}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_geometry(const Tensor& features, const Tensor& rewards, const Tensor& members,
                                                          double lam, double clip, int64_t shaping, int64_t score, int64_t scale,
                                                          bool skip_uniform, double eps) {
  const Group group = prepare_group(features, rewards, members, lam, clip, shaping, score, scale, skip_uniform, eps);
  g2rl::GroupArgs args{};
  args.features = group.features.const_data_ptr<float>();
  args.rewards = group.rewards.const_data_ptr<float>();
  args.members = group.members.const_data_ptr<int64_t>();
  args.S = group.S;
  args.d = group.d;
  args.B = group.B;
  args.M = group.M;
  args.options = group.options;
  args.similarity = group.similarity.mutable_data_ptr<float>();
  args.score = group.score.mutable_data_ptr<float>();
  args.shaped_rewards = group.shaped_rewards.mutable_data_ptr<float>();
  args.advantages = group.advantages.mutable_data_ptr<float>();

  const int64_t bad = g2rl::bad_member(args.members, args.B * args.M, args.S);
  require(bad < 0, "members[", bad < 0 ? 0 : bad / args.M, ", ", bad < 0 ? 0 : bad % args.M, "] = ", bad < 0 ? 0 : args.members[bad],
          " is no row of features (", args.S, " rows) or names a row for the second time");
  g2rl::group_geometry(args, parallel);
  return {group.similarity, group.score, group.shaped_rewards, group.advantages};
}

Tensor group_members(const Tensor& ids) {
  require(ids.dim() == 1, "ids has shape ", shape(ids), ", needs [S]");
  const Tensor given = indices(ids, "ids");
  const int64_t S = given.size(0);
  const Tensor index = torch::stable::new_empty(given, {S});
  const g2rl::GroupShape found = g2rl::index_groups(given.const_data_ptr<int64_t>(), S, index.mutable_data_ptr<int64_t>());
  const Tensor members = torch::stable::new_empty(given, {found.B, found.M});
  g2rl::fill_members(index.const_data_ptr<int64_t>(), S, found, members.mutable_data_ptr<int64_t>());
  return members;
}

#ifdef WITH_CUDA
std::tuple<Tensor, Tensor, Tensor, Tensor> group_geometry_cuda(const Tensor& features, const Tensor& rewards, const Tensor& members,
                                                               double lam, double clip, int64_t shaping, int64_t score,
                                                               int64_t scale, bool skip_uniform, double eps) {
  const g2rl::CurrentStream current_stream = g2rl::current_cuda_stream();
  require(current_stream != nullptr, "features are on a GPU, but this torch has no CUDA");
  require(features.is_cuda() && rewards.is_cuda() && members.is_cuda() &&
              rewards.get_device_index() == features.get_device_index() && members.get_device_index() == features.get_device_index(),
          "features, rewards and members have to be on one device");
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Group group = prepare_group(features, rewards, members, lam, clip, shaping, score, scale, skip_uniform, eps);
  const int64_t doubles = g2rl_cuda_group_workspace(group.B, group.M, static_cast<int>(scale));
  const Tensor workspace = torch::stable::new_empty(group.features, {doubles}, ScalarType::Double);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(features.get_device_index(), &stream));
  const g2rl::GroupOptions& options = group.options;
  const int error = g2rl_cuda_group_geometry(
      group.features.const_data_ptr<float>(), group.rewards.const_data_ptr<float>(), group.members.const_data_ptr<int64_t>(),
      group.S, group.d, group.B, group.M, options.lam, options.clip, static_cast<int>(options.shaping),
      static_cast<int>(options.score), static_cast<int>(options.scale), options.skip_uniform, options.eps,
      workspace.mutable_data_ptr<double>(), group.similarity.mutable_data_ptr<float>(), group.score.mutable_data_ptr<float>(),
      group.shaped_rewards.mutable_data_ptr<float>(), group.advantages.mutable_data_ptr<float>(), stream);
  if (error != 0) throw std::runtime_error("g2rl::group_geometry: CUDA launch failed with cudaError_t " + std::to_string(error));
  return {group.similarity, group.score, group.shaped_rewards, group.advantages};
}
#endif

}  // namespace

// Fake implementations are registered in Python, beside the public functions (head.py, group.py).
STABLE_TORCH_LIBRARY(g2rl, m) {
  m.def(
      "head_features(Tensor hidden, Tensor weight, Tensor tokens, Tensor cu_seqlens, Tensor? bias, Tensor? token_weights, "
      "Tensor? known_logprobs, float temperature, float logit_scale, float logit_softcap) "
      "-> (Tensor features, Tensor logprobs, Tensor logsumexp, Tensor entropy)");
  m.def(
      "head_statistics(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, float temperature, float logit_scale, "
      "float logit_softcap) -> (Tensor partial, Tensor target)");
  m.def(
      "head_features_of_part(Tensor hidden, Tensor weight, Tensor tokens, Tensor cu_seqlens, Tensor? bias, Tensor? token_weights, "
      "Tensor logsumexp, Tensor rest, float temperature, float logit_scale, float logit_softcap) -> Tensor features");
  m.def(
      "logprobs_sweep(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, Tensor normaliser, Tensor terms, "
      "float temperature, float logit_scale, float logit_softcap, int begin, int end, Tensor(a!)? sum_hidden, "
      "Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def(
      "group_geometry(Tensor features, Tensor rewards, Tensor members, float lam, float clip, int shaping, int score, int scale, "
      "bool skip_uniform, float eps) -> (Tensor similarity, Tensor scores, Tensor shaped_rewards, Tensor advantages)");
  m.def("group_members(Tensor ids) -> Tensor members");
}

STABLE_TORCH_LIBRARY_IMPL(g2rl, CPU, m) {
  m.impl("head_features", TORCH_BOX(&head_features));
  m.impl("head_statistics", TORCH_BOX(&head_statistics));
  m.impl("head_features_of_part", TORCH_BOX(&head_features_of_part));
  m.impl("logprobs_sweep", TORCH_BOX(&logprobs_sweep));
  m.impl("group_geometry", TORCH_BOX(&group_geometry));
  m.impl("group_members", TORCH_BOX(&group_members));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(g2rl, CUDA, m) { m.impl("group_geometry", TORCH_BOX(&group_geometry_cuda)); }
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " + std::string(__clang_version__);
#else
  return "gcc " + std::string(__VERSION__);
#endif
}

// No date and no path: the same sources and tools give the same answer.
py::dict build_info() {
  using namespace py::literals;
  py::object cuda = py::none(), cuda_archs = py::none();
#ifdef WITH_CUDA
  cuda = py::str(G2RL_CUDA);
  cuda_archs = py::str(G2RL_CUDA_ARCHS).attr("split")();
#endif
  const auto target = static_cast<unsigned long long>(TORCH_TARGET_VERSION);
  return py::dict("version"_a = G2RL_VERSION, "torch_built_with"_a = TORCH_VERSION,
                  "torch_target"_a = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff),
                  "compiler"_a = compiler(), "cxx_standard"_a = static_cast<long>(__cplusplus), "cuda"_a = cuda,
                  "cuda_archs"_a = cuda_archs);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "g2rl-kernels' compiled part. Its import registers the torch ops of namespace g2rl.";
  py::tuple names(g2rl::kIsaCount);
  for (int i = 0; i < g2rl::kIsaCount; ++i) names[i] = g2rl::isa_name(static_cast<g2rl::Isa>(i));
  m.attr("isa_names") = names;  // lowest first
  m.def("best_isa", [] { return g2rl::isa_name(g2rl::best_isa()); }, "The highest instruction set that this CPU can run.");
  m.def("chosen_isa", [] { return g2rl::isa_name(g2rl::chosen_isa()); },
        "The one that the kernels use: best_isa(), lowered by the environment variable G2RL_CPU_ISA.\n"
        "Raises ValueError where that names no instruction set, or one that this CPU lacks.");
  m.def("build_info", &build_info, "How this module was built: versions, compiler, CUDA (None: left out).");
}
