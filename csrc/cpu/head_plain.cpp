// The head kernels for any CPU the compiler targets.
#define G2RL_ISA plain
#include "vec_plain.h"
// after the vector type
#include "head_narrow_tiles.h"

namespace g2rl {
const HeadKernels& head_kernels_plain() { return plain::kKernels; }
}  // namespace g2rl
