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
template <int U, bool kCapped, bool kKeep>
static void softmax_columns(const HeadChunk& c, int64_t count, const float* z, const float* temperature, uint16_t* code, float* block_max,
                            float* block_sum, float* block_moment) {
  const vf floor = splat(kQuarterLog2Floor), one = splat(1.0f);
  const vf uncap = splat(kCapped ? 1.0f / c.args->logit_softcap : 0.0f);
  vf max[U], base[U], quarter[U], total[U], moment[U];
  for (int u = 0; u < U; u++) quarter[u] = to_quarter_log2(temperature + u * kLanes);
  for (int u = 0; u < U; u++) max[u] = splat(-__builtin_inff()), total[u] = moment[u] = splat(0.0f);
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) max[u] = at_least(load(z + r * c.tile_width + u * kLanes), max[u]);  // drops NaN, which `total` keeps
  for (int u = 0; u < U; u++) base[u] = less(splat(-__builtin_inff()), max[u], max[u], splat(0.0f));  // all -inf: any finite base
  for (int64_t r = 0; r < count; r++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const vf x = load(z + r * c.tile_width + u * kLanes), y = at_least(floor, (x - base[u]) * quarter[u]);
      vf root = exp2_negative(y, kCodeMax);
      const vf square = root * root, e = square * square;  // kCodeMax^4 too large until the sums are stored
      total[u] += e;
      moment[u] = fma(e, y, moment[u]);
      if (kCapped) root *= sqrt(sqrt(at_least(splat(0.0f), one - (x * uncap) * (x * uncap))));
      if (kKeep) store_code(code + r * c.tile_width + u * kLanes, root);
    }
  const vf unscale = splat(1.0f / kCodeMax) * splat(1.0f / kCodeMax);
  for (int u = 0; u < U; u++) {
    store(block_max + u * kLanes, max[u]);
    store(block_sum + u * kLanes, total[u] * unscale * unscale);
    store(block_moment + u * kLanes, moment[u] * unscale * unscale);
  }
}

template <int U, bool kCapped, bool kKeep>
static void softmax_tiles(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t t = 0; t < c.tile_width; t += U * kLanes) {
      const int64_t at = (block * c.tiles + p) * c.tile_width + t;
      uint16_t* code = kKeep ? c.codes + (block * c.tiles + p) * kBlock * c.tile_width + t : nullptr;
      softmax_columns<U, kCapped, kKeep>(c, count, logits + p * kBlock * c.tile_width + t, c.temperature + p * c.tile_width + t, code,
                                         c.block_max + at, c.block_sum + at, c.block_moment + at);
    }
}

template <bool kCapped, bool kKeep>
static void softmax_block(const HeadChunk& c, int64_t block, int64_t count, const float* logits) {
  const int64_t vectors = c.tile_width / kLanes;
  if (vectors % 4 == 0) softmax_tiles<4, kCapped, kKeep>(c, block, count, logits);
  else if (vectors % 3 == 0) softmax_tiles<3, kCapped, kKeep>(c, block, count, logits);
  else if (vectors % 2 == 0) softmax_tiles<2, kCapped, kKeep>(c, block, count, logits);
  else softmax_tiles<1, kCapped, kKeep>(c, block, count, logits);
}

static void forward(const HeadChunk& c, int64_t block) {
  alignas(64) float logits[kBlock * kMaxWidth];
  const int64_t v0 = c.slab_begin + block * kBlock, count = smaller(kBlock, c.slab_end - v0);
  logits_block_for(c)(c, v0, count, logits);
  finish_logits(c, v0, count, logits);
  if (c.args->kept.has(v0 / kBlock)) keep_logits(c, v0, count, logits);
  take_targets(c, v0, count, logits);
  const bool capped = c.args->logit_softcap != 0.0f;
  if (c.codes) (capped ? softmax_block<true, true> : softmax_block<false, true>)(c, block, count, logits);
  else (capped ? softmax_block<true, false> : softmax_block<false, false>)(c, block, count, logits);
}

// Adds the slab's blocks to the running statistics, in order: the same bits for any number of threads.
// sum is compensated (Kahan suffices for terms >= 0); moment is in quarter log2, relative to max.
static void merge(const HeadChunk& c, float* max, float* sum, float* compensation, float* moment) {
  const int64_t blocks = (c.slab_end - c.slab_begin + kBlock - 1) / kBlock, width = c.tiles * c.tile_width;
  const vf none = splat(-__builtin_inff());
  for (int64_t t = 0; t < width; t += kLanes) {
    const vf old = load(max + t), quarter = to_quarter_log2(c.temperature + t);
    vf top = old;
    for (int64_t b = 0; b < blocks; b++) top = at_least(top, load(c.block_max + b * width + t));
    const vf base = less(none, top, top, splat(0.0f));
    vf total = splat(0.0f), lost = splat(0.0f), mom = splat(0.0f);
    for (int64_t b = -1; b < blocks; b++) {
      const bool first = b < 0;
      const vf shift = at_least(splat(kQuarterLog2Floor), ((first ? old : load(c.block_max + b * width + t)) - base) * quarter);
      const vf root = exp2_negative(shift), square = root * root, weight = square * square;
      const vf s = first ? load(sum + t) - load(compensation + t) : load(c.block_sum + b * width + t);
      const vf term = weight * s - lost, next = total + term;
      lost = (next - total) - term;
      total = next;
      mom = fma(weight, fma(s, shift, first ? load(moment + t) : load(c.block_moment + b * width + t)), mom);
    }
    store(max + t, top);
    store(sum + t, total);
    store(compensation + t, lost);
    store(moment + t, mom);
  }
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
