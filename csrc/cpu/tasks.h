// Loops over tasks on any number of threads, for head.cpp and logprobs.cpp.
#pragma once
#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace g2rl {

template <class Body>
void run(Parallel parallel, int64_t n, const Body& body) {
  // Each thread takes the next few indices until all are taken, so that a slow thread does not hold up the others.
  // Results do not depend on which thread computes an index.
  struct Work {
    const Body& body;
    const int64_t n, grain;
    std::atomic<int64_t> next{0};
  } work{body, n, std::max<int64_t>(n / 128, 1)};
  parallel(std::min<int64_t>(n, 128), &work, [](void* ctx, int64_t) {
    Work& w = *static_cast<Work*>(ctx);
    for (int64_t i; (i = w.next.fetch_add(w.grain)) < w.n;)
      for (int64_t j = i; j < std::min(i + w.grain, w.n); j++) w.body(j);
  });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace g2rl
