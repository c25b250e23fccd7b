// Logits that a forward pass leaves to its backward pass (KeptLogits in head.h).
#pragma once
#include "logits.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

// A code of 16 bits is c = round(65534 sqrt(-y / 100)), y = log2 of exp((z - largest) / temperature).  Small distances have
// fine steps: the exponential's relative error is at most 1.1e-4 sqrt(-y), a twentieth of a bfloat16's rounding where it is
// within a factor 2 of the largest, half of it at 2^-100.  Farther logits, whose exponential counts as 0, are kCodeOfNone.
constexpr float kCodeSteps = 65534.0f, kCodeOfNone = 65535.0f, kCodeRange = 100.0f;

// Calls body(group, lane, at, column) for each vector of tokens that the forward pass had
template <class Body>
G2RL_INLINE void each_kept(const HeadChunk& c, const Body& body) {
  const KeptLogits& kept = c.args->kept;
  for (int64_t p = 0; p < c.tiles; p++)
    for (int64_t t = 0; t < c.tile_width; t += kLanes) {
      const int64_t at = p * c.tile_width + t, token = c.first_token + at, group = token / 16;
      if (kept.group + group < kept.groups) body(group, token % 16, at, p * kBlock * c.tile_width + t);
    }
}

static void keep_logits(const HeadChunk& c, int64_t v0, int64_t count, const float* logits) {
  const KeptLogits& kept = c.args->kept;
  const int64_t block = v0 / kBlock, width = c.tile_width;
  const vf scale = splat(-kCodeSteps * kCodeSteps / kCodeRange);
  const vf none = splat(-__builtin_inff()), least = splat(-kCodeRange), nothing = splat(kCodeOfNone);
  each_kept(c, [&](int64_t group, int64_t lane, int64_t at, int64_t column) {
    const float* z = logits + column;
    if (kept.size == 4) {
      float* out = (float*)kept.logits(block, group) + lane;
      for (int64_t r = 0; r < kBlock; r++) store(out + r * 16, r < count ? load(z + r * width) : splat(0.0f));
      return;
    }
    vf top = none;
    for (int64_t r = 0; r < count; r++) top = at_least(load(z + r * width), top);  // drops NaN: the normaliser keeps it
    top = less(none, top, top, splat(0.0f));
    store(kept.largest(block, group) + lane, top);
    const vf log2e = to_log2(c.temperature + at);
    uint16_t* out = (uint16_t*)kept.logits(block, group) + lane;
    for (int64_t r = 0; r < count; r++) {
      const vf y = (load(z + r * width) - top) * log2e;
      store_code(out + r * 16, less(y, least, nothing, sqrt(at_least(least, y) * scale)));
    }
    for (int64_t r = count; r < kBlock; r++) store_code(out + r * 16, splat(0.0f));
  });
}

static void kept_logits(const HeadChunk& c, int64_t v0, int64_t count, float* logits) {
  const KeptLogits& kept = c.args->kept;
  const int64_t block = v0 / kBlock, width = c.tile_width;
  const vf none = splat(-__builtin_inff()), last = splat(kCodeSteps);
  if (kept.group + (c.first_token + c.tiles * width) / 16 > kept.groups) std::memset(logits, 0, sizeof(float) * c.tiles * kBlock * width);
  each_kept(c, [&](int64_t group, int64_t lane, int64_t at, int64_t column) {
    float* z = logits + column;
    if (kept.size == 4) {
      const float* in = (const float*)kept.logits(block, group) + lane;
      for (int64_t r = 0; r < count; r++) store(z + r * width, load(in + r * 16));
      return;
    }
    const vf top = load(kept.largest(block, group) + lane), ln2 = splat(-0.6931471805599453f) * load(c.temperature + at);
    const vf scale = ln2 * splat(kCodeRange) / splat(kCodeSteps * kCodeSteps);
    const uint16_t* in = (const uint16_t*)kept.logits(block, group) + lane;
    for (int64_t r = 0; r < count; r++) {
      const vf code = load_code(in + r * 16);
      store(z + r * width, less(last, code, none, fma(code * code, scale, top)));
    }
  });
}

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
