"""The judge of mathematics, numbers and words: what a completion answers, and which answers are equal."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import extract, notation
from .forms import equal
from .reading import MAX_ANSWER, read

__all__ = ["MathJudge", "known_text", "read"]


def known_text(known: Any) -> str:
    """A known answer as text: a worked solution's final answer, a JSON number in full, true or false.

    A float is read to 15 significant digits, so that 0.1 + 0.2 is 0.3.

    Raises TypeError for what is no text, number or boolean.
    """
    if isinstance(known, bool):
        return str(known).lower()
    if isinstance(known, float):
        short = format(known, ".15g")
        return repr(known) if known.is_integer() and float(short) != known else short
    if isinstance(known, int):
        return str(known)
    if not isinstance(known, str):
        raise TypeError(f"known answer: got a {type(known).__name__}, needs a text or a number")
    return _known_text(known)


@lru_cache(maxsize=2048)
def _known_text(known: str) -> str:
    stated = extract.marked(notation.ascii_powers(known), words=None)
    if stated is not None:
        return stated
    if len(re.findall(r"(?<![\\{a-zA-Z])[a-zA-Z]{2,}", known)) > 8 or "\n" in known.strip():
        return extract.final(notation.ascii_powers(known), words=False) or known
    return known


@lru_cache(maxsize=4096)
def _same(first: str, second: str) -> bool:
    return equal(read(first), read(second))


@dataclass(frozen=True)
class MathJudge:
    """Finds final answers in completions and compares them.

    extract: where the answer stands, a key of `extract.FINDERS`.

    Two answers are equal if they are
    - numbers of the same value in any notation (`arithmetic.close` has the rule for decimals). A percentage
      is a hundredth of its number, but no whole number above 1: 12 is not 1200 %. A unit counts where both
      have one;
    - the same words, without case, articles and end marks (`notation.words_of` says what words are);
    - lists of equal items: in any order without brackets or in braces, in order in others and for words;
    - expressions of the same value at several values of their variables; for equations, inequalities and
      sets, what math-verify takes for the same.

    An equation stands for its right side if its left side is a name or has the same value. An answer too
    large to evaluate (`symbolic.small`, `arithmetic.MAX_BITS`) is equal to its own text only.
    """

    extract: str = "all"

    def score(self, completion: str, known: Any) -> float:
        """1 if the completion's answer is the known one, else 0. Raises TypeError for another `known`."""
        if known is None:
            return 0.0
        gold = known_text(known)
        found = self.answer(completion, known)
        if found is None:
            return float(not gold.strip() and not completion.strip())
        return float(self.same(found, gold))

    def answer(self, completion: str, known: Any = None) -> str | None:
        """The final answer in a short form: the same text for equal numbers, words, and lists of them."""
        words, gold = None, None
        if known is not None:
            text = known_text(known)
            gold = read(text)
            words = gold.kind == "words" or not text.strip()
        several = gold is not None and gold.kind == "list" and gold.brackets in ("", "{}")
        found = extract.FINDERS[self.extract](completion, words, several)
        if found is None or len(found) > MAX_ANSWER:
            return None
        if gold is not None and gold.kind == "number":
            found = notation.decimal_comma(found)
        form = read(found)
        if form.kind != "words" and not notation.complete(found):
            return None
        if form.rounded and gold is not None and gold.kind == "number" and equal(form.rounded, gold):
            form = form.rounded
        return form.text or None

    def same(self, first: str, second: str) -> bool:
        """Whether two answers are equal; symmetric."""
        return first == second or _same(*sorted((first, second)))
