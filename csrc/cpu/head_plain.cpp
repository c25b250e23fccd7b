// The head kernels for any CPU the compiler targets.
#define G2RL_ISA plain
#include "kernels/vec_plain.h"
// after the vector type
#include "kernels/tiles_narrow.h"

namespace g2rl {
const HeadKernels& head_kernels_plain() { return plain::kKernels; }
}  // namespace g2rl
