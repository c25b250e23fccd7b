// The head kernels for CPUs with AVX-512 and its bfloat16 dot product.
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define G2RL_ISA avx512bf16
#define G2RL_HAS_BF16_DOT
#include "kernels/tiles_avx512.h"

namespace g2rl {
const HeadKernels& head_kernels_avx512bf16() { return avx512bf16::kKernels; }
}  // namespace g2rl
#pragma GCC pop_options
#endif
