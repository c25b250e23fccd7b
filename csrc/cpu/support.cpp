// The head restricted to some ids a token: each token gathers the rows of its own ids, and nothing else of the weight.
//
//   logits     x_k = logit_scale (W[ids_k] . h + b), one token after the other
//   finish     its sums over the ids other than the realised token, in double; finish.h puts the token back
//   features   block by block, while its rows are still in cache: sum of exp(z_k - m) W[ids_k] relative to the largest m so
//              far; then alpha (1 - p_y) W[y] less alpha exp(m - lse) times that sum
//
// Features are summed over pieces of a response, which begin with its first token, and pieces in order: the same bits
// for any number of threads and in any batch.  What is computed of a kept logit is in double, as there are few.
#include "support.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "passes.h"
#include "tasks.h"

namespace g2rl {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // rows that are dotted and then added, from the second level of cache
constexpr int64_t kPiece = 4;            // tokens of a response that are summed together
constexpr int64_t kSumBytes = 4 << 20;   // pieces' sums that are held at a time

// A thread's scratch memory, kept for its next call.
float* scratch(int64_t floats) {
  thread_local Workspace workspace;
  return reinterpret_cast<float*>(workspace.reserve(4 * std::max<int64_t>(floats, 1)));
}

bool inside(const HeadArgs& a, int64_t id) { return 0 <= id && id < a.V; }

float bias_of(const HeadArgs& a, int64_t id) {
  if (!a.bias) return 0.0f;
  const int64_t at = id * a.bias_stride;
  if (a.bias_dtype == DType::f32) return static_cast<const float*>(a.bias)[at];
  const uint16_t half = static_cast<const uint16_t*>(a.bias)[at];
  return a.bias_dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

// Logits over temperature.
double tempered(const HeadArgs& a, double x, double temperature) {
  const double c = a.logit_softcap;
  if (c != 0 && x != -INFINITY) x = c * std::tanh(x / c);
  return x / temperature;
}

// 1 - tanh(x / c)^2; nothing cancels
double slope(const HeadArgs& a, double x) {
  if (a.logit_softcap == 0) return 1.0;
  const double e = std::exp(-2 * std::abs(x / a.logit_softcap));
  return 4 * e / ((1 + e) * (1 + e));
}

// A token's list, and a thread's memory for it.
struct Token {
  int64_t t, count, y;   // y: the realised token
  const int64_t* ids;
  double temperature;
  float *hidden, *low_hidden;  // [d], [r], as floats
  float *x, *low;              // [count]: SupportArgs::x; the low-rank part
  float *coefficients, *sums;  // [count], [d + r]
};

int64_t floats_of(const HeadArgs& a, int64_t longest) { return 2 * (a.d + a.r) + 3 * longest; }

Token token_at(const SupportArgs& s, int64_t t, int64_t longest, float* memory) {
  const HeadArgs& a = s.head;
  const int64_t first = s.offsets[t];
  float *sums = memory + a.d + a.r, *x = sums + a.d + a.r;
  return {t, s.offsets[t + 1] - first, a.tokens[t], s.ids + first, a.temperature_of(t), memory, memory + a.d, x, x + longest, x + 2 * longest, sums};
}

// x of the ids [begin, end) of the list
void logits(const HeadArgs& a, const HeadKernels& k, const Token& token, int64_t begin, int64_t end) {
  const int64_t* ids = token.ids + begin;
  float* x = token.x + begin;
  k.gather_dot(a.dtype, a.weight, a.V, ids, end - begin, token.hidden, a.d, x);
  if (a.r) {
    k.gather_dot(a.dtype, a.low_weight, a.V, ids, end - begin, token.low_hidden, a.r, token.low);
    for (int64_t i = 0; i < end - begin; i++) x[i] += token.low[i];
  }
  for (int64_t i = 0; i < end - begin; i++) {
    const float bias = inside(a, ids[i]) ? bias_of(a, ids[i]) : -INFINITY;
    x[i] = bias == -INFINITY ? bias : (x[i] + bias) * a.logit_scale;
  }
}

struct Statistics {
  TokenSums others;
  double target;
};

// y: the realised token
Statistics statistics(const HeadArgs& a, const int64_t* ids, const float* x, int64_t count, int64_t y, double temperature) {
  Statistics found{{}, -INFINITY};
  TokenSums& sums = found.others;
  bool held = !inside(a, y);  // it may be another rank's
  for (int64_t i = 0; i < count; i++) {
    const double z = tempered(a, x[i], temperature);
    if (ids[i] == y) {
      held = true;
      found.target = z;
      continue;
    }
    if (z > sums.max || (z == sums.max && z != -INFINITY && ids[i] < sums.top)) sums.top = ids[i];
    sums.max = larger(z, sums.max);
  }
  if (!held) found.target = NAN;
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] == y) continue;
    const double below = sums.max == -INFINITY ? -INFINITY : tempered(a, x[i], temperature) - sums.max, e = std::exp(below);
    sums.sum += e;
    if (e != 0) sums.moment += e * below, sums.squares += e * e;
  }
  return found;
}

// Writes the rank's statistics of token t, or the token's outputs.
FinishedToken write_token(const HeadArgs& a, int64_t t, const Statistics& found) {
  if (!a.partial) return write_outputs(a, t, found.others, found.target);
  const TokenSums& sums = found.others;
  a.partial[t] = sums.max, a.partial[a.N + t] = sums.sum, a.partial[2 * a.N + t] = sums.moment;
  a.target[t] = found.target;
  if (a.statistics) a.partial[3 * a.N + t] = sums.squares, a.top[t] = sums.top;
  return {};
}

// Adds the block's exp(z - max) W[id] of the ids other than y to the token's sums; max is that of the blocks so far.
void add_block(const HeadArgs& a, const HeadKernels& k, const Token& token, int64_t begin, int64_t end, double& max) {
  const double before = max;
  for (int64_t i = begin; i < end; i++)
    if (token.ids[i] != token.y) max = larger(tempered(a, token.x[i], token.temperature), max);
  if (max == -INFINITY) return;
  if (before != -INFINITY && before != max) {
    const float lift = float(std::exp(before - max));
    for (int64_t j = 0; j < a.d + a.r; j++) token.sums[j] *= lift;
  }
  for (int64_t i = begin; i < end; i++)
    token.coefficients[i] =
        token.ids[i] == token.y ? 0.0f : float(std::exp(tempered(a, token.x[i], token.temperature) - max) * slope(a, token.x[i]));
  k.gather_add(a.dtype, a.weight, a.V, token.ids + begin, end - begin, token.coefficients + begin, a.d, token.sums);
  if (a.r) k.gather_add(a.dtype, a.low_weight, a.V, token.ids + begin, end - begin, token.coefficients + begin, a.r, token.sums + a.d);
}

// Adds alpha phi to sums [d + r], from the token's own sums relative to max
void add_feature(const HeadArgs& a, const HeadKernels& k, const Token& token, const FinishedToken& found, double max, float* sums) {
  const double alpha = (a.token_weights ? a.token_weights[token.t] : 1.0) * a.logit_scale;
  const float others = max == -INFINITY ? 0.0f : float(-alpha * std::exp(max - found.top - found.log_total));
  for (int64_t j = 0; j < a.d + a.r; j++) sums[j] += others * token.sums[j];
  int64_t at = 0;
  while (at < token.count && token.ids[at] != token.y) at++;
  const float own = at < token.count ? float(alpha * found.rest * slope(a, token.x[at])) : NAN;
  k.gather_add(a.dtype, a.weight, a.V, &token.y, 1, &own, a.d, sums);
  if (a.r) k.gather_add(a.dtype, a.low_weight, a.V, &token.y, 1, &own, a.r, sums + a.d);
}

struct Piece {
  int64_t begin, end, response;  // tokens
};

// All of it of one token; its alpha phi is added to sums [d + r], unless that is null.
void one_token(const SupportArgs& s, const HeadKernels& k, const Token& token, float* sums) {
  const HeadArgs& a = s.head;
  k.unpack(a.dtype, a.hidden, token.t, 0, a.d, token.hidden);
  if (a.r) k.unpack(a.dtype, a.low_hidden, token.t, 0, a.r, token.low_hidden);
  const int64_t bytes = (a.d + a.r) * (a.dtype == DType::f32 ? 4 : 2), block = std::max<int64_t>(kBlockBytes / bytes, 1);
  double max = -INFINITY;
  if (sums) std::memset(token.sums, 0, sizeof(float) * (a.d + a.r));
  for (int64_t begin = 0; begin < token.count; begin += block) {
    const int64_t end = std::min(begin + block, token.count);
    logits(a, k, token, begin, end);
    if (sums) add_block(a, k, token, begin, end, max);
  }
  if (s.x) std::memcpy(s.x + s.offsets[token.t], token.x, sizeof(float) * token.count);
  const FinishedToken found =
      write_token(a, token.t, statistics(a, token.ids, token.x, token.count, token.y, token.temperature));
  if (sums) add_feature(a, k, token, found, max, sums);
}

int64_t longest_list(const SupportArgs& s) {
  int64_t most = 0;
  for (int64_t t = 0; t < s.head.N; t++) most = std::max(most, s.offsets[t + 1] - s.offsets[t]);
  return most;
}

}  // namespace

void support_features(const SupportArgs& s, Isa isa, Parallel parallel) {
  const HeadArgs& a = s.head;
  const HeadKernels& k = kernels_for(isa);
  const int64_t width = a.d + a.r, longest = longest_list(s), floats = floats_of(a, longest);
  if (!a.features) {
    run(parallel, a.N, [&](int64_t t) { one_token(s, k, token_at(s, t, longest, scratch(floats)), nullptr); });
    return;
  }
  std::vector<Piece> pieces;
  for (int64_t r = 0; r < a.S; r++)
    for (int64_t t = a.cu_seqlens[r]; t < a.cu_seqlens[r + 1]; t += kPiece) pieces.push_back({t, std::min(t + kPiece, a.cu_seqlens[r + 1]), r});
  const int64_t held = std::max<int64_t>(kSumBytes / (4 * width), 1);
  std::vector<float> sums(std::min<int64_t>(held, pieces.size()) * width);
  std::vector<double> total(width);
  int64_t response = 0;  // the one that total belongs to
  const auto close = [&](int64_t next) {
    for (; response < next; response++) {
      const double weight = total_weight(a, a.cu_seqlens[response], a.cu_seqlens[response + 1]) + 1e-8;
      for (int64_t j = 0; j < width; j++) a.features[response * width + j] = float(total[j] / weight), total[j] = 0;
    }
  };
  for (size_t first = 0; first < pieces.size(); first += held) {
    const int64_t count = std::min<int64_t>(held, pieces.size() - first);
    run(parallel, count, [&](int64_t i) {
      float *memory = scratch(floats), *own = sums.data() + i * width;
      std::memset(own, 0, sizeof(float) * width);
      const Piece& piece = pieces[first + i];
      for (int64_t t = piece.begin; t < piece.end; t++) one_token(s, k, token_at(s, t, longest, memory), own);
    });
    for (int64_t i = 0; i < count; i++) {
      close(pieces[first + i].response);
      for (int64_t j = 0; j < width; j++) total[j] += sums[i * width + j];
    }
  }
  close(a.S);
}

void support_terms(const SupportArgs& s, const float* normaliser, const float* terms, float* dz, Parallel parallel) {
  const HeadArgs& a = s.head;
  run(parallel, a.N, [&](int64_t t) {
    const double lse = double(normaliser[t]) + normaliser[a.N + t], g = terms[t], e = terms[a.N + t], own = terms[2 * a.N + t];
    const double temperature = a.temperature_of(t), factor = a.logit_scale / temperature;
    bool counted = false;  // the realised token: once, where values are not checked and it stands twice
    for (int64_t i = s.offsets[t]; i < s.offsets[t + 1]; i++) {
      // A token without its own id, where values are not checked, has NaN; nothing comes back where nothing comes in.
      if (g == 0 && e == 0 && own == 0) {
        dz[i] = 0.0f;
        continue;
      }
      const double x = s.x[i], log_p = tempered(a, x, temperature) - lse, p = std::exp(log_p);
      double mine = p == 0 ? 0.0 : -p * (g + e * log_p);
      if (s.ids[i] == a.tokens[t]) mine = counted ? 0.0 : own, counted = true;
      dz[i] = float(mine * slope(a, x) * factor);
    }
  });
}

void gather_sum(const GatherSum& g, Isa isa, Parallel parallel) {
  const HeadKernels& k = kernels_for(isa);
  const int64_t bytes = g.out_dtype == DType::f32 ? 4 : 2;
  run(parallel, g.n, [&](int64_t i) {
    char* out = g.out + i * g.out_stride * bytes;
    const int64_t first = g.offsets[i], count = g.offsets[i + 1] - first;
    if (count == 0 || g.out_dtype == DType::f32) std::memset(out, 0, bytes * g.d);
    if (count == 0) return;
    float* sums = g.out_dtype == DType::f32 ? reinterpret_cast<float*>(out) : scratch(g.d);
    if (g.out_dtype != DType::f32) std::memset(sums, 0, sizeof(float) * g.d);
    k.gather_add(g.dtype, g.matrix, g.M, g.index + first, count, g.coefficients + first, g.d, sums);
    if (g.out_dtype != DType::f32) k.round_to(g.out_dtype, sums, g.d, out);
  });
}

}  // namespace g2rl
