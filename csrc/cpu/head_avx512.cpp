// The head kernels for CPUs with AVX-512.
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define G2RL_ISA avx512
#include "kernels/tiles_avx512.h"

namespace g2rl {
const HeadKernels& head_kernels_avx512() { return avx512::kKernels; }
}  // namespace g2rl
#pragma GCC pop_options
#endif
