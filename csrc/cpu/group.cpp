// group_geometry on the CPU: one task a row, then one task a group.
#include "group.h"

#include <cstring>
#include <unordered_map>
#include <vector>

namespace g2rl {
namespace {

// Inner product in double. Products of floats are exact in double; the eight lanes let the compiler use vectors
// without reordering, so <a, b> == <b, a> bitwise.
double inner(const float* a, const float* b, int64_t d) {
  double lane[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int l = 0; l < 8; ++l) lane[l] += double(a[k + l]) * double(b[k + l]);
  for (; k < d; ++k) lane[k % 8] += double(a[k]) * double(b[k]);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

struct Work {
  const GroupArgs* args;
  std::vector<double> norm, nu, value;  // [B, M] each; value: the shaped reward

  bool empty(int64_t place) const { return args->members[place] < 0; }
  const float* row(int64_t place) const { return args->features + args->members[place] * args->d; }
  double reward(int64_t place) const { return args->rewards[args->members[place]]; }

  void find_norm(int64_t place) {
    if (!empty(place)) norm[place] = std::sqrt(inner(row(place), row(place), args->d));
  }

  // Row i of one group's similarity (eq. 9) and the exploration score of that member (eqs. 10-11).
  void find_score(int64_t i) {
    const GroupArgs& a = *args;
    const int64_t group = i / a.M * a.M;
    float* similarity = a.similarity + i * a.M - group;
    if (empty(i)) {
      std::memset(similarity + group, 0, sizeof(float) * a.M);
      return;
    }
    double largest = -INFINITY;
    for (int64_t j = group; j < group + a.M; ++j)
      if (j != i && !empty(j) && reward(j) > largest) largest = reward(j);
    ScoreSum sum(largest);
    for (int64_t j = group; j < group + a.M; ++j) {
      double s = 0;
      if (!empty(j)) {
        s = cosine(inner(row(i), row(j), a.d), norm[i], norm[j], a.options.eps);
        if (j != i) sum.add(reward(j), s);
      }
      similarity[j] = float(s);
    }
    nu[i] = sum.exploration_score(a.options);
  }

  // Eqs. 12-13 and 2 for group b. With Scale::batch, advantages are divided later.
  void finish(int64_t b) {
    const GroupArgs& a = *args;
    Extremes extremes;
    for (int64_t j = b * a.M; j < (b + 1) * a.M; ++j)
      if (!empty(j)) extremes.add(nu[j], reward(j), a.options);
    double mean = 0, squares = 0;
    int64_t n = 0;
    for (int64_t j = b * a.M; j < (b + 1) * a.M; ++j) {
      if (empty(j)) continue;
      value[j] = shaped_reward(reward(j), nu[j], extremes, a.options);
      a.exploration_scores[a.members[j]] = float(nu[j]);
      a.shaped_rewards[a.members[j]] = float(value[j]);
      mean += value[j], ++n;
    }
    mean /= n;
    for (int64_t j = b * a.M; j < (b + 1) * a.M; ++j)
      if (!empty(j)) squares += (value[j] - mean) * (value[j] - mean);
    const double scale = a.options.scale == Scale::group ? deviation(squares, n, a.options.eps) : 1;
    for (int64_t j = b * a.M; j < (b + 1) * a.M; ++j)
      if (!empty(j)) a.advantages[a.members[j]] = float((value[j] - mean) / scale);
  }

  // Two passes, in order of members, so that the result depends on nothing else.
  double batch_scale() const {
    const int64_t places = args->B * args->M;
    double mean = 0, squares = 0;
    int64_t n = 0;
    for (int64_t j = 0; j < places; ++j)
      if (!empty(j)) mean += value[j], ++n;
    mean /= n;
    for (int64_t j = 0; j < places; ++j)
      if (!empty(j)) squares += (value[j] - mean) * (value[j] - mean);
    return n ? deviation(squares, n, args->options.eps) : 1;
  }
};

}  // namespace

void group_geometry(const GroupArgs& args, Parallel parallel) {
  for (float* out : {args.exploration_scores, args.shaped_rewards, args.advantages})  // rows of no group stay zero
    if (args.S > 0) std::memset(out, 0, sizeof(float) * args.S);
  const int64_t places = args.B * args.M;
  if (places == 0) return;
  Work work{&args, std::vector<double>(places), std::vector<double>(places), std::vector<double>(places)};
  parallel(places, &work, [](void* w, int64_t i) { static_cast<Work*>(w)->find_norm(i); });
  parallel(places, &work, [](void* w, int64_t i) { static_cast<Work*>(w)->find_score(i); });
  parallel(args.B, &work, [](void* w, int64_t i) { static_cast<Work*>(w)->finish(i); });
  if (args.options.scale != Scale::batch) return;
  const double scale = work.batch_scale();
  for (int64_t j = 0; j < places; ++j)  // rows of no group stay zero, even where the scale is NaN
    if (!work.empty(j)) args.advantages[args.members[j]] = float(args.advantages[args.members[j]] / scale);
}

int64_t bad_member(const int64_t* members, int64_t count, int64_t S) {
  std::vector<bool> seen(S, false);
  for (int64_t k = 0; k < count; ++k) {
    if (members[k] < 0) continue;
    if (members[k] >= S || seen[members[k]]) return k;
    seen[members[k]] = true;
  }
  return -1;
}

GroupShape index_groups(const int64_t* ids, int64_t S, int64_t* index) {
  std::unordered_map<int64_t, int64_t> number;
  std::vector<int64_t> size;
  int64_t largest = 0;
  for (int64_t row = 0; row < S; ++row) {
    index[row] = -1;
    if (ids[row] < 0) continue;
    const int64_t group = number.emplace(ids[row], int64_t(number.size())).first->second;
    if (group == int64_t(size.size())) size.push_back(0);
    index[row] = group;
    if (++size[group] > largest) largest = size[group];
  }
  return {int64_t(size.size()), largest};
}

void fill_members(const int64_t* index, int64_t S, GroupShape shape, int64_t* members) {
  for (int64_t k = 0; k < shape.B * shape.M; ++k) members[k] = -1;
  std::vector<int64_t> next(shape.B, 0);
  for (int64_t row = 0; row < S; ++row)
    if (index[row] >= 0) members[index[row] * shape.M + next[index[row]]++] = row;
}

}  // namespace g2rl
