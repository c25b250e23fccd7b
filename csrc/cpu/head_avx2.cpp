// The head kernels for CPUs with AVX2, FMA and F16C.
#include "isa.h"
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define G2RL_ISA avx2
#include "vec_avx2.h"
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

const HeadKernels& head_kernels_avx2() {
  using namespace avx2;
  static constexpr HeadKernels kernels = {false, panel_for, pack, forward, merge, collect, project};
  return kernels;
}

}  // namespace g2rl
#pragma GCC pop_options
#endif
