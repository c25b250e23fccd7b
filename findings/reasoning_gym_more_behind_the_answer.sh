#!/usr/bin/env bash
# reasoning-gym: a wrong answer, the right one with more behind it, scores as much as the right answer, or more.
#
# Expected: score_answer returns 1.0 for right answers only and less for others; 1.0 is the largest score.
# Observed: word_sorting gives exactly 1.0 to the sorted list with words appended. letter_jumble gives 1.0, less
#   rounding, to the right words with more behind them. spell_backward means to give 0.8 to the right word with a
#   letter appended, but it compares a sum of n times 1/n with 1.0: at 6, 7 and 10 letters the sum falls just
#   short, and at 9 letters it exceeds 1, so that the wrong word beats the right one.
# Why it matters: no threshold separates right from wrong. All of these pass score >= 0.99, and word_sorting's pass
#   score == 1.0. In float32 they equal 1 to the last bit. A policy may learn to append words, at full reward and
#   counted as accuracy.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet reasoning_gym==0.1.25

venv/bin/python - <<'PROGRAM'
import collections
import struct
from importlib.metadata import version

import reasoning_gym

print("reasoning-gym", version("reasoning-gym"))


def scores(name, tail):
    """(length of the right answer, score of the right answer, score of it with `tail` behind) for 300 items."""
    data = reasoning_gym.create_dataset(name, size=300, seed=1)
    for item in data:
        right = item["answer"]
        yield len(right), data.score_answer(right, item), data.score_answer(right + tail, item)


def float32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


for name, tail in (("word_sorting", ", banana, banana"), ("letter_jumble", " and any other words")):
    found = list(scores(name, tail))
    ones = sum(wrong == 1.0 for _, _, wrong in found)
    print(f"{name}, right answer + {tail!r}: {ones} of {len(found)} score exactly 1.0,", end=" ")
    print(f"the lowest {min(wrong for _, _, wrong in found)!r}")
    assert all(right == 1.0 for _, right, _ in found)
    assert all(float32(wrong) == 1.0 for _, _, wrong in found)
    assert ones == len(found) if name == "word_sorting" else ones > len(found) // 2

by_length = collections.defaultdict(set)
for length, right, wrong in scores("spell_backward", "x"):
    assert right == 1.0
    by_length[length].add(wrong)
print("spell_backward, right answer + \"x\":")
for length, wrong in sorted(by_length.items()):
    print(f"  {length:2} letters: {wrong}")
assert by_length[8] == {0.8}
for length in (6, 7, 9, 10):
    assert all(float32(wrong) == 1.0 for wrong in by_length[length])
assert all(0.99 < wrong < 1 for length in (6, 7, 10) for wrong in by_length[length])
assert all(wrong > 1 for wrong in by_length[9])
PROGRAM
