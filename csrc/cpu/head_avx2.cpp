// The head kernels for CPUs with AVX2, FMA and F16C.
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define G2RL_ISA avx2
#include "kernels/vec_avx2.h"
// after the vector type
#include "kernels/tiles_narrow.h"

namespace g2rl {
const HeadKernels& head_kernels_avx2() { return avx2::kKernels; }
}  // namespace g2rl
#pragma GCC pop_options
#endif
