// head_features on the CPU where log-probabilities are known: one look at the weight instead of two.
//
// A token's known log-probability gives a seed of its logsumexp, m = z_y - T known, before anything is summed. Each block
// of 96 rows of W is then finished while it is in cache: logits, statistics, A[unit, v] = sum_t a_t exp((z_tv - m_t) / T),
// and A times the block. With exact statistics at the end, l = exp(lse - m / T) = known p / p says how far each seed was off.
//
//   unit   consecutive tokens of a response, all of it if it is short: from its first token's group of 16, at most `tokens` of
//          them. A unit with a token whose l is not within kKnownTolerance of 1 is computed again by head.cpp, with what
//          follows of its response.
//   chunk  whole units, up to `tokens` tokens, 64 of which are multiplied at a time
//   strip  blocks whose products are summed by one task; strips are added in order
//
// Sizes of units and strips depend on V and d alone: a feature's bits do not depend on the batch or the number of threads.
// Statistics are those of head.cpp, to the bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "half.h"
#include "passes.h"
#include "tasks.h"

namespace g2rl {
namespace {

constexpr int64_t kTokens[] = {256, 128, 64};  // in flight
constexpr int64_t kStrips = 64, kMostUnits = 64, kLeastUnits = 4;

struct OnePassPlan {
  int64_t tokens;  // of a chunk, and most of a unit; 0: nothing fits
  int64_t units;   // of a chunk
};

OnePassPlan plan_for(const HeadArgs& a, int64_t row_units) {
  const int64_t blocks = ceil_div(a.V, kBlock), strips = std::min(kStrips, blocks);
  if (blocks > kSpan) return {0, 0};  // head.cpp merges statistics span by span
  for (int64_t tokens : kTokens) {
    const int64_t left = kWorkspace - tokens * 4 * (row_units + kStatistics * blocks);
    const int64_t units = left / (4 * row_stride(a.d + a.r) * strips);
    if (units >= kLeastUnits) return {tokens, std::min(units, kMostUnits)};
  }
  return {0, 0};
}

double element(DType dtype, const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.stride0 + j * m.stride1;
  if (dtype == DType::f32) return static_cast<const float*>(m.data)[at];
  const uint16_t half = static_cast<const uint16_t*>(m.data)[at];
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

class OnePass {
 public:
  OnePass(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel, OnePassPlan plan, const HeadChunk& base)
      : a(args), k(kernels), parallel(parallel), plan(plan), base(base) {
    columns = a.d + a.r, blocks = ceil_div(a.V, kBlock), strips = std::min(kStrips, blocks);
    for (auto* v : {&max, &sum, &lost, &moment, &squares, &target, &temperature, &seed, &weight, &zeros}) v->assign(plan.tokens, 0.0f);
    top.assign(plan.tokens, -1);
    rest.assign(plan.tokens, 0.0);
  }

  void run_all() {
    std::fill_n(a.features, a.S * columns, 0.0f);
    for (int64_t n = 0; n < a.N;) {
      take_chunk(n);
      sweep();
      finish();
      add_units();
      n = first + tokens;
      std::vector<int64_t> cuts, owners;
      const auto flush = [&] {
        if (!owners.empty()) compute_again(cuts, owners);
        cuts.clear(), owners.clear();
      };
      for (const Unit& unit : units) {
        if (!unit.off) flush();
        if (!unit.off) continue;
        if (owners.empty()) cuts.push_back(first + unit.begin);
        cuts.push_back(first + unit.end), owners.push_back(unit.response);
      }
      // What follows of a response whose last unit was off: in one go with that unit
      if (!owners.empty()) n = cuts.back() = a.cu_seqlens[units.back().response + 1];
      flush();
    }
  }

 private:
  struct Unit {
    int64_t response, begin, end;  // columns of the chunk
    bool off;                      // some seed was
  };

  // Whole units from token n on. The chunk starts at a multiple of 16, so that a token's lane is its index modulo 16.
  void take_chunk(int64_t n) {
    first = n / 16 * 16;
    tokens = n - first;
    units.clear();
    for (int64_t at = n; at < a.N && int64_t(units.size()) < plan.units; at = first + tokens) {
      while (a.cu_seqlens[response + 1] <= at) response++;  // also passes over empty responses
      const int64_t from = a.cu_seqlens[response] / 16 * 16;
      const int64_t end = std::min(from + ((at - from) / plan.tokens + 1) * plan.tokens, a.cu_seqlens[response + 1]);
      if (end - first > plan.tokens) break;
      units.push_back({response, tokens, end - first, false});
      tokens = end - first;
    }
    for (int64_t t = 0; t < plan.tokens; t++) temperature[t] = t < tokens ? a.temperature_of(first + t) : 1.0f;
    tiles.clear(), spans.clear();
    std::vector<int64_t> spans_of_tile;
    for (int64_t t = 0; t < tokens; t += kMaxWidth) {
      HeadChunk c = base;
      c.first_token = first + t;
      c.tokens = std::min(kMaxWidth, tokens - t);
      c.tile_width = k.tile_width_for(fitting_width(c.tokens));
      c.tiles = ceil_div(ceil_div(c.tokens, 16) * 16, c.tile_width);
      c.target_logit = target.data() + t;
      c.temperature = temperature.data() + t;
      c.max = seed.data() + t;
      c.weight = weight.data() + t;
      c.target_residual = zeros.data();  // the realised tokens' own terms follow, once 1 - p is known
      tiles.push_back(c);
      spans_of_tile.push_back(spans.size());
      for (size_t j = 0; j < units.size(); j++) {
        const int64_t begin = std::max(units[j].begin, t), end = std::min(units[j].end, t + c.tokens);
        if (begin < end) spans.push_back({begin - t, end - t, int64_t(j), begin == units[j].begin});
      }
    }
    spans_of_tile.push_back(spans.size());
    for (size_t g = 0; g < tiles.size(); g++) {
      tiles[g].responses = spans.data() + spans_of_tile[g];
      tiles[g].response_count = spans_of_tile[g + 1] - spans_of_tile[g];
    }
  }

  // Everything but the realised tokens' own terms.
  void sweep() {
    const int64_t stride = row_stride(columns), unit_count = units.size();
    Layout layout;
    const int64_t width = tiles.size() * kMaxWidth;
    const int64_t packed_at = layout.place(4 * base.units * width), statistics_at = layout.place(4 * kStatistics * blocks * width);
    const int64_t partial_at = layout.place(4 * stride * strips * unit_count);
    char* memory = head_workspace().reserve(layout.bytes());
    float* statistics = reinterpret_cast<float*>(memory + statistics_at);
    partial = reinterpret_cast<float*>(memory + partial_at);
    std::vector<int64_t> rows(unit_count);
    for (int64_t j = 0; j < unit_count; j++) rows[j] = j;
    for (size_t g = 0; g < tiles.size(); g++) {
      HeadChunk& c = tiles[g];
      c.packed = reinterpret_cast<float*>(memory + packed_at) + g * kMaxWidth * base.units;
      c.slab_begin = 0, c.slab_end = a.V;
      c.block_max = statistics + g * kStatistics * blocks * kMaxWidth;
      c.block_sum = c.block_max + blocks * kMaxWidth;
      c.block_moment = c.block_sum + blocks * kMaxWidth;
      c.block_squares = c.block_moment + blocks * kMaxWidth;
      c.block_top = c.block_squares + blocks * kMaxWidth;
    }
    std::fill(target.begin(), target.end(), -INFINITY);
    run(parallel, ceil_div(tokens, 16), [&](int64_t i) {
      for (int64_t t = 16 * i; t < 16 * i + 16; t++) set_seed(t);
    });
    const int64_t step = 256, parts = ceil_div(base.units, step);
    run(parallel, tiles.size() * parts, [&](int64_t i) {
      const HeadChunk& c = tiles[i / parts];
      const int64_t begin = i % parts * step;
      for (int64_t p = 0; p < c.tiles; p++) k.pack(c, p, begin, std::min(begin + step, c.units));
    });
    run(parallel, strips, [&](int64_t i) {
      alignas(64) uint16_t codes[kBlock * kMaxWidth];
      alignas(64) float residual[kMostUnits * kBlock];
      const int64_t begin = blocks * i / strips, end = blocks * (i + 1) / strips;
      float* out = partial + i * unit_count * stride;
      std::fill_n(out, unit_count * stride, 0.0f);
      for (int64_t b = begin; b < end; b++) {
        HeadChunk block = base;
        for (HeadChunk c : tiles) {
          const int64_t at = b * c.tiles * c.tile_width;
          c.slab_begin = b * kBlock, c.slab_end = std::min(c.slab_begin + kBlock, a.V);
          c.codes = codes, c.residual = residual;
          c.block_max += at, c.block_sum += at, c.block_moment += at, c.block_squares += at, c.block_top += at;
          k.forward(c, 0);
          k.collect(c, 0);
          block = c;
        }
        k.project_cached(block, rows.data(), unit_count, block.slab_begin, block.slab_end, out);
      }
    });
  }

  // z / T at the realised token less the known log-probability, times T.
  void set_seed(int64_t t) {
    const int64_t n = first + t;
    weight[t] = 0.0f, seed[t] = 1e30f;  // exp(z - seed) = 0
    if (t < units.front().begin || t >= tokens || alpha(n) == 0) return;
    const int64_t y = a.tokens[n];
    double z = 0, known = a.known_logprobs[n];
    for (int64_t x = 0; x < a.d; x++) z += element(a.dtype, a.hidden, n, x) * element(a.dtype, a.weight, y, x);
    for (int64_t x = 0; x < a.r; x++) z += element(a.dtype, a.low_hidden, n, x) * element(a.dtype, a.low_weight, y, x);
    if (a.bias) z += element(a.bias_dtype, {a.bias, a.bias_stride, 0}, y, 0);
    z *= a.logit_scale;
    if (a.logit_softcap != 0) z = a.logit_softcap * std::tanh(z / a.logit_softcap);
    seed[t] = float(z - temperature[t] * (known > 0 ? 0 : known));
    weight[t] = float(alpha(n));
  }

  double alpha(int64_t n) const { return a.token_weights ? a.token_weights[n] : 1.0f; }

  // Per-token outputs; rest becomes l (1 - p).
  void finish() {
    std::fill(max.begin(), max.end(), -INFINITY);
    for (auto* v : {&sum, &lost, &moment, &squares}) std::fill(v->begin(), v->end(), 0.0f);
    std::fill(top.begin(), top.end(), -1);
    const RunningSums running = {max.data(), sum.data(), lost.data(), moment.data(), squares.data(), top.data()};
    run(parallel, tiles.size(), [&](int64_t g) {
      const int64_t t = g * kMaxWidth;
      k.merge(tiles[g], {&max[t], &sum[t], &lost[t], &moment[t], &squares[t], &top[t]});
    });
    for (Unit& unit : units)
      for (int64_t t = unit.begin; t < unit.end; t++) {
        const double T = temperature[t], lse_of_seed = seed[t] / T;
        const FinishedToken token = write_outputs(a, first + t, sums_of(running, t, T), target[t] / T);
        const double lse = token.top + token.log_total, l = std::exp(lse - lse_of_seed);
        rest[t] = l * token.rest;
        if (!(std::abs(l - 1) <= kKnownTolerance) && (weight[t] != 0 || !std::isfinite(lse))) unit.off = true;
      }
  }

  void add_units() {
    const int64_t stride = row_stride(columns), step = 128, unit_count = units.size();
    run(parallel, ceil_div(columns, step), [&](int64_t i) {
      const int64_t begin = i * step, end = std::min(begin + step, columns);
      double own[step];
      for (int64_t j = 0; j < unit_count; j++) {
        const Unit& unit = units[j];
        if (unit.off) continue;
        std::fill_n(own, step, 0.0);
        for (int64_t t = unit.begin; t < unit.end; t++) {
          const double factor = weight[t] * rest[t] * slope(t);
          if (factor == 0) continue;
          for (int64_t x = begin; x < end; x++) own[x - begin] += factor * of_row(a.tokens[first + t], x);
        }
        const float scale = scale_of(unit.response);
        for (int64_t x = begin; x < end; x++) {
          float all = 0;
          for (int64_t s = 0; s < strips; s++) all += partial[(s * unit_count + j) * stride + x];
          a.features[unit.response * columns + x] += float(all + own[x - begin]) * scale;
        }
      }
    });
  }

  // Of [weight, low_weight]
  double of_row(int64_t v, int64_t x) const {
    return x < a.d ? element(a.dtype, a.weight, v, x) : element(a.dtype, a.low_weight, v, x - a.d);
  }

  // Of the softcap, at the realised token
  double slope(int64_t t) const {
    const double capped = a.logit_softcap != 0 ? target[t] / a.logit_softcap : 0.0;
    return std::max(1 - capped * capped, 0.0);
  }

  float scale_of(int64_t s) const { return float(a.logit_scale / (total_weight(a, a.cu_seqlens[s], a.cu_seqlens[s + 1]) + 1e-8)); }

  // Tokens [begin, end) in two steps. cuts: where responses' parts begin and end; owners: whose they are.
  void compute_again(const std::vector<int64_t>& cuts, const std::vector<int64_t>& owners) {
    const int64_t base = cuts.front() / 16 * 16;  // lanes stay what they are
    std::vector<int64_t> ends = {0};  // a part of nobody: lanes before the first
    for (int64_t cut : cuts) ends.push_back(cut - base);
    std::vector<float> found((owners.size() + 1) * columns);
    HeadArgs some = a;
    const int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
    some.hidden.data = static_cast<const char*>(a.hidden.data) + base * a.hidden.stride0 * bytes;
    if (a.r) some.low_hidden.data = static_cast<const char*>(a.low_hidden.data) + base * a.low_hidden.stride0 * bytes;
    some.tokens += base, some.known_logprobs += base;
    if (a.token_weights) some.token_weights += base;
    if (a.temperatures) some.temperatures += base;
    if (a.statistics) some.sum_p_squared += base, some.top_token += base, some.top_logprob += base;
    some.logprobs += base, some.logsumexp += base, some.entropy += base;  // the same bits again
    some.cu_seqlens = ends.data();
    some.N = ends.back(), some.S = owners.size() + 1;
    some.features = found.data();
    two_steps(some, k, parallel);
    for (size_t j = 0; j < owners.size(); j++) {
      const double total = total_weight(a, cuts[j], cuts[j + 1]) + 1e-8;  // two_steps() divided by it
      const float share = float(total * scale_of(owners[j]) / a.logit_scale);
      for (int64_t x = 0; x < columns; x++) a.features[owners[j] * columns + x] += found[(j + 1) * columns + x] * share;
    }
  }

  const HeadArgs& a;
  const HeadKernels& k;
  Parallel parallel;
  OnePassPlan plan;
  HeadChunk base;
  int64_t columns, blocks, strips, response = 0;
  int64_t first = 0, tokens = 0;  // of the chunk
  float* partial = nullptr;       // [strip][unit][row_stride(d + r)]
  std::vector<Unit> units;
  std::vector<HeadChunk> tiles;       // of 64 tokens
  std::vector<ResponseTokens> spans;  // of the tiles, one after the other
  std::vector<int64_t> top;
  std::vector<float> max, sum, lost, moment, squares, target, temperature, seed, weight, zeros;  // seed: m
  std::vector<double> rest;
};

}  // namespace

bool one_pass(const HeadArgs& args, const HeadKernels& kernels, Parallel parallel) {
  HeadChunk base{};
  base.args = &args;
  base.bf16_pairs = args.dtype == DType::bf16 && kernels.bf16_dot;
  base.low_units = units_of(base.bf16_pairs, args.r);
  base.units = units_of(base.bf16_pairs, args.d) + base.low_units;
  const OnePassPlan plan = plan_for(args, base.units);
  if (plan.tokens == 0) return false;
  OnePass(args, kernels, parallel, plan, base).run_all();
  return true;
}

}  // namespace g2rl
