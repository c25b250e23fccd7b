// Logits of a block to its statistics and codes, and the blocks' statistics to those of the vocabulary.
#pragma once
#include "kept.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

constexpr float kCodeMax = 65535.0f;
constexpr float kQuarterLog2Floor = -30.0f;  // exp(z - max) below 2^-120 counts as 2^-120: never subnormal, code 0

// Takes the target's logit out of its block.  Kept in full precision, it is merged last (head.cpp), so that 1 - p(target)
// is a sum over the other entries and never a difference.
static void take_targets(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  for (int64_t t = 0; t < c.tokens; t++) {
    const int64_t r = c.args->tokens[c.first_token + t] - v0;
    if (r < 0 || r >= count) continue;
    float* z = logits + ((t / c.tile_width) * kBlock + r) * c.tile_width + t % c.tile_width;
    c.target_logit[t] = *z;
    *z = -__builtin_inff();
  }
}

// Codes.  e = exp((z - block max) / temperature) in (0, 1] is stored as the 16-bit number round(65535 e^(1/4)).  The fourth
// root spreads the numbers: e keeps a relative error of at most 3e-5 e^(-1/4), absolutely 3e-5 e^(3/4), and the largest of
// the block is exact; float16 would be ten times coarser.  Under a softcap the code holds e times the cap's derivative.
//
// One block of one tile, U vectors of tokens at a time for instruction-level parallelism.  Template arguments keep the
// common loop free of branches.
template <int U, bool kCapped, bool kKeep, bool kStatistics>
static void softmax_columns(const HeadChunk& c, int64_t count, const float* z, const float* temperature, uint16_t* code, int64_t at) {
  const vf floor = splat(kQuarterLog2Floor), one = splat(1.0f);
  const vf uncap = splat(kCapped ? 1.0f / c.args->logit_softcap : 0.0f);
  vf max[U], base[U], quarter[U], total[U], moment[U], squares[U], top[U];
  for (int u = 0; u < U; u++) quarter[u] = to_quarter_log2(temperature + u * kLanes);
  for (int u = 0; u < U; u++) max[u] = splat(-__builtin_inff()), total[u] = moment[u] = top[u] = splat(0.0f);
  for (int u = 0; u < U; u++) squares[u] = splat(0x1p-100f);  // nothing beside 1, and no sum is ever subnormal, which is slow
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const vf x = load(z + r * c.tile_width + u * kLanes);
      if (kStatistics) top[u] = less(max[u], x, splat((float)r), top[u]);
      max[u] = at_least(x, max[u]);  // drops NaN, which `total` keeps
    }
  for (int u = 0; u < U; u++) base[u] = less(splat(-__builtin_inff()), max[u], max[u], splat(0.0f));  // all -inf: any finite base
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const vf x = load(z + r * c.tile_width + u * kLanes), y = at_least(floor, (x - base[u]) * quarter[u]);
      vf root = exp2_negative(y, kCodeMax);
      const vf square = root * root, e = square * square;  // kCodeMax^4 too large until the sums are stored
      total[u] += e;
      moment[u] = fma(e, y, moment[u]);
      if (kStatistics) squares[u] = fma(e * splat(0x1p-64f), e * splat(0x1p-64f), squares[u]);
      if (kCapped) root *= sqrt(sqrt(at_least(splat(0.0f), one - (x * uncap) * (x * uncap))));
      if (kKeep) store_code(code + r * c.tile_width + u * kLanes, root);
    }
  const vf unscale = splat(1.0f / kCodeMax) * splat(1.0f / kCodeMax);
  for (int u = 0; u < U; u++) {
    store(c.block_max + at + u * kLanes, max[u]);
    store(c.block_sum + at + u * kLanes, total[u] * unscale * unscale);
    store(c.block_moment + at + u * kLanes, moment[u] * unscale * unscale);
    if (!kStatistics) continue;
    const vf size = unscale * unscale * splat(0x1p64f);
    store(c.block_squares + at + u * kLanes, squares[u] * size * size);
    store(c.block_top + at + u * kLanes, top[u]);
  }
}

template <int U, bool kCapped, bool kKeep, bool kStatistics>
static void softmax_tiles(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t t = 0; t < c.tile_width; t += U * kLanes) {
      const int64_t at = (block * c.tiles + p) * c.tile_width + t;
      uint16_t* code = kKeep ? c.codes + (block * c.tiles + p) * kBlock * c.tile_width + t : nullptr;
      const float *z = logits + p * kBlock * c.tile_width + t, *temperature = c.temperature + p * c.tile_width + t;
      softmax_columns<U, kCapped, kKeep, kStatistics>(c, count, z, temperature, code, at);
    }
}

template <bool kCapped, bool kKeep, bool kStatistics>
static void softmax_block(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  const int64_t vectors = c.tile_width / kLanes;
  if (vectors % 4 == 0) softmax_tiles<4, kCapped, kKeep, kStatistics>(c, block, count, logits);
  else if (vectors % 3 == 0) softmax_tiles<3, kCapped, kKeep, kStatistics>(c, block, count, logits);
  else if (vectors % 2 == 0) softmax_tiles<2, kCapped, kKeep, kStatistics>(c, block, count, logits);
  else softmax_tiles<1, kCapped, kKeep, kStatistics>(c, block, count, logits);
}

template <bool kStatistics>
static void softmax_block_for(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  const bool capped = c.args->logit_softcap != 0.0f;
  if (c.codes) (capped ? softmax_block<true, true, kStatistics> : softmax_block<false, true, kStatistics>)(c, block, count, logits);
  else (capped ? softmax_block<true, false, kStatistics> : softmax_block<false, false, kStatistics>)(c, block, count, logits);
}

static void forward(const HeadChunk& c, int64_t block) {
  alignas(64) float logits[kBlock * kMaxWidth];
  const int64_t v0 = c.slab_begin + block * kBlock, count = smaller(kBlock, c.slab_end - v0);
  logits_block_for(c)(c, v0, count, logits);
  finish_logits(c, v0, count, logits);
  if (c.args->kept.has(v0 / kBlock)) keep_logits(c, v0, count, logits);
  take_targets(c, v0, count, logits);
  (c.args->statistics ? softmax_block_for<true> : softmax_block_for<false>)(c, block, count, logits);
}

// The statistics of one vector of tokens, whose maximum was `old` and is `base` with the slab's blocks.
static void merge_statistics(const HeadChunk& c, const RunningSums& run, int64_t t, vf old, vf base) {
  const int64_t blocks = (c.slab_end - c.slab_begin + kBlock - 1) / kBlock, width = c.tiles * c.tile_width;
  const vf quarter = to_quarter_log2(c.temperature + t);
  vf top = old, which = splat(-1.0f), total = splat(0.0f), lost = splat(0.0f);
  for (int64_t b = -1; b < blocks; b++) {
    const vf max = b < 0 ? old : load(c.block_max + b * width + t);
    which = less(top, max, splat((float)b), which);  // of equals the first
    top = at_least(top, max);
    const vf root = exp2_negative(at_least(splat(kQuarterLog2Floor), (max - base) * quarter)), square = root * root;
    const vf weight = square * square, squares = load(b < 0 ? run.squares + t : c.block_squares + b * width + t);
    const vf term = weight * (weight * squares) - lost, next = total + term;
    lost = (next - total) - term;
    total = next;
  }
  store(run.squares + t, total);
  alignas(64) float block[kLanes];
  store(block, which);
  for (int64_t i = 0; i < kLanes; i++) {
    const int64_t b = (int64_t)block[i];
    if (b >= 0) run.top[t + i] = c.slab_begin + b * kBlock + (int64_t)c.block_top[b * width + t + i];
  }
}

// Adds the slab's blocks to the running statistics, in order: the same bits for any number of threads.
// sum is compensated (Kahan suffices for terms >= 0).
static void merge(const HeadChunk& c, const RunningSums& run) {
  const int64_t blocks = (c.slab_end - c.slab_begin + kBlock - 1) / kBlock, width = c.tiles * c.tile_width;
  const vf none = splat(-__builtin_inff());
  for (int64_t t = 0; t < width; t += kLanes) {
    const vf old = load(run.max + t), quarter = to_quarter_log2(c.temperature + t);
    vf top = old;
    for (int64_t b = 0; b < blocks; b++) top = at_least(top, load(c.block_max + b * width + t));
    const vf base = less(none, top, top, splat(0.0f));
    vf total = splat(0.0f), lost = splat(0.0f), mom = splat(0.0f);
    for (int64_t b = -1; b < blocks; b++) {
      const bool first = b < 0;
      const vf shift = at_least(splat(kQuarterLog2Floor), ((first ? old : load(c.block_max + b * width + t)) - base) * quarter);
      const vf root = exp2_negative(shift), square = root * root, weight = square * square;
      const vf s = first ? load(run.sum + t) - load(run.lost + t) : load(c.block_sum + b * width + t);
      const vf term = weight * s - lost, next = total + term;
      lost = (next - total) - term;
      total = next;
      mom = fma(weight, fma(s, shift, first ? load(run.moment + t) : load(c.block_moment + b * width + t)), mom);
    }
    store(run.max + t, top);
    store(run.sum + t, total);
    store(run.lost + t, lost);
    store(run.moment + t, mom);
    if (c.args->statistics) merge_statistics(c, run, t, old, base);
  }
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
