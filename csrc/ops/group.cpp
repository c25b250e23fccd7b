// The operators of the group geometry: schemas, checks, calls of the CPU and CUDA kernels.
// Fake implementations are registered in Python (g2rl_kernels/group/geometry.py).
#include "../cpu/group.h"

#include "arguments.h"
#ifdef WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/group.h"
#include "../cuda/stream.h"
#endif

namespace g2rl::ops {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// TORCH_BOX takes functions of single arguments. Flat<&op>::call is one that checks the numbers among them and hands them
// on as GroupOptions.
template <auto op>
struct Flat;
template <Outputs (*op)(const Tensor&, const Tensor&, const Tensor&, const GroupOptions&)>
struct Flat<op> {
  static Outputs call(const Tensor& features, const Tensor& rewards, const Tensor& members, double lam, double clip, int64_t shaping,
                      int64_t exploration_score, int64_t scale, bool skip_uniform, double eps) {
    require(shaping >= 0 && shaping <= 3, "shaping = ", shaping, ", needs 0 (none), 1 (intent), 2 (equation) or 3 (right)");
    require(exploration_score >= 0 && exploration_score <= 1, "exploration_score = ", exploration_score,
            ", needs 0 (linear) or 1 (sqrt)");
    require(scale >= 0 && scale <= 2, "scale = ", scale, ", needs 0 (none), 1 (group) or 2 (batch)");
    require(eps > 0 && std::isfinite(eps), "eps = ", eps, ", needs a finite number > 0");
    return op(features, rewards, members,
              {lam, clip, eps, static_cast<Shaping>(shaping), static_cast<ExplorationScore>(exploration_score),
               static_cast<Scale>(scale), skip_uniform});
  }
};

// The other arguments, checked, and the outputs, on any device. Tensors live as long as this object, which the kernels'
// arguments point into.
struct Checked : GroupArgs {
  Checked(const Tensor& given_features, const Tensor& given_rewards, const Tensor& given_members, const GroupOptions& given_options)
      : GroupArgs{} {
    require(given_features.dim() == 2, "features has shape ", shape(given_features), ", needs [S, d]");
    require_vector(given_rewards, "rewards", given_features.size(0), "S");
    require(given_members.dim() == 2, "members has shape ", shape(given_members), ", needs [B, M]");
    S = given_features.size(0), d = given_features.size(1), B = given_members.size(0), M = given_members.size(1);
    options = given_options;
    inputs = {floats(given_features, "features"), floats(given_rewards, "rewards"), indices(given_members, "members")};
    features = std::get<0>(inputs).const_data_ptr<float>();
    rewards = std::get<1>(inputs).const_data_ptr<float>();
    members = std::get<2>(inputs).const_data_ptr<int64_t>();
    const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
      return torch::stable::new_empty(given_features, size, ScalarType::Float);
    };
    outputs = {empty({B, M, M}), empty({S}), empty({S}), empty({S})};
    similarity = std::get<0>(outputs).mutable_data_ptr<float>();
    exploration_scores = std::get<1>(outputs).mutable_data_ptr<float>();
    shaped_rewards = std::get<2>(outputs).mutable_data_ptr<float>();
    advantages = std::get<3>(outputs).mutable_data_ptr<float>();
  }

  std::tuple<Tensor, Tensor, Tensor> inputs;
  Outputs outputs;
};

Outputs group_geometry(const Tensor& features, const Tensor& rewards, const Tensor& members, const GroupOptions& options) {
  const Checked args(features, rewards, members, options);
  const int64_t bad = bad_member(args.members, args.B * args.M, args.S);
  if (bad >= 0)
    require(false, "members[", bad / args.M, ", ", bad % args.M, "] = ", args.members[bad], " is no row of features (", args.S,
            " rows) or names a row for the second time");
  g2rl::group_geometry(args, parallel);
  return args.outputs;
}

Tensor group_members(const Tensor& ids) {
  require(ids.dim() == 1, "ids has shape ", shape(ids), ", needs [S]");
  const Tensor given = indices(ids, "ids");
  const int64_t S = given.size(0);
  const Tensor index = torch::stable::new_empty(given, {S});
  const GroupShape found = index_groups(given.const_data_ptr<int64_t>(), S, index.mutable_data_ptr<int64_t>());
  const Tensor members = torch::stable::new_empty(given, {found.B, found.M});
  fill_members(index.const_data_ptr<int64_t>(), S, found, members.mutable_data_ptr<int64_t>());
  return members;
}

#ifdef WITH_CUDA
Outputs group_geometry_cuda(const Tensor& features, const Tensor& rewards, const Tensor& members, const GroupOptions& options) {
  const CurrentStream current_stream = current_cuda_stream();
  require(current_stream != nullptr, "features are on a GPU, but this torch has no CUDA");
  const auto device = features.get_device_index();
  require(features.is_cuda() && rewards.is_cuda() && members.is_cuda() && rewards.get_device_index() == device &&
              members.get_device_index() == device,
          "features, rewards and members have to be on one device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Checked args(features, rewards, members, options);
  const int64_t doubles = g2rl_cuda_group_workspace(args.B, args.M, static_cast<int>(options.scale));
  const Tensor workspace = torch::stable::new_empty(features, {doubles}, ScalarType::Double);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(device, &stream));
  const int error = g2rl_cuda_group_geometry(&args, workspace.mutable_data_ptr<double>(), stream);
  if (error != 0) throw std::runtime_error("g2rl::group_geometry: CUDA launch failed with cudaError_t " + std::to_string(error));
  return args.outputs;
}
#endif

}  // namespace

G2RL_LIBRARY_FRAGMENT(m) {
  m.def("group_geometry(Tensor features, Tensor rewards, Tensor members, float lam, float clip, int shaping, "
        "int exploration_score, int scale, bool skip_uniform, float eps) "
        "-> (Tensor similarity, Tensor exploration_scores, Tensor shaped_rewards, Tensor advantages)");
  m.def("group_members(Tensor ids) -> Tensor members");
}

G2RL_LIBRARY_IMPL(CPU, m) {
  m.impl("group_geometry", TORCH_BOX(&Flat<&group_geometry>::call));
  m.impl("group_members", TORCH_BOX(&group_members));
}

#ifdef WITH_CUDA
G2RL_LIBRARY_IMPL(CUDA, m) { m.impl("group_geometry", TORCH_BOX(&Flat<&group_geometry_cuda>::call)); }
#endif

}  // namespace g2rl::ops
