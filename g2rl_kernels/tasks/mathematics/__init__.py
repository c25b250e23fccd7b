"""The judge of mathematics, numbers and words: what a completion answers, and which answers are equal.

Read judge.py first. extract.py and phrases.py find the answer; notation.py and units.py bring it into one
notation; arithmetic.py compares numbers; symbolic.py hands the rest to math-verify, once it is small enough.
docs/evaluation.md has the rules. Nothing here imports torch: it runs in worker processes (tasks/verify.py).
"""

from __future__ import annotations

from .judge import MathJudge

__all__ = ["MathJudge"]
