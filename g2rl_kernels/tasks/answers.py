"""Questions with a known answer: which part of a completion is the answer, and whether it is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, need
from .base import Item, import_function


def boxed(text: str) -> str:
    """The content of the last \\boxed{...}, braces balanced; "" if there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end].strip()
    return ""


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.DOTALL)
    return found[-1].strip() if found else ""


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "all": str.strip,
    "boxed": boxed,
    "answer_tag": lambda text: _last(r"<answer>(.*?)</answer>", text),
    "last_number": lambda text: _last(r"-?\d+(?:\.\d+)?", text.replace(",", "")),
}


def extractor(name: str) -> Callable[[str], str]:
    if name not in EXTRACTORS:
        raise ConfigError(f"task: extract={name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


class AnswerTask:
    """Questions with a known answer, checked by math-verify or by a function of yours."""

    def __init__(
        self,
        rows: Sequence[Item],
        source: str,
        question: str = "question",
        answer: str = "answer",
        score: str | None = None,
        extract: str = "all",
    ):
        if not rows:
            raise ConfigError(f"task: {source} holds no items")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise ConfigError(
                    f"task: {source}, item {number}: expected an object, got a {type(row).__name__}"
                )
            for key in (question, *(() if score else (answer,))):
                if key not in row:
                    raise ConfigError(
                        f"task: {source}, item {number}: no field {key!r}, only {', '.join(row)}"
                    )
        self.rows, self.question_key, self.answer_key = rows, question, answer
        self.extract = extractor(extract)
        self.function = import_function(score) if score else None
        if self.function is None:
            try:
                import math_verify  # noqa: F401
            except ImportError as error:
                raise need("math-verify", error) from None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        return {**row, "question": str(row[self.question_key])}

    def score(self, completion: str, item: Item) -> float:
        completion = self.extract(completion)
        if self.function is not None:
            return self.function(completion, item)
        from math_verify import parse, verify

        gold = self._parsed_gold(item)
        if not gold:
            return float(completion.strip() == str(item[self.answer_key]).strip())
        return float(verify(gold, parse(completion)))

    def answer(self, completion: str, item: Item) -> str | None:
        """What the extractor finds; where math-verify judges, its reading, so that 0.5 and 1/2 are one."""
        completion = self.extract(completion)
        by_text = self.function is not None or not self._parsed_gold(item)
        return completion if by_text else math_answer(completion)

    def _parsed_gold(self, item: Item) -> list[Any]:
        """Empty, where math-verify finds no mathematics in it: then texts are compared."""
        from math_verify import parse

        # A bare answer (3/4, 1,024, (0, 2]) is parsed as mathematics, a worked solution as text with a \boxed
        gold = str(item[self.answer_key])
        return parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")


def math_answer(completion: str) -> str | None:
    """math-verify's reading of a response's final answer, the same text for 0.5 and 1/2; None without one."""
    from math_verify import parse

    parsed = parse(completion)
    return str(_exact(parsed[0])) if parsed else None


def _exact(expression: Any) -> Any:
    """A number as a fraction where it is one, anything else as it is."""
    if not getattr(expression, "is_number", False):
        return expression
    import sympy

    return sympy.nsimplify(expression, rational=True)
