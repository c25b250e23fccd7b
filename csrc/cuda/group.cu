// Arguments: GroupArgs. One launch, one CUDA block a group; further CUDA blocks write the zeros of rows that no group
// names. A second, small kernel runs only with Scale::batch.
//
//   1. Inner products on the tensor cores, in double, for tiles of 16 rows: multiply_tiles.
//   2. The 16 warps share out the columns; their partial sums are added in the order of warps.
//   3. One warp a member: cosines, weights, exploration score (eqs. 9-11). One warp a group: eqs. 12-13 and 2.
//
// Exact: products of floats are exact in double, and all sums are double, in an order that depends on d alone.
// Groups of more than 16 rows keep their inner products in the workspace instead of shared memory.
// Includes no CUDA header: nvcc brings its own, and tests/cpp/cuda_on_host.h stands in for them.
#include "group.h"

namespace g2rl {
namespace {

constexpr int kWarp = 32, kWarps = 16, kThreads = kWarp * kWarps;
constexpr int kTile = 16;     // rows
constexpr int kColumns = 16;  // columns that a warp takes at a time: four of each lane
constexpr unsigned kAll = 0xffffffffu;

struct Device : GroupArgs {
  double* workspace;  // shaped rewards [B, M]; then, for groups beyond kTile, inner products, rewards and scores

  __device__ bool empty(int64_t member) const { return uint64_t(member) >= uint64_t(S); }
};

struct Shared {
  union {
    double partial[kWarps][kTile * kTile];
    unsigned named[kWarps * kTile * kTile * 2];  // one bit a row
  };
  // Used for groups of one tile.
  double inner[kTile * kTile], reward[kTile], nu[kTile], value[kTile];
  int64_t member[kTile];
};
constexpr int64_t kNamedRows = sizeof(Shared::named) * 8;

// Every lane receives the same bits.
template <class Combine>
__device__ double across_warp(double x, Combine combine) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

__device__ double sum_across_warp(double x) {
  return across_warp(x, [](double a, double b) { return a + b; });
}

#ifdef __CUDACC__
// sum += left [8, 4] right^T [8, 4]; a lane holds row l / 4, column l % 4 of both, and of the sum [8, 8] row l / 4,
// columns 2 (l % 4) and the next.
__device__ void multiply(double (&sum)[2], double left, double right) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sum[0]), "+d"(sum[1])
      : "d"(left), "d"(right));
}
#endif

// Columns k to k + 3 of a row, zeros beyond d or without a row.
template <bool kVectors>
__device__ float4 four(const float* row, int64_t k, int64_t d) {
  float4 x = {0, 0, 0, 0};
  if (row == nullptr || k >= d) return x;
  if (kVectors) return __ldg(reinterpret_cast<const float4*>(row + k));  // d % 4 == 0
  x.x = __ldg(row + k);
  if (k + 1 < d) x.y = __ldg(row + k + 1);
  if (k + 2 < d) x.z = __ldg(row + k + 2);
  if (k + 3 < d) x.w = __ldg(row + k + 3);
  return x;
}

// This warp's share of the inner products between tiles I and J: into `partial`, [16, 16], without its lower left
// quarter if I is J.
//
// A product is of 8 x 4 and 4 x 8. Lane l holds column l % 4 of row l / 4 of the left factor, and the same place of the
// right factor's transpose, so for a Gram matrix one register serves as both: a tile costs two loads and three products
// (of its four quarters of 8 x 8, one mirrors another). Which four columns a product sums over is free: each lane reads
// four consecutive ones at once and uses them in four products.
template <bool kVectors, bool kSame>
__device__ void multiply_tiles(const Device& a, const int64_t* members, int64_t I, int64_t J, double* partial) {
  constexpr int kEights = kSame ? 2 : 4;  // sets of eight rows
  constexpr int kSteps = 16 / kEights;    // independent steps, for the compiler to load ahead
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float* row[kEights];
  for (int e = 0; e < kEights; ++e) {
    const int64_t place = (e < 2 ? I : J) * kTile + e % 2 * 8 + lane / 4;
    const int64_t member = place < a.M ? members[place] : -1;
    row[e] = a.empty(member) ? nullptr : a.features + member * a.d;
  }
  const int64_t stride = kWarps * kColumns, offset = lane % 4 * 4;
  double sum[2][2][2] = {};
  for (int64_t k = warp * kColumns; k < a.d; k += kSteps * stride) {
    float4 x[kSteps][kEights];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int e = 0; e < kEights; ++e) x[s][e] = four<kVectors>(row[e], k + s * stride + offset, a.d);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        double column[kEights];
#pragma unroll
        for (int e = 0; e < kEights; ++e)
          column[e] = c == 0 ? x[s][e].x : c == 1 ? x[s][e].y : c == 2 ? x[s][e].z : x[s][e].w;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = kSame ? i : 0; j < 2; ++j) multiply(sum[i][j], column[i], column[kSame ? j : 2 + j]);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = kSame ? i : 0; j < 2; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) partial[(8 * i + lane / 4) * kTile + 8 * j + lane % 4 * 2 + c] = sum[i][j][c];
}

// Steps 1 and 2: inner [M, M], both halves, 0 at empty places.
template <bool kVectors>
__device__ void inner_products(const Device& a, const int64_t* members, Shared& shared, double* inner) {
  const int warp = threadIdx.x / kWarp;
  const int64_t tiles = (a.M + kTile - 1) / kTile;
  for (int64_t I = 0; I < tiles; ++I)
    for (int64_t J = I; J < tiles; ++J) {
      if (I == J)
        multiply_tiles<kVectors, true>(a, members, I, J, shared.partial[warp]);
      else
        multiply_tiles<kVectors, false>(a, members, I, J, shared.partial[warp]);
      __syncthreads();
      const int place = threadIdx.x;
      const int64_t i = I * kTile + place / kTile, j = J * kTile + place % kTile;
      if (place < kTile * kTile && i <= j && j < a.M) {
        double sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += shared.partial[w][place];
        inner[i * a.M + j] = inner[j * a.M + i] = sum;
      }
      __syncthreads();
    }
}

// Step 3 for member i, by one warp: its row of similarity, its exploration score.
__device__ void score_member(const Device& a, const int64_t* members, const double* inner, const double* reward,
                             int64_t i, float* similarity, double* nu) {
  const int lane = threadIdx.x % kWarp;
  const double eps = a.options.eps;
  double largest = -INFINITY;
  for (int64_t j = lane; j < a.M; j += kWarp)
    if (j != i && !a.empty(members[j]) && reward[j] > largest) largest = reward[j];
  ScoreSum sum(across_warp(largest, [](double x, double y) { return x > y ? x : y; }));
  const bool here = !a.empty(members[i]);
  const double norm = sqrt(inner[i * a.M + i]);
  for (int64_t j = lane; j < a.M; j += kWarp) {
    double s = 0;
    if (here && !a.empty(members[j])) {
      s = cosine(inner[i * a.M + j], norm, sqrt(inner[j * a.M + j]), eps);
      if (j != i) sum.add(reward[j], s);
    }
    similarity[j] = float(s);
  }
  sum.weights = sum_across_warp(sum.weights);
  sum.sum = sum_across_warp(sum.sum);
  if (lane == 0) *nu = sum.exploration_score(a.options);
}

// Step 3 for the group, by one warp: each lane looks after its own members throughout.
__device__ void finish_group(const Device& a, const int64_t* members, const double* reward, const double* nu,
                             double* value) {
  const int lane = threadIdx.x % kWarp;
  Extremes e;
  for (int64_t j = lane; j < a.M; j += kWarp)
    if (!a.empty(members[j])) e.add(nu[j], reward[j], a.options);
  e.low_nu = across_warp(e.low_nu, smaller);
  e.high_nu = across_warp(e.high_nu, larger);
  e.low_reward = across_warp(e.low_reward, smaller);
  e.high_reward = across_warp(e.high_reward, larger);
  double total = 0, n = 0, squares = 0;
  for (int64_t j = lane; j < a.M; j += kWarp) {
    if (a.empty(members[j])) continue;
    value[j] = shaped_reward(reward[j], nu[j], e, a.options);
    a.exploration_scores[members[j]] = float(nu[j]);
    a.shaped_rewards[members[j]] = float(value[j]);
    total += value[j];
    n += 1;
  }
  n = sum_across_warp(n);
  const double mean = sum_across_warp(total) / n;
  for (int64_t j = lane; j < a.M; j += kWarp)
    if (!a.empty(members[j])) squares += (value[j] - mean) * (value[j] - mean);
  squares = sum_across_warp(squares);
  const double scale = a.options.scale == Scale::group ? deviation(squares, int64_t(n), a.options.eps) : 1;
  for (int64_t j = lane; j < a.M; j += kWarp)
    if (!a.empty(members[j])) a.advantages[members[j]] = float((value[j] - mean) / scale);
}

// Zeros for the rows from first to first + kNamedRows - 1 that are in no group. The order of atomic operations does not
// change the result.
__device__ void zero_unnamed(const Device& a, Shared& shared, int64_t first) {
  const int64_t rows = a.S - first < kNamedRows ? a.S - first : kNamedRows;
  for (int64_t word = threadIdx.x; word * 32 < rows; word += kThreads) shared.named[word] = 0;
  __syncthreads();
  for (int64_t place = threadIdx.x; place < a.B * a.M; place += kThreads) {
    const int64_t row = a.members[place] - first;
    if (uint64_t(row) < uint64_t(rows)) atomicOr(&shared.named[row / 32], 1u << row % 32);
  }
  __syncthreads();
  for (int64_t row = threadIdx.x; row < rows; row += kThreads)
    if (!(shared.named[row / 32] >> row % 32 & 1))
      a.exploration_scores[first + row] = a.shaped_rewards[first + row] = a.advantages[first + row] = 0;
}

template <bool kVectors>
__global__ void __launch_bounds__(kThreads, 1) group_kernel(Device a) {  // 1: or it spills on sm_120
  __shared__ Shared shared;
  const int64_t b = blockIdx.x, M = a.M;
  if (b >= a.B) {
    zero_unnamed(a, shared, (b - a.B) * kNamedRows);
    return;
  }
  const int64_t* members = a.members + b * M;
  const bool small = M <= kTile;
  double* values = a.workspace + b * M;
  double* large = a.workspace + a.B * M + b * (M + 2) * M;
  double* inner = small ? shared.inner : large;
  double* reward = small ? shared.reward : large + M * M;
  double* nu = small ? shared.nu : large + M * M + M;
  double* value = small && a.options.scale != Scale::batch ? shared.value : values;

  for (int64_t j = threadIdx.x; j < M; j += kThreads) {
    const int64_t member = members[j];
    if (small) shared.member[j] = member;
    reward[j] = a.empty(member) ? 0 : a.rewards[member];
  }
  inner_products<kVectors>(a, members, shared, inner);  // ends with a barrier
  if (small) members = shared.member;
  for (int64_t i = threadIdx.x / kWarp; i < M; i += kWarps)
    score_member(a, members, inner, reward, i, a.similarity + (b * M + i) * M, nu + i);
  __syncthreads();
  if (threadIdx.x < kWarp) finish_group(a, members, reward, nu, value);
}

// One CUDA block. The shaped rewards of all groups lie at the head of the workspace.
__global__ void __launch_bounds__(kThreads) batch_scale_kernel(Device a) {
  __shared__ double partial[kWarps];
  auto sum_across_block = [&](double x) {
    x = sum_across_warp(x);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w];
    return sum;
  };
  const double* value = a.workspace;
  const int64_t places = a.B * a.M;
  double total = 0, n = 0, squares = 0;
  for (int64_t j = threadIdx.x; j < places; j += kThreads)
    if (!a.empty(a.members[j])) total += value[j], n += 1;
  n = sum_across_block(n);
  const double mean = sum_across_block(total) / n;
  for (int64_t j = threadIdx.x; j < places; j += kThreads)
    if (!a.empty(a.members[j])) squares += (value[j] - mean) * (value[j] - mean);
  const double scale = deviation(sum_across_block(squares), int64_t(n), a.options.eps);
  for (int64_t j = threadIdx.x; j < places; j += kThreads)
    if (!a.empty(a.members[j])) a.advantages[a.members[j]] = float(a.advantages[a.members[j]] / scale);
}

cudaError_t launch(void (*kernel)(Device), int64_t blocks, cudaStream_t stream, const Device& args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace
}  // namespace g2rl

extern "C" int64_t g2rl_cuda_group_workspace(int64_t B, int64_t M, int scale) {
  const bool large = M > g2rl::kTile;
  if (!large && g2rl::Scale(scale) != g2rl::Scale::batch) return 0;
  return B * M * (large ? M + 3 : 1);
}

extern "C" int g2rl_cuda_group_geometry(const g2rl::GroupArgs* given, double* workspace, void* stream) {
  using namespace g2rl;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  Device args{*given, workspace};
  if (args.M == 0) args.B = 0;
  const int64_t blocks = args.B + (args.S + kNamedRows - 1) / kNamedRows;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vectors = args.d % 4 == 0 && uintptr_t(args.features) % sizeof(float4) == 0;
  const cudaError_t failed = launch(vectors ? group_kernel<true> : group_kernel<false>, blocks, on, args);
  if (failed != cudaSuccess || args.options.scale != Scale::batch || args.B == 0) return failed;
  return launch(batch_scale_kernel, 1, on, args);
}
