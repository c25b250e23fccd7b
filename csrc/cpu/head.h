// The LM-head op on the CPU: public interface, free of torch.  head.cpp explains the dataflow.
#pragma once
#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace g2rl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Matrix {
  const void* data;
  int64_t stride0, stride1;  // in elements, any value
};

constexpr int64_t kBlock = 96;  // vocabulary rows that are reduced together, while their logits are in cache

// Logits of the last blocks of the vocabulary, from a forward pass to its backward pass: as float32, or, with size 2, as
// 16-bit codes of their distance to the block's largest (kernels/kept.h).  [block][16 tokens][kBlock][token], then the
// largest logits [block][token].
struct KeptLogits {
  char* data;             // null: none are kept
  int64_t groups;         // of 16 tokens, of the forward pass
  int64_t blocks, first;  // number of blocks; the first of them, counted from the vocabulary's first
  int64_t size;           // bytes of a logit
  int64_t group;          // that the tokens of this call begin with

  static int64_t block_bytes(int64_t groups, int64_t size) { return groups * 16 * (kBlock * size + (size == 2 ? 4 : 0)); }
  bool has(int64_t block) const { return data && block >= first; }
  char* logits(int64_t block, int64_t at) const { return data + ((block - first) * groups + group + at) * kBlock * 16 * size; }
  float* largest(int64_t block, int64_t at) const {
    return reinterpret_cast<float*>(data + blocks * groups * kBlock * 16 * size) + ((block - first) * groups + group + at) * 16;
  }
};

struct HeadArgs {
  DType dtype;                 // of hidden and weight
  Matrix hidden, weight;       // [N, d], [V, d]
  Matrix low_hidden, low_weight;  // [N, r], [V, r], of the same dtype: W h gets low_weight low_hidden added; null if r = 0
  const int64_t* tokens;       // [N] in [0, V), checked by the caller; with `partial` or `lse`, others belong to other ranks
  const int64_t* cu_seqlens;   // [S + 1], monotone from 0 to N, checked by the caller
  const void* bias;            // [V] or null
  DType bias_dtype;
  int64_t bias_stride;
  const float* token_weights;  // [N] or null (all ones)
  const float* known_logprobs; // [N] or null: see onepass.cpp
  int64_t N, d, V, S, r;
  float temperature, logit_scale, logit_softcap;        // softcap 0: no softcap
  const float* temperatures;                            // [N], one a token in place of `temperature`; or null
  float *features, *logprobs, *logsumexp, *entropy;     // [S, d + r] (of [W, low_weight]), [N], [N], [N]: written in full
  bool statistics;                                      // whether the following are asked for
  float *sum_p_squared, *top_logprob;                   // [N], [N]: sum of p^2; log-probability of the likeliest entry
  int64_t* top_token;                                   // [N]: that entry, the first of equals; -1 where nothing is known
  // A rank's rows of a larger vocabulary take two calls.  First: features null, and instead of the other outputs
  // partial [3, N]: max, sum exp(z - max) and sum exp(z - max) (z - max) over all entries but the token, and
  // target [N]: the token's z, -inf if it belongs to another rank; z over temperature.  With statistics partial has a
  // fourth row, sum exp(2 (z - max)), and top [N] is the index of max, -1 without entries.
  // Second: features alone, from the logsumexp [N] and rest = 1 - p(token) [N] of the whole vocabulary.
  double *partial, *target;
  int64_t* top;
  KeptLogits kept;  // written with `partial`, read by head_sweep
  const double *lse, *rest;

  float temperature_of(int64_t token) const { return temperatures ? temperatures[token] : temperature; }
};

void head_features(const HeadArgs& args, Isa isa, Parallel parallel);

}  // namespace g2rl
