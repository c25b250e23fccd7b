// Shared by the tests of the CPU kernels: counted comparisons, random numbers, threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/isa.h"

namespace tests {

using g2rl::Isa;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;  // rounding to float32

inline int failures = 0, comparisons = 0;

inline void fail(const std::string& where, const std::string& what) {
  static std::string last;
  if (failures++ < 1000 && where != last) std::printf("FAIL %s: %s\n", where.c_str(), what.c_str());
  last = where;  // prints the first failure of each case
}

inline void expect(bool ok, const std::string& where, const std::string& what) {
  comparisons++;
  if (!ok) fail(where, what);
}

inline void expect_near(double actual, double exact, double allowed, const std::string& where, const char* what, int64_t i) {
  comparisons++;
  if (actual == exact || (std::isnan(actual) && std::isnan(exact)) || std::abs(actual - exact) <= allowed) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld] = %.9g, exactly %.9g, off by %.3g, allowed %.3g", what, (long long)i, actual, exact,
                actual - exact, allowed);
  fail(where, text);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline std::mt19937 generator(1);  // one sequence for all tests

inline int64_t below(int64_t n) { return int64_t(generator() % uint64_t(n)); }
inline double uniform() { return generator() * 0x1p-32; }
inline double bell() { return std::sqrt(3.0) * (uniform() + uniform() + uniform() + uniform() - 2); }  // variance 1

inline void one_thread(int64_t n, void* ctx, void (*body)(void*, int64_t)) {
  for (int64_t i = 0; i < n; i++) body(ctx, i);
}

// Three threads, each from its last index to its first.
inline void three_threads(int64_t n, void* ctx, void (*body)(void*, int64_t)) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < std::min<int64_t>(n, 3); first++)
    threads.emplace_back([=] {
      for (int64_t i = first + (n - 1 - first) / 3 * 3; i >= 0; i -= 3) body(ctx, i);
    });
  for (std::thread& thread : threads) thread.join();
}

inline std::vector<Isa> instruction_sets() {
  std::vector<Isa> sets;
  for (int i = 0; i <= int(g2rl::best_isa()); i++) sets.push_back(Isa(i));
  return sets;
}

// main.cpp calls them in this order.
void test_groups();              // test_group.cpp
void test_head();                // test_head.cpp
void test_gradients();           // test_gradients.cpp
void test_large_vocabularies();  // test_head.cpp
void test_options();             // test_options.cpp
void test_support();             // test_support.cpp

}  // namespace tests
