#!/usr/bin/env bash
# math-verify strips a final variable as if it were a unit: \boxed{2t} is the number 2.
#
# Expected: \boxed{2t} is the product 2*t, as \boxed{2x} is 2*x, so it is wrong where 2 is right.
# Observed: a last t, h, o, c, l, s, g, m or d after a digit, space or brace is removed before parsing. So 2t equals 2,
#   and 6t equals 6s. Of 1+3t the number 1+3 is left, which equals 4 and differs from 3t+1. An x is kept.
# Why it matters: with a verifier as the reward, a policy earns full reward for dropping the variable, and loses it
#   for writing a right sum in another order. t (time), h (height) and s (distance) are common in problems, and
#   nothing tells that an item is graded so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0

venv/bin/python - <<'PROGRAM'
from importlib.metadata import version

from latex2sympy2_extended.math_normalization import units
from math_verify import parse, verify

for name in ("math-verify", "latex2sympy2_extended", "sympy"):
    print(name, version(name))
print("single letters among the units:", *sorted(unit for unit in units if len(unit) == 1))


def box(answer):
    return parse(rf"\boxed{{{answer}}}")


for answer in ("2x", "2t", r"\frac{1}{2}t", "1+3t", "v=9.8t"):
    print(rf"\boxed{{{answer}}} is parsed as {box(answer)[0]}")

# known answer, answer of the model, what a reader says, what verify says
CASES = [
    ("2x", "2", False, False),
    ("2t", "2", False, True),
    ("2", "2t", False, True),
    ("6t", "6s", False, True),
    ("1+3t", "4", False, True),
    ("v=9.8t", "v=9.8", False, True),
    ("1+3x", "3x+1", True, True),
    ("1+3t", "3t+1", True, False),
]
print(f"{'known':>10} {'answer':>8} {'reader':>7} {'verify':>7}")
for known, answer, reader, observed in CASES:
    found = verify(box(known), box(answer))
    print(f"{known:>10} {answer:>8} {reader!s:>7} {found!s:>7}")
    assert found is observed, (known, answer, found)
PROGRAM
