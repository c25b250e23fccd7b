"""The judge of mathematics, numbers and words: what a completion answers, and which answers are equal.

Read judge.py first. extract.py finds the answer that a text marks, phrases.py and grammar.py read a
sentence, conclusions.py a text without a mark. reading.py turns the answer into a form (forms.py, which has
their equality) by way of notation.py, units.py and arithmetic.py; symbolic.py hands the rest to math-verify,
once it is small enough.
docs/evaluation.md has the rules. Nothing here imports torch: it runs in worker processes (tasks/verify.py).
"""

from __future__ import annotations

from .judge import MathJudge

__all__ = ["MathJudge"]
