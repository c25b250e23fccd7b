// One block a group. Warps take the members in turn and reduce over d in a fixed order, so that results repeat
// bitwise; the scalar mathematics is group_math.h, the same as on the CPU.
#include <cuda_runtime.h>

#include "group.h"

namespace g2rl {
namespace {

constexpr int kThreads = 256, kWarp = 32;

struct Device {
  const float *features, *rewards;
  const int64_t* members;
  int64_t S, d, B, M;
  GroupOptions options;
  double *norm, *value;  // workspace, [B, M] each: norms, later scores; scores, later shaped rewards
  float *similarity, *score, *shaped_rewards, *advantages;
};

// Every lane of the warp receives the sum.
__device__ double inner(const float* a, const float* b, int64_t d) {
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < d; k += kWarp) sum += double(a[k]) * double(b[k]);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

__global__ void __launch_bounds__(kThreads) group_kernel(Device a) {
  const int64_t M = a.M, b = blockIdx.x;
  const int64_t* members = a.members + b * M;
  double *norm = a.norm + b * M, *value = a.value + b * M;
  const int warp = threadIdx.x / kWarp, warps = kThreads / kWarp;
  const bool leader = threadIdx.x % kWarp == 0;
  auto empty = [&](int64_t i) { return uint64_t(members[i]) >= uint64_t(a.S); };
  auto row = [&](int64_t i) { return a.features + members[i] * a.d; };

  for (int64_t i = warp; i < M; i += warps)
    if (!empty(i)) {
      const double square = inner(row(i), row(i), a.d);
      if (leader) norm[i] = sqrt(square);
    }
  __syncthreads();

  // Scores go to `value` first: `norm` is still read by the other warps.
  for (int64_t i = warp; i < M; i += warps) {
    float* similarity = a.similarity + (b * M + i) * M;
    ScoreSum sum;
    if (!empty(i)) sum.begin(a.rewards, members, M, a.S, i, a.options.eps);
    for (int64_t j = 0; j < M; ++j) {
      double s = 0;
      if (!empty(i) && !empty(j)) {
        s = cosine(inner(row(i), row(j), a.d), norm[i], norm[j], a.options.eps);
        if (j != i) sum.add(a.rewards[members[j]], s);
      }
      if (leader) similarity[j] = float(s);
    }
    if (leader && !empty(i)) value[i] = sum.score(a.options.score);
  }
  __syncthreads();

  for (int64_t i = threadIdx.x; i < M; i += kThreads) norm[i] = value[i];
  __syncthreads();
  if (threadIdx.x == 0)
    finish_group(a.rewards, members, M, a.S, a.options, norm, value, a.score, a.shaped_rewards, a.advantages);
}

__global__ void batch_scale_kernel(Device a) {
  __shared__ double scale;
  if (threadIdx.x == 0) scale = batch_scale(a.members, a.B * a.M, a.S, a.value, a.options.eps);
  __syncthreads();
  for (int64_t row = threadIdx.x; row < a.S; row += kThreads) a.advantages[row] = float(a.advantages[row] / scale);
}

}  // namespace
}  // namespace g2rl

extern "C" int g2rl_cuda_group_geometry(const float* features, const float* rewards, const int64_t* members,
                                        int64_t S, int64_t d, int64_t B, int64_t M, double lam, double clip,
                                        int shaping, int score, int scale, int skip_uniform, double eps,
                                        double* workspace, float* similarity, float* out_score,
                                        float* shaped_rewards, float* advantages, void* stream) {
  using namespace g2rl;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  for (float* out : {out_score, shaped_rewards, advantages})  // rows of no group stay zero
    if (S > 0)
      if (const cudaError_t failed = cudaMemsetAsync(out, 0, sizeof(float) * S, on)) return failed;
  if (B == 0 || M == 0) return cudaSuccess;
  const GroupOptions options{lam,          clip,         eps, Shaping(shaping), Score(score), Scale(scale),
                             skip_uniform != 0};
  const Device args{features,  rewards,           members,    S,         d,
                    B,         M,                 options,    workspace, workspace + B * M,
                    similarity, out_score, shaped_rewards, advantages};
  group_kernel<<<unsigned(B), kThreads, 0, on>>>(args);
  if (options.scale == Scale::batch) batch_scale_kernel<<<1, kThreads, 0, on>>>(args);
  return cudaGetLastError();
}
