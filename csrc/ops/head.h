// A head's arguments, as the operators of head.cpp and support.cpp take and check them.
#pragma once
#include <vector>

#include "../cpu/head.h"
#include "arguments.h"

// The first arguments of every schema: hidden, tokens, and HEAD_SCHEMA of g2rl_kernels/head/spec.py.
#define G2RL_HEAD                                                                                     \
  "Tensor hidden, Tensor tokens, Tensor weight, Tensor? bias, float temperature, float logit_scale, " \
  "float logit_softcap, Tensor? temperatures, Tensor? low_hidden, Tensor? low_weight"

// The last results where statistics are asked for; else empty.
#define G2RL_STATISTICS "Tensor sum_p_squared, Tensor top_token, Tensor top_logprob"

namespace g2rl::ops {

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

inline DType dtype_of(const Tensor& tensor, const char* name) {
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
inline std::tuple<Tensor, Tensor, Tensor> new_statistics(const Tensor& like, int64_t N, bool statistics) {
  const int64_t n = statistics ? N : 0;
  const auto made = [&](ScalarType dtype) { return torch::stable::new_empty(like, {n}, dtype); };
  return {made(ScalarType::Float), made(ScalarType::Long), made(ScalarType::Float)};
}

// Tensors that the kernel reads or writes as they are.
inline void require_exactly(const Tensor& tensor, const char* name, ScalarType dtype, const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.is_contiguous() && tensor.scalar_type() == dtype;
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = tensor.size(i) == sizes[i];
  require(fits, name, " has shape ", shape(tensor), ", or another dtype, or is not contiguous");
}

}  // namespace g2rl::ops
