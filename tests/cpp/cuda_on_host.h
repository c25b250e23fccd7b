// Just enough CUDA for g++ to compile csrc/cuda/*.cu unchanged and run them here. Every CUDA thread is a thread of the
// host and every barrier a barrier, so that AddressSanitizer sees a kernel's addresses and ThreadSanitizer a missing
// barrier. CUDA blocks run one after the other; a launch returns when its kernel has.
#pragma once
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace on_host {

struct Barrier {
  pthread_barrier_t barrier;
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
};

struct Warp {
  Barrier barrier{32};
  double values[2][2][32];  // of all lanes, this exchange and the last
};

inline thread_local dim3 thread_index, block_index;
inline thread_local Barrier* block;
inline thread_local Warp* warp;
inline thread_local int turn;

inline unsigned lane() { return thread_index.x % 32; }

// Calls use(left and right of all lanes) once every lane of the warp is here. The next exchange uses other memory, and
// the one after it cannot begin before all lanes are done with this one.
template <class Use>
auto exchange(double left, double right, Use use) {
  double(&values)[2][32] = warp->values[turn ^= 1];
  values[0][lane()] = left;
  values[1][lane()] = right;
  warp->barrier.wait();
  return use(values[0], values[1]);
}

}  // namespace on_host

#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index

inline void __syncthreads() { on_host::block->wait(); }

inline double __shfl_xor_sync(unsigned, double x, int step) {
  return on_host::exchange(x, 0, [&](const double* all, const double*) { return all[on_host::lane() ^ step]; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned atomicOr(unsigned* address, unsigned bits) { return __atomic_fetch_or(address, bits, __ATOMIC_RELAXED); }

// mma.m8n8k4 in double: sum [8, 8] += left [8, 4] right^T [8, 4], with lanes as in csrc/cuda/group.cu.
inline void multiply(double (&sum)[2], double left, double right) {
  const unsigned row = on_host::lane() / 4, column = on_host::lane() % 4 * 2;
  on_host::exchange(left, right, [&](const double* lefts, const double* rights) {
    for (unsigned c = 0; c < 2; ++c)
      for (unsigned k = 0; k < 4; ++k) sum[c] = std::fma(lefts[row * 4 + k], rights[(column + c) * 4 + k], sum[c]);
    return 0;
  });
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const unsigned size = config->blockDim.x;
  if (size == 0 || size % 32 || size > 1024 || config->gridDim.x == 0) return cudaErrorInvalidConfiguration;
  on_host::Barrier block(size);
  std::vector<std::unique_ptr<on_host::Warp>> warps;
  for (unsigned w = 0; w < size / 32; ++w) warps.push_back(std::make_unique<on_host::Warp>());
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < size; ++t)
    threads.emplace_back([&, t] {
      on_host::thread_index = dim3(t);
      on_host::block = &block;
      on_host::warp = warps[t / 32].get();
      for (unsigned b = 0; b < config->gridDim.x; ++b) {
        on_host::block_index = dim3(b);
        kernel(arguments...);
        block.wait();  // shared memory is the next block's from here on
      }
    });
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
