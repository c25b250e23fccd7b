// The group geometry on the CPU: eqs. 2 and 9-13 of arXiv 2512.15687 for every group, in one call. Free of torch.
#pragma once
#include <cstdint>

#include "../group_math.h"
#include "parallel.h"

namespace g2rl {

// Members are rows of `features`, each named once, or negative for an empty place: the caller checks that with
// bad_member. Gives the same bits for any number of threads.
void group_geometry(const GroupArgs&, Parallel);

// Position in members [count] of the first entry beyond S, or of a row named before; -1 if all are good. A row named
// twice would have two writers.
int64_t bad_member(const int64_t* members, int64_t count, int64_t S);

// From ids [S] (negative: padding row) to members [B, M] in two steps, between which the caller allocates.
// index [S] receives each row's group, numbered in order of first appearance, -1 for padding.
struct GroupShape {
  int64_t B, M;  // number of groups, rows in the largest
};
GroupShape index_groups(const int64_t* ids, int64_t S, int64_t* index);
void fill_members(const int64_t* index, int64_t S, GroupShape shape, int64_t* members);

}  // namespace g2rl
