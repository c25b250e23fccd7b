// head_features on the CPU: the dataflow.  The arithmetic is in kernels/, compiled per instruction set.
//
//   features[s] = sum_t a_t (W[y_t] - sum_v p_tv W[v]) = A[s, :] W   with   A[s, v] = sum_t a_t (1[y_t = v] - p_tv)
//
// so the second matrix product runs over responses, not tokens.  p_tv = exp(z_tv - lse_t) needs lse_t, which takes a pass
// over the whole vocabulary.  Hence, for a chunk of 16 to 64 tokens at a time:
//
//   pack      hidden^T into tiles whose vector lanes are tokens
//   forward   each block of 96 vocabulary rows: logits, max, sum, entropy moment; exp(z - block max) kept in 16 bits
//   merge     the blocks' statistics, in order, then the target's logit (finish.h): lse, log-prob, entropy, 1 - p
//   collect   codes times exp(block max - lse), summed over each response's tokens, into its row of A
//   project   rows of A of complete responses, several at a time, times W
//
// W is read once a chunk and once a projection.  Every number is summed in an order fixed by the shapes alone, so the
// result has the same bits for any number of threads.  Extra memory is bounded by kWorkspace for any N, V and S; a
// vocabulary too large for it is cut into slabs whose logits are computed twice (first for lse, then for A).
//
// Where log-probabilities are known, onepass.cpp reads W once for both products.
//
// A process that holds some rows of a larger vocabulary calls this twice: for the statistics of these rows
// (HeadArgs::partial), and, once all processes' statistics are merged, for their share of the features (HeadArgs::lse).
//
// A token's outputs have the same bits in any batch; a response's feature wherever its first token has the same index
// modulo 16, since sums over tokens take 16 of them at a time.
//
// The target's logit is taken out of its block and merged last: 1 - p(target) is then a sum over the other entries and
// does not cancel, however sure the policy is (p = 1 - 1e-12 keeps all its digits).
#include "head.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "head_kernels.h"
#include "passes.h"
#include "tasks.h"

namespace g2rl {
namespace {

constexpr int64_t kTileBytes = 640 << 10; // a packed tile should stay in L2
constexpr int64_t kMaxRows = 64;           // most rows of A held before they are projected

// How the workspace is shared out.
struct Plan {
  int64_t width;  // tokens in flight
  int64_t slab;   // vocabulary entries in flight; a multiple of kBlock unless it is V
  int64_t rows;   // rows of A
};

// Strips of the vocabulary whose shares of a projection are added in order.  They depend on the vocabulary alone, as do
// slabs: a response's feature is then summed in one order, whatever stands beside it.
int64_t strips_of(int64_t slab) { return std::min<int64_t>(64, ceil_div(slab, kBlock)); }

// Codes and partial projections share memory: codes are dead while rows are projected.
int64_t code_bytes_of(const HeadArgs& a, int64_t width, int64_t slab) {
  return std::max(2 * ceil_div(slab, kBlock) * kBlock * width, 4 * row_stride(a.d + a.r) * strips_of(slab));
}

// Rows of A that are projected together.
int64_t rows_of(const HeadArgs& a, int64_t width, int64_t slab) {
  return code_bytes_of(a, width, slab) / (4 * row_stride(a.d + a.r) * strips_of(slab));
}

// Numbers of a token and block.  Whether there are slabs, which decide about bits, does not depend on what is asked for.
int64_t statistics_of(const HeadArgs& a, int64_t width) { return a.statistics || width == 16 ? kStatistics : kStatistics - 2; }

Plan make_plan(const HeadArgs& a, int64_t units) {
  // The more tokens in flight, the less often W is read; the more rows of A, the less often it is read to project them.
  const int64_t wanted = std::min<int64_t>(a.S, 4), blocks = ceil_div(a.V, kBlock);
  for (int64_t width : kWidths) {
    if (width > 16 && (width >= 2 * a.N || width * units * 4 > kTileBytes)) continue;
    const int64_t fixed = width * (2 * blocks * kBlock + statistics_of(a, width) * 4 * std::min(blocks, kSpan) + 4 * units);
    const int64_t rows = (kWorkspace - fixed) / (4 * a.V);
    if (rows >= (width > 16 ? wanted : 1)) return {width, a.V, std::min({rows, a.S, kMaxRows, rows_of(a, width, a.V)})};
  }
  // Too large for one slab. A block takes the codes of 16 tokens and its columns of four rows of A.
  const int64_t block_bytes = kBlock * (16 * 2 + 4 * 4);
  const int64_t fit = std::max<int64_t>((kWorkspace - 16 * (4 * units + kStatistics * 4 * std::min(blocks, kSpan))) / block_bytes, 1);
  const int64_t slab = std::min(fit, kSpan) * kBlock;
  return {16, slab, std::min<int64_t>(4, rows_of(a, 16, slab))};
}

class Head {
 public:
  Head(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel) : a(args), k(kernels), parallel(parallel) {
    c.args = &args;
    c.bf16_pairs = args.dtype == DType::bf16 && kernels.bf16_dot;
    c.low_units = units_of(c.bf16_pairs, args.r);
    c.units = units_of(c.bf16_pairs, args.d) + c.low_units;
    plan = make_plan(args, c.units);
    const int64_t width = plan.width;
    const int64_t blocks = std::min(ceil_div(args.V, kBlock), kSpan), code_bytes = code_bytes_of(args, width, plan.slab);
    Layout layout;
    const int64_t codes_at = layout.place(code_bytes), packed_at = layout.place(4 * c.units * width);
    const int64_t statistics_at = layout.place(4 * statistics_of(a, width) * blocks * width), residual_at = layout.place(4 * plan.rows * plan.slab);
    char* memory = head_workspace().reserve(layout.bytes());
    codes = memory + codes_at;
    row_response.assign(plan.rows, -1);
    for (auto* v : {&run_max, &run_sum, &run_lost, &run_moment, &run_squares, &target, &temperature, &weight, &target_residual}) v->assign(width, 0.0f);
    run_top.assign(width, -1);
    running = {run_max.data(), run_sum.data(), run_lost.data(), run_moment.data(), run_squares.data(), run_top.data()};
    c.packed = reinterpret_cast<float*>(memory + packed_at);
    statistics = reinterpret_cast<float*>(memory + statistics_at);
    span_statistics = blocks * width;
    c.target_logit = target.data();
    c.temperature = temperature.data();
    c.max = run_max.data();
    c.weight = weight.data();
    c.target_residual = target_residual.data();
    c.residual = reinterpret_cast<float*>(memory + residual_at);
  }

  void run_all() {
    if (a.features) std::fill_n(a.features, a.S * (a.d + a.r), 0.0f);
    for (int64_t n = 0; n < a.N; n = c.first_token + c.tokens) {
      take_chunk(n);
      pack();
      statistics_of_chunk();
      finish_tokens();
      if (a.features) residuals_of_chunk();
    }
    if (a.features) project_complete();
  }

 private:
  // The tokens from n on that fit, by response; each response gets a row of A.  Chunks start at multiples of 16, so that
  // a token's vector lane, and with it the order of all sums, is its index modulo 16.  Where the chunk before had to end
  // elsewhere, its last tokens are computed again, to the same bits, for no response.
  void take_chunk(int64_t n) {
    c.first_token = n / 16 * 16;
    c.tokens = n - c.first_token;
    responses.clear();
    // Two chunks of nearly one size at the end: a small last one would cost as much reading of W as a full one.
    const int64_t left = a.N - c.first_token;
    const int64_t limit = left > plan.width && left < 2 * plan.width ? fitting((left + 1) / 2) : plan.width;
    while (c.tokens < limit && c.tokens < left) {
      const int64_t at = c.first_token + c.tokens;
      while (a.cu_seqlens[response + 1] <= at) response++;  // also passes over empty responses
      auto row = std::find(row_response.begin(), row_response.end(), response);
      const bool fresh = row == row_response.end();
      if (fresh) {
        row = std::find(row_response.begin(), row_response.end(), -1);
        if (row == row_response.end()) {
          if (complete.empty()) break;  // this chunk's responses take every row: make it shorter
          project_complete();
          continue;
        }
        *row = response;
      }
      const int64_t count = std::min(limit - c.tokens, a.cu_seqlens[response + 1] - at);
      responses.push_back({c.tokens, c.tokens + count, row - row_response.begin(), fresh});
      c.tokens += count;
    }
    std::fill(temperature.begin(), temperature.end(), 1.0f);
    for (int64_t t = 0; t < c.tokens; t++) temperature[t] = a.temperature_of(c.first_token + t);
    c.responses = responses.data();
    c.response_count = responses.size();
    c.tile_width = k.tile_width_for(fitting(c.tokens));
    c.tiles = ceil_div(ceil_div(c.tokens, 16) * 16, c.tile_width);  // kept logits are those of 16 tokens
  }

  int64_t fitting(int64_t tokens) const { return std::min(plan.width, fitting_width(tokens)); }

  void pack() {
    const int64_t step = 256, blocks = ceil_div(c.units, step);
    run(parallel, c.tiles * blocks, [&](int64_t i) {
      const int64_t begin = i % blocks * step;
      k.pack(c, i / blocks, begin, std::min(begin + step, c.units));
    });
  }

  bool one_slab() const { return plan.slab >= a.V; }

  // Calls body() for each slab of [begin, end), part of a span that starts at `begin`.
  template <class Body>
  void each_slab(int64_t begin, int64_t end, const Body& body) {
    for (int64_t v = begin; v < end; v += plan.slab) set_slab(begin, v, std::min(v + plan.slab, end)), body();
  }

  template <class Body>
  void each_span(const Body& body) {
    for (int64_t v = 0; v < a.V; v += kSpan * kBlock) body(v, std::min(v + kSpan * kBlock, a.V));
  }

  void set_slab(int64_t span, int64_t begin, int64_t end) {
    c.slab_begin = begin;
    c.slab_end = end;
    c.block_max = statistics + (begin - span) / kBlock * c.tiles * c.tile_width;
    c.block_sum = c.block_max + span_statistics;
    c.block_moment = c.block_sum + span_statistics;
    c.block_squares = c.block_moment + span_statistics;
    c.block_top = c.block_squares + span_statistics;
  }

  void forward(bool keep_codes) {
    c.codes = keep_codes ? reinterpret_cast<uint16_t*>(codes) : nullptr;
    run(parallel, ceil_div(c.slab_end - c.slab_begin, kBlock), [&](int64_t b) { k.forward(c, b); });
  }

  void statistics_of_chunk() {
    for (auto* v : {&run_max, &target}) std::fill(v->begin(), v->end(), -INFINITY);
    for (auto* v : {&run_sum, &run_lost, &run_moment, &run_squares}) std::fill(v->begin(), v->end(), 0.0f);
    std::fill(run_top.begin(), run_top.end(), -1);
    each_span([&](int64_t begin, int64_t end) {
      each_slab(begin, end, [&] { forward(a.features && one_slab()); });
      set_slab(begin, begin, end);
      k.merge(c, running);
    });
  }

  // From the sums over the vocabulary to the per-token outputs and factors, in double.
  void finish_tokens() {
    std::fill(weight.begin(), weight.end(), 0.0f);
    for (int64_t t = 0; t < c.tokens; t++) {
      const int64_t n = c.first_token + t;
      if (a.partial) write_partial(t, n);
      else if (a.lse) weigh(t, n, std::exp(run_max[t] / double(temperature[t]) - a.lse[n]), a.rest[n]);
      else finish(t, n);
      if (run_max[t] == -INFINITY) run_max[t] = 0.0f;  // only the target is possible: any finite reference
    }
  }

  TokenSums sums(int64_t t) const { return sums_of(running, t, temperature[t]); }

  void write_partial(int64_t t, int64_t n) {
    const TokenSums found = sums(t);
    a.partial[n] = found.max;
    a.partial[a.N + n] = found.sum;
    a.partial[2 * a.N + n] = found.moment;
    a.target[n] = target[t] / double(temperature[t]);
    if (!a.statistics) return;
    a.partial[3 * a.N + n] = found.squares;
    a.top[n] = found.top;
  }

  void finish(int64_t t, int64_t n) {
    const FinishedToken token = write_outputs(a, n, sums(t), target[t] / double(temperature[t]));
    const double l = a.known_logprobs ? std::exp(std::min(a.known_logprobs[n], 0.0f) - token.logprob) : 1.0;
    const double counts = std::abs(l - 1) <= kKnownTolerance ? l : 1.0;
    weigh(t, n, token.scale * counts, token.rest * counts);
  }

  // scale: from exp((z - max) / T) to p; rest: 1 - p(target)
  void weigh(int64_t t, int64_t n, double scale, double rest) {
    const double alpha = a.token_weights ? a.token_weights[n] : 1.0f;
    const double capped = a.logit_softcap != 0 ? target[t] / a.logit_softcap : 0.0;
    weight[t] = float(alpha * scale);
    target_residual[t] = float(alpha * rest * std::max(1 - capped * capped, 0.0));  // 0 for a masked target
  }

  void residuals_of_chunk() {
    each_span([&](int64_t begin, int64_t end) {
      each_slab(begin, end, [&] {
        if (!one_slab()) forward(true);
        run(parallel, ceil_div(c.slab_end - c.slab_begin, kBlock), [&](int64_t b) { k.collect(c, b); });
        if (!one_slab()) project(all_rows());
      });
    });
    for (const ResponseTokens& s : responses) {
      const int64_t last = a.cu_seqlens[row_response[s.row] + 1];
      if (!one_slab()) row_response[s.row] = -1;
      else if (c.first_token + s.end == last) complete.push_back(s.row);
    }
  }

  std::vector<int64_t> all_rows() const {
    std::vector<int64_t> rows;
    for (const ResponseTokens& s : responses) rows.push_back(s.row);
    return rows;
  }

  void project_complete() {
    project(complete);
    for (int64_t row : complete) row_response[row] = -1;
    complete.clear();
  }

  // features[response of row] += A[row, :] [W, low_weight] / (sum of its weights)
  void project(const std::vector<int64_t>& rows) {
    const int64_t columns = a.d + a.r, stride = row_stride(columns), slab = c.slab_end - c.slab_begin, strips = strips_of(slab);
    const int64_t count = rows.size(), size = count * stride;
    float* partial = reinterpret_cast<float*>(codes);
    run(parallel, strips, [&](int64_t x) {
      const int64_t i = strips - 1 - x;  // the last rows of W are still in cache
      k.project(c, rows.data(), count, c.slab_begin + slab * i / strips, c.slab_begin + slab * (i + 1) / strips, partial + i * size);
    });
    run(parallel, count, [&](int64_t j) {
      const int64_t s = row_response[rows[j]];
      const float scale = float(a.logit_scale / (total_weight(a, a.cu_seqlens[s], a.cu_seqlens[s + 1]) + 1e-8));
      for (int64_t x = 0; x < columns; x++) {
        float sum = 0;
        for (int64_t i = 0; i < strips; i++) sum += partial[i * size + j * stride + x];
        a.features[s * columns + x] += sum * scale;
      }
    });
  }

  const HeadArgs& a;
  const HeadKernels& k;
  Parallel parallel;
  HeadChunk c{};
  Plan plan;
  int64_t response = 0, span_statistics;
  char* codes;
  float* statistics;  // of the blocks of a span: maxima, sums, moments, squares, rows of the maxima
  RunningSums running;
  std::vector<int64_t> run_top;
  std::vector<float> run_max, run_sum, run_lost, run_moment, run_squares, target, temperature, weight, target_residual;
  std::vector<int64_t> row_response, complete;  // which response a row of A belongs to, -1 = free; rows ready to project
  std::vector<ResponseTokens> responses;
};

}  // namespace

const HeadKernels& kernels_for(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::avx512bf16) return head_kernels_avx512bf16();
  if (isa == Isa::avx512) return head_kernels_avx512();
  if (isa == Isa::avx2) return head_kernels_avx2();
#endif
  if (isa != Isa::plain) throw std::invalid_argument("g2rl: this build has no kernels for that instruction set");
  return head_kernels_plain();
}

Workspace& head_workspace() {
  // Kept for the thread's next call: fresh pages would cost 2 to 4 % of a call.
  thread_local Workspace workspace;
  return workspace;
}

TokenSums sums_of(const RunningSums& run, int64_t t, double temperature) {
  return {run.max[t] / temperature, double(run.sum[t]) - run.lost[t], run.moment[t] * (4 * std::log(2.0)), run.squares[t], run.top[t]};
}

FinishedToken write_outputs(const HeadArgs& a, int64_t n, const TokenSums& sums, double z) {
  const FinishedToken found = finish_token(sums, z, a.tokens[n]);
  a.logsumexp[n] = float(found.top + found.log_total);
  a.logprobs[n] = float(found.logprob);
  a.entropy[n] = float(found.entropy);
  if (!a.statistics) return found;
  a.sum_p_squared[n] = float(found.sum_p_squared);
  a.top_token[n] = found.top_token;
  a.top_logprob[n] = float(found.top_logprob);
  return found;
}

double total_weight(const HeadArgs& a, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t n = begin; n < end; n++) total += a.token_weights ? a.token_weights[n] : 1.0f;
  return total;
}

void two_steps(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel) { Head(args, kernels, parallel).run_all(); }

void head_features(const HeadArgs& args, Isa isa, Parallel parallel) {
  const HeadKernels& kernels = kernels_for(isa);
  if (args.N == 0 && args.features) std::fill_n(args.features, args.S * (args.d + args.r), 0.0f);
  if (args.N == 0) return;
  if (args.known_logprobs && one_pass(args, kernels, parallel)) return;
  two_steps(args, kernels, parallel);
}

}  // namespace g2rl
