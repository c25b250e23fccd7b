// The caller's threads (torch's), as the kernels see them.
#pragma once
#include <cstdint>

namespace g2rl {

// Calls body(ctx, i) for i in 0..n-1, in any order, on any threads, and returns when all are done.
using Parallel = void (*)(int64_t n, void* ctx, void (*body)(void* ctx, int64_t i));

}  // namespace g2rl
