// csrc/cuda/group.cu, run on the CPU by cuda_on_host.h, against the CPU kernel: ragged and degenerate groups, every
// option, rows of no group. tests/packaging/test_group_on_host.py builds and runs it under the sanitizers. Inputs and
// outputs have no spare elements.
#include "cuda_on_host.h"
// after it
#include "../../csrc/cpu/group.h"
#include "../../csrc/cuda/group.cu"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace {

using g2rl::ExplorationScore;
using g2rl::Scale;
using g2rl::Shaping;

int failures = 0;
std::mt19937 generator(1);
int64_t below(int64_t n) { return int64_t(generator() % uint64_t(n)); }
float bell() {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += float(generator() * 0x1p-32);
  return sum - 6;
}

// Memory that begins `skew` floats after a multiple of 16 bytes and ends with the last element.
struct Rows {
  float* base;
  float* data;
  Rows(const std::vector<float>& values, size_t skew)
      : base(static_cast<float*>(std::malloc((values.size() + skew + 1) * sizeof(float)))), data(base + skew) {
    std::copy(values.begin(), values.end(), data);
  }
  ~Rows() { std::free(base); }
  Rows(const Rows&) = delete;
};

struct Case {
  int64_t S, d, B, M;
  std::vector<float> features, rewards;
  std::vector<int64_t> members;
  g2rl::GroupOptions options;
  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof text, "S=%lld d=%lld B=%lld M=%lld shaping=%d exploration_score=%d scale=%d skip=%d", (long long)S,
                  (long long)d, (long long)B, (long long)M, int(options.shaping), int(options.exploration_score),
                  int(options.scale), int(options.skip_uniform));
    return text;
  }
};

struct Outputs {
  std::vector<float> similarity, scores, shaped, advantages;
  explicit Outputs(const Case& c) : similarity(c.B * c.M * c.M, 77), scores(c.S, 77), shaped(c.S, 77), advantages(c.S, 77) {}
};

g2rl::GroupArgs arguments(const Case& c, const float* features, const int64_t* members, Outputs& out) {
  return {features, c.rewards.data(), members, c.S, c.d, c.B, c.M, c.options,
          out.similarity.data(), out.scores.data(), out.shaped.data(), out.advantages.data()};
}

Outputs on_cpu(const Case& c) {
  Outputs out(c);
  std::vector<int64_t> members = c.members;
  for (int64_t& m : members)
    if (m >= c.S) m = -1;  // on the GPU just another empty place
  g2rl::group_geometry(arguments(c, c.features.data(), members.data(), out), [](int64_t n, void* ctx, void (*body)(void*, int64_t)) {
    for (int64_t i = 0; i < n; ++i) body(ctx, i);
  });
  return out;
}

Outputs on_gpu(const Case& c, size_t skew) {
  Outputs out(c);
  const Rows features(c.features, skew);
  std::vector<double> workspace(g2rl_cuda_group_workspace(c.B, c.M, int(c.options.scale)), NAN);
  const g2rl::GroupArgs args = arguments(c, features.data, c.members.data(), out);
  const int error = g2rl_cuda_group_geometry(&args, workspace.data(), nullptr);
  if (error) failures++, std::printf("FAIL %s: error %d\n", c.name().c_str(), error);
  return out;
}

void compare(const Case& c, const char* what, const std::vector<float>& ours, const std::vector<float>& theirs, bool exact) {
  for (size_t i = 0; i < ours.size(); ++i) {
    const float a = ours[i], b = theirs[i];
    // Both are double until the last rounding; tolerances of tests/group/test_group.py.
    const bool same = std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)) || a == b;
    if (same || (!exact && std::abs(double(a) - b) <= 2e-7 + 1e-6 * std::abs(double(b)))) continue;
    if (failures++ < 20) std::printf("FAIL %s: %s[%zu] = %.9g, needs %.9g\n", c.name().c_str(), what, i, a, b);
    return;
  }
}

void compare(const Case& c, const Outputs& ours, const Outputs& theirs, bool exact) {
  compare(c, "similarity", ours.similarity, theirs.similarity, exact);
  compare(c, "exploration_scores", ours.scores, theirs.scores, exact);
  compare(c, "shaped", ours.shaped, theirs.shaped, exact);
  compare(c, "advantages", ours.advantages, theirs.advantages, exact);
}

// B groups of 1 to M rows in mixed order, `spare` rows of no group.
Case make(int64_t B, int64_t M, int64_t d, int64_t spare, bool ragged) {
  Case c{};
  c.B = B, c.M = M, c.d = d;
  std::vector<int64_t> rows;
  for (int64_t place = 0; place < B * M; ++place)
    c.members.push_back(!ragged || place % M == 0 || below(4) ? c.S++ : below(2) ? -1 : INT64_MAX);
  c.S += spare;
  for (int64_t row = 0; row < c.S; ++row) rows.push_back(row);
  for (int64_t row = c.S; row > 1; --row) std::swap(rows[row - 1], rows[below(row)]);
  for (int64_t& m : c.members)
    if (uint64_t(m) < uint64_t(c.S)) m = rows[m];
  const int kind = int(below(4));  // general, collinear, some zero, some NaN
  std::vector<float> first(d);
  for (float& x : first) x = bell();
  for (int64_t row = 0; row < c.S; ++row) {
    const float size = std::pow(10.f, float(below(7) - 3)) * (kind == 2 && below(3) == 0 ? 0.f : 1.f), along = bell();
    for (int64_t k = 0; k < d; ++k) c.features.push_back(size * (kind == 1 ? along * first[k] : bell()));
    if (kind == 3 && d > 0 && below(5) == 0) c.features[row * d + below(d)] = NAN;
  }
  const float values[4][4] = {{1, -1, 1, -1}, {1, 1, 1, 1}, {-2.5f, 0.3f, 7, 200}, {1, -INFINITY, NAN, -1}};
  const int which = int(below(4));
  for (int64_t row = 0; row < c.S; ++row) c.rewards.push_back(values[which][below(4)]);
  c.options = {below(4) ? 0.5 : 0.3, 3, below(4) ? 1e-6 : 1e-9, Shaping(below(4)), ExplorationScore(below(2)), Scale(below(3)), below(2) == 0};
  return c;
}

void check(const Case& c) {
  const Outputs ours = on_gpu(c, 0);
  compare(c, ours, on_cpu(c), false);
  compare(c, ours, on_gpu(c, 1), true);  // neither another run nor loads of single floats change a bit
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  // Products are slow here: wide rows in small groups only.
  const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40}, widths[] = {0, 1, 3, 4, 5, 16, 63, 68, 300, 2100};
  for (int i = 0; i < count; ++i) {
    const int64_t M = sizes[i % 12], d = widths[below(M > 16 ? 6 : i % 5 ? 8 : 10)];
    check(make(1 + below(3), M, d, below(3) ? 0 : below(5), below(3) != 0));
  }
  // As many places as rows, and yet a row of no group.
  Case even = make(2, 2, 4, 1, false);
  even.S -= 1, even.features.resize(4 * even.S), even.rewards.resize(even.S);
  even.members = {0, 1, 3, -1};
  check(even);
  // No group; no row; nothing.
  check(make(0, 0, 3, 5, false));
  check(make(2, 0, 3, 5, false));
  Case empty = make(2, 3, 3, 0, false);
  empty.S = 0, empty.features.clear(), empty.rewards.clear();
  check(empty);
  check(make(0, 0, 3, 0, false));
  // Rows beyond what one block marks.
  check(make(2, 3, 1, g2rl::kNamedRows + 100, true));
  std::printf("%d cases, %d failures\n", count + 6, failures);
  return failures != 0;
}
