// The group geometry on the GPU. Callers need no CUDA header.
#pragma once
#include <cstdint>

#include "../group_math.h"

// Number of doubles that the workspace needs; 0 for M <= 16 unless `scale` is the batch's.
extern "C" int64_t g2rl_cuda_group_workspace(int64_t B, int64_t M, int scale);

// `args` lies in host memory and points to device memory, as does `workspace`, whose contents do not matter.
// Members outside [0, S) are empty places; a row named twice is the caller's error (outputs race).
// Runs on `stream` (a cudaStream_t) and never synchronises. Returns a cudaError_t, 0 for success.
extern "C" int g2rl_cuda_group_geometry(const g2rl::GroupArgs* args, double* workspace, void* stream);
