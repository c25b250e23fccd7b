// Register tile of the head kernels for 16 vector registers. Include it after the vector type.
#include "table.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

// 6 rows x 2 vectors of tokens: 12 sums
LogitsBlock logits_block_for(const HeadChunk&) { return logits_block<DotFloat, 6, 2>; }
int64_t tile_width_for(int64_t) { return 2 * kLanes; }

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
