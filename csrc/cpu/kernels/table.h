// The head kernels: written once over a vector type, compiled once for each instruction set. The including file sets the
// target, defines G2RL_ISA, includes a vec_*.h first, then tiles_*.h for the register tiles. ../head.cpp,
// ../logprobs.cpp and ../support.cpp call the kernels.
//
// Tokens are vector lanes.  Hidden is packed transposed, so that a row of the weight takes one broadcast a number and no
// packing: the weight is streamed from where the caller left it, once a chunk of tokens.
// No torch, no std templates: code shared through them would carry these instructions to other CPUs.
#pragma once
#include "gathered.h"

namespace g2rl {
namespace G2RL_ISA {
namespace {

#ifdef G2RL_HAS_BF16_DOT
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif
constexpr HeadKernels kKernels = {kBf16Dot, tile_width_for, pack, forward, merge, collect, project, project_cached, gradient, block_width_for, pack_rows, product, round_to, unpack_floats,
                                  gather_dot, gather_add};

}  // namespace
}  // namespace G2RL_ISA
}  // namespace g2rl
