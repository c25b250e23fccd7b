// The head kernels for any CPU the compiler targets.
#define G2RL_ISA plain
#include "vec_plain.h"
// after the vector type
#include "head_kernels_impl.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

// 6 rows x 2 vectors of tokens: 12 sums in 16 registers
LogitsBlock logits_block_for(const HeadChunk&) { return logits_block<DotFloat, 6, 2>; }
int64_t panel_for(int64_t) { return 2 * kLanes; }

}  // namespace
}  // namespace G2RL_ISA

const HeadKernels& head_kernels_plain() {
  using namespace plain;
  static constexpr HeadKernels kernels = {false, panel_for, pack, forward, merge, collect, project};
  return kernels;
}

}  // namespace g2rl
