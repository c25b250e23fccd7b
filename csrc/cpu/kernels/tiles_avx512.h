// Register tiles of the AVX-512 head kernels: rows x vectors of tokens, 16 to 24 sums in 32 registers.
#include "vec_avx512.h"
// after the vector type
#include "table.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

template <class Dot>
LogitsBlock tile_for(int64_t width) {
  if (width == 64) return logits_block<Dot, 6, 4>;
  if (width == 48) return logits_block<Dot, 8, 3>;
  if (width == 32) return logits_block<Dot, 8, 2>;
  return logits_block<Dot, 16, 1>;
}

LogitsBlock logits_block_for(const HeadChunk& c) {
#ifdef G2RL_HAS_BF16_DOT
  if (c.bf16_pairs) return tile_for<DotBf16>(c.tile_width);
#endif
  return tile_for<DotFloat>(c.tile_width);
}

// The widest tile that divides the chunk
int64_t tile_width_for(int64_t width) { return width % 64 == 0 ? 64 : width % 48 == 0 ? 48 : width % 32 == 0 ? 32 : 16; }

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
