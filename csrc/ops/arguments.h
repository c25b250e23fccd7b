// What the operators share: checks of tensors, conversion of small ones, torch's threads.
//
// csrc/ops/ only connects torch and the kernels. It checks whatever could make a kernel read out of bounds, brings small
// tensors into the form that kernels want (hidden and weight are never copied: kernels take strides), allocates the
// outputs and calls the kernel. The Python layer refuses values that are merely senseless (a negative weight, a NaN).
//
// It uses PyTorch's stable ABI at its 2.11 level only (TORCH_TARGET_VERSION, setup.py), in C++17 or C++20.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

// The operators' namespace in torch.ops. A build for the Hugging Face Hub has one of its own, since several may be
// loaded in one process. torch's macros paste their argument, so it is expanded first.
#ifndef G2RL_OPS
#define G2RL_OPS g2rl
#endif
#define G2RL_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define G2RL_LIBRARY(m) G2RL_EXPANDED(STABLE_TORCH_LIBRARY, G2RL_OPS, m)
#define G2RL_LIBRARY_FRAGMENT(m) G2RL_EXPANDED(STABLE_TORCH_LIBRARY_FRAGMENT, G2RL_OPS, m)
#define G2RL_LIBRARY_IMPL(key, m) G2RL_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, G2RL_OPS, key, m)

namespace g2rl::ops {

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

inline std::string shape(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void require_vector(const Tensor& tensor, const char* name, int64_t length, const char* length_name) {
  require(tensor.dim() == 1 && tensor.size(0) == length, name, " has shape ", shape(tensor), ", needs [", length_name, "] = [",
          length, "]");
}

inline Tensor contiguous(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// As contiguous int64.
inline Tensor indices(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Long || dtype == ScalarType::Int, name, " has to be int64 or int32");
  return contiguous(tensor, ScalarType::Long);
}

// As contiguous float32.
inline Tensor floats(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
          name, " has to be a floating-point tensor");
  return contiguous(tensor, ScalarType::Float);
}

// torch's threads, as the kernels see them (cpu/parallel.h).
inline void parallel(int64_t n, void* ctx, void (*body)(void* ctx, int64_t i)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(ctx, i);
  });
}

}  // namespace g2rl::ops
