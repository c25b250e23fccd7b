// The group geometry on the GPU. No CUDA header is needed to call it.
#pragma once
#include <cstdint>

#include "../group_math.h"

// Doubles of workspace that groups of at most M rows need; 0 where M <= 16 and `scale` is not the batch's.
extern "C" int64_t g2rl_cuda_group_workspace(int64_t B, int64_t M, int scale);

// Device pointers: features [S, d] and rewards [S] float32, members [B, M] int64, all contiguous; workspace as above,
// contents of no matter. similarity [B, M, M], score, shaped_rewards, advantages [S] float32 are written in full.
// Entries of members outside [0, S) are empty places; a row named twice is the caller's error (outputs race).
// Runs on `stream` (a cudaStream_t) and never synchronises. Returns a cudaError_t, 0 for success.
extern "C" int g2rl_cuda_group_geometry(const float* features, const float* rewards, const int64_t* members,
                                        int64_t S, int64_t d, int64_t B, int64_t M, double lam, double clip,
                                        int shaping, int score, int scale, int skip_uniform, double eps,
                                        double* workspace, float* similarity, float* out_score,
                                        float* shaped_rewards, float* advantages, void* stream);
