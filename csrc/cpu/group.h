// The group geometry on the CPU: eqs. 2 and 9-13 of the paper for every group, in one call. Free of torch.
#pragma once
#include <cstdint>

#include "../group_math.h"
#include "parallel.h"

namespace g2rl {

struct GroupArgs {
  const float* features;   // [S, d], contiguous
  const float* rewards;    // [S]
  const int64_t* members;  // [B, M], row of `features` or negative for an empty place; see bad_member
  int64_t S, d, B, M;
  GroupOptions options;
  float *similarity, *score, *shaped_rewards, *advantages;  // [B, M, M], [S], [S], [S]; written in full
};

// Bitwise the same for any number of threads.
void group_geometry(const GroupArgs&, Parallel);

// Position in members [count] of the first entry that is no row of [0, S) or is a row named before; -1 if there is
// none. Negative entries are empty places. The caller refuses such members: group_geometry would have two writers.
int64_t bad_member(const int64_t* members, int64_t count, int64_t S);

// Two steps from ids [S] (negative: padding row) to members [B, M]: count, allocate, fill.
// index [S] receives each row's group, numbered in order of first appearance, -1 for padding.
struct GroupShape {
  int64_t B, M;  // number of groups, rows in the largest
};
GroupShape index_groups(const int64_t* ids, int64_t S, int64_t* index);
void fill_members(const int64_t* index, int64_t S, GroupShape shape, int64_t* members);

}  // namespace g2rl
