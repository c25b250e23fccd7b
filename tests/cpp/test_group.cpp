// The group geometry (csrc/cpu/group.cpp) against eqs. 9 to 13 and 2 as they are written.
#include "../../csrc/cpu/group.h"

#include "check.h"

namespace tests {
namespace {

struct GroupCase {
  int64_t S, d, B = 0, M = 0;
  std::vector<int64_t> ids, members;
  std::vector<float> features, rewards;
};

struct GroupOutputs {
  std::vector<float> similarity, score, shaped, advantages;
};

// ids to members: groups in order of first appearance
void list_members(GroupCase& c) {
  std::vector<int64_t> index(c.S);
  const g2rl::GroupShape shape = g2rl::index_groups(c.ids.data(), c.S, index.data());
  c.B = shape.B, c.M = shape.M;
  c.members.assign(c.B * c.M, -9);
  g2rl::fill_members(index.data(), c.S, shape, c.members.data());
  std::vector<std::vector<int64_t>> groups;
  for (int64_t i = 0; i < c.S; i++) {
    if (c.ids[i] < 0) continue;
    size_t b = 0;
    while (b < groups.size() && c.ids[groups[b][0]] != c.ids[i]) b++;
    if (b == groups.size()) groups.emplace_back();
    groups[b].push_back(i);
  }
  size_t largest = 0;
  for (const auto& group : groups) largest = std::max(largest, group.size());
  bool ok = c.B == int64_t(groups.size()) && c.M == int64_t(largest);
  for (int64_t b = 0; ok && b < c.B; b++)
    for (int64_t j = 0; j < c.M; j++) ok = ok && c.members[b * c.M + j] == (j < int64_t(groups[b].size()) ? groups[b][j] : -1);
  expect(ok, "group", "members");
  expect(g2rl::bad_member(c.members.data(), c.B * c.M, c.S) == -1, "group", "good members are called bad");
}

GroupOutputs run_group(const GroupCase& c, const g2rl::GroupOptions& options, g2rl::Parallel parallel) {
  const float nan = float(kNan);
  GroupOutputs out{std::vector<float>(c.B * c.M * c.M, nan), std::vector<float>(c.S, nan), std::vector<float>(c.S, nan),
                   std::vector<float>(c.S, nan)};
  g2rl::group_geometry({c.features.data(), c.rewards.data(), c.members.data(), c.S, c.d, c.B, c.M, options, out.similarity.data(),
                        out.score.data(), out.shaped.data(), out.advantages.data()},
                       parallel);
  return out;
}

double spread_of(const std::vector<double>& x, double eps) {
  double mean = 0, variance = 0;
  for (double v : x) mean += v / x.size();
  for (double v : x) variance += (v - mean) * (v - mean) / x.size();
  return std::sqrt(variance + eps);
}

// Eqs. 9 to 13 and 2 as they are written.  long double holds exp(1e4).
void check_group(const GroupCase& c, const g2rl::GroupOptions& o) {
  const auto feature = [&](int64_t i, int64_t k) { return double(c.features[i * c.d + k]); };
  std::vector<double> similarity(c.B * c.M * c.M, 0), score(c.S, 0), shaped(c.S, 0), advantages(c.S, 0), all;
  for (int64_t b = 0; b < c.B; b++) {
    std::vector<int64_t> rows;
    for (int64_t j = 0; j < c.M; j++)
      if (c.members[b * c.M + j] >= 0) rows.push_back(c.members[b * c.M + j]);
    const int64_t m = rows.size();
    std::vector<double> nu(m), value(m), norm(m, 0);
    for (int64_t i = 0; i < m; i++) {
      for (int64_t k = 0; k < c.d; k++) norm[i] += feature(rows[i], k) * feature(rows[i], k);
      norm[i] = std::sqrt(norm[i]);
    }
    bool uniform_rewards = true;
    for (int64_t i = 0; i < m; i++) {
      uniform_rewards = uniform_rewards && c.rewards[rows[i]] == c.rewards[rows[0]];
      long double denominator = o.eps, sum = 0;
      for (int64_t j = 0; j < m; j++)
        if (j != i) denominator += std::exp((long double)c.rewards[rows[j]]);
      for (int64_t j = 0; j < m; j++) {
        double inner = 0;
        for (int64_t k = 0; k < c.d; k++) inner += feature(rows[i], k) * feature(rows[j], k);
        const double cosine = inner / ((norm[i] + o.eps) * (norm[j] + o.eps));
        similarity[(b * c.M + i) * c.M + j] = cosine;
        if (j != i) sum += std::exp((long double)c.rewards[rows[j]]) / denominator * cosine * cosine;
      }
      nu[i] = sum > 1 ? 0 : double(1 - sum);
      if (o.exploration_score == g2rl::ExplorationScore::sqrt) nu[i] = std::sqrt(nu[i]);
    }
    const auto compared = [&](int64_t i) { return o.shaping != g2rl::Shaping::right || c.rewards[rows[i]] > 0; };
    std::vector<double> scores;
    for (int64_t i = 0; i < m; i++)
      if (compared(i)) scores.push_back(nu[i]);
    const double low = scores.empty() ? 0 : *std::min_element(scores.begin(), scores.end());
    const double high = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
    for (int64_t i = 0; i < m; i++) {
      const double r = c.rewards[rows[i]], nubar = high - low <= 1e-5 ? 0.5 : (nu[i] - low) / (high - low);
      value[i] = o.shaping == g2rl::Shaping::equation ? r * (1 + o.lam * r * nubar) : r * (1 + o.lam * (2 * nubar - 1));
      if (!compared(i)) value[i] = r;
      value[i] = std::min(std::max(value[i], -o.clip), o.clip);
      if (o.shaping == g2rl::Shaping::none || (o.skip_uniform && uniform_rewards)) value[i] = r;
      score[rows[i]] = nu[i], shaped[rows[i]] = value[i], all.push_back(value[i]);
    }
    for (int64_t i = 0; i < m; i++) {
      double mean = 0;
      for (double v : value) mean += v / m;
      advantages[rows[i]] = (value[i] - mean) / (o.scale == g2rl::Scale::group ? spread_of(value, o.eps) : 1);
    }
  }
  if (o.scale == g2rl::Scale::batch)
    for (double& x : advantages) x /= all.empty() ? 1 : spread_of(all, o.eps);

  char where[160];
  std::snprintf(where, sizeof where, "group S %lld d %lld B %lld M %lld shaping %d exploration_score %d scale %d skip %d", (long long)c.S,
                (long long)c.d, (long long)c.B, (long long)c.M, int(o.shaping), int(o.exploration_score), int(o.scale), int(o.skip_uniform));
  const GroupOutputs out = run_group(c, o, one_thread), again = run_group(c, o, three_threads);
  expect(same_bits(out.similarity, again.similarity) && same_bits(out.score, again.score) && same_bits(out.shaped, again.shaped) &&
             same_bits(out.advantages, again.advantages),
         where, "three threads give other bits than one");
  const auto compare = [&](const std::vector<float>& actual, const std::vector<double>& exact, const char* what) {
    for (size_t i = 0; i < actual.size(); i++)  // one rounding to float32, after roundings in double
      expect_near(actual[i], exact[i], 2 * kUnit * std::abs(exact[i]) + 2e-7, where, what, i);
  };
  compare(out.similarity, similarity, "similarity");
  compare(out.score, score, "score");
  compare(out.shaped, shaped, "shaped_rewards");
  compare(out.advantages, advantages, "advantages");
}

std::vector<g2rl::GroupOptions> group_options() {
  std::vector<g2rl::GroupOptions> all;
  for (int shaping = 0; shaping < 4; shaping++)
    for (int score = 0; score < 2; score++)
      for (int scale = 0; scale < 3; scale++)
        for (bool skip : {false, true})
          all.push_back({0.5, 1.2, 1e-6, g2rl::Shaping(shaping), g2rl::ExplorationScore(score), g2rl::Scale(scale), skip});
  return all;
}

GroupCase group_case(int64_t d, std::vector<int64_t> ids) {
  GroupCase c;
  c.S = ids.size(), c.d = d, c.ids = std::move(ids);
  list_members(c);
  for (int64_t i = 0; i < c.S; i++) {
    const int64_t kind = below(6);  // sometimes no feature, or the previous one, or its opposite
    for (int64_t k = 0; k < d; k++) {
      const float before = i ? c.features[(i - 1) * d + k] : 1;
      c.features.push_back(kind == 0 ? 0 : kind == 1 ? before : kind == 2 ? -before : float(bell()));
    }
    c.rewards.push_back(below(2) ? 1 : -1);
  }
  return c;
}

void test_ordinary_groups() {
  for (int64_t d : {1, 3, 8, 65})
    for (const std::vector<int64_t>& ids : std::vector<std::vector<int64_t>>{{},
                                                                             {-1, -1},
                                                                             {4},
                                                                             {7, 7, 7, 7},
                                                                             {5, 3, -1, 5, 9, 3, 5},
                                                                             {1, 2, 3, -4, 1},
                                                                             {-1, 8, 8, 0, 8, 0, 8, 8, 2, 2, 8, 0, -1}}) {
      GroupCase c = group_case(d, ids);
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
      for (float& reward : c.rewards) reward = 1;
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
      for (float& reward : c.rewards) reward = below(3) == 0 ? 1e4f : below(2) ? -1e4f : float(bell());
      for (const g2rl::GroupOptions& o : group_options()) check_group(c, o);
    }
}

// NaN in one feature reaches its own group alone.
void test_nan_in_a_group() {
  GroupCase c = group_case(9, {5, 3, -1, 5, 9, 3, 5});
  c.rewards[0] = c.rewards[6] = 1, c.rewards[3] = -1;
  for (const g2rl::GroupOptions& o : group_options()) {
    if (o.scale == g2rl::Scale::batch) continue;  // one standard deviation for all
    c.features.assign(c.S * c.d, 0.25f);
    const GroupOutputs clean = run_group(c, o, one_thread);
    c.features[3 * c.d + c.d - 1] = float(kNan);  // row 3, of group 0 = rows 0, 3, 6
    const GroupOutputs out = run_group(c, o, three_threads);
    for (int64_t i = 0; i < c.S; i++) {
      const bool touched = c.ids[i] == 5;
      const std::string where = "NaN in a group, row " + std::to_string(i);
      expect(touched ? std::isnan(out.score[i]) : out.score[i] == clean.score[i], where, "score");
      const bool shaped = touched && o.shaping != g2rl::Shaping::none;
      const bool left = o.shaping == g2rl::Shaping::right && c.rewards[i] < 0;
      expect(shaped && !left ? std::isnan(out.shaped[i]) : out.shaped[i] == clean.shaped[i], where, "shaped reward");
      expect(shaped ? std::isnan(out.advantages[i]) : out.advantages[i] == clean.advantages[i], where, "advantage");
    }
    for (int64_t b = 0; b < c.B; b++)
      for (int64_t i = 0; i < c.M; i++)
        for (int64_t j = 0; j < c.M; j++) {
          const int64_t at = (b * c.M + i) * c.M + j;
          const bool touched = b == 0 && (i == 1 || j == 1);
          expect(touched ? std::isnan(out.similarity[at]) : out.similarity[at] == clean.similarity[at], "NaN in a group", "similarity");
        }
  }
}

void test_bad_members() {
  const auto bad = [](std::vector<int64_t> members, int64_t S) { return g2rl::bad_member(members.data(), members.size(), S); };
  expect(bad({}, 0) == -1, "bad_member", "none");
  expect(bad({2, -1, 0, -7}, 3) == -1, "bad_member", "empty places");
  expect(bad({0, 3, 1}, 3) == 1, "bad_member", "out of range");
  expect(bad({0}, 0) == 0, "bad_member", "no rows");
  expect(bad({0, 1, -1, 0}, 3) == 3, "bad_member", "twice");
  expect(bad({INT64_MAX, 1}, 3) == 0, "bad_member", "largest");
}

}  // namespace

void test_groups() {
  test_bad_members();
  test_ordinary_groups();
  test_nan_in_a_group();
}

}  // namespace tests
