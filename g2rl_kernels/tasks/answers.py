"""Questions with a known answer: finds the answer in a completion, and verifies it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, need
from .base import Item, check_rows, import_function


def boxed(text: str) -> str:
    """The content of the last \\boxed{...} with balanced braces; "" without one."""
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
    """The function EXTRACTORS[name]; ConfigError for an unknown name."""
    if name not in EXTRACTORS:
        raise ConfigError(f"task: extract={name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


class AnswerTask:
    """Questions with a known answer, verified by math-verify or by a function.

    Args:
        rows: the items; other fields are passed on to the function.
        source: where they came from, for messages.
        score: the function that verifies, "module:function", called with (completion, item).
        question, answer: the names of these fields in a row.
        extract: which part of a completion is the answer, a key of EXTRACTORS.
    """

    def __init__(
        self,
        rows: Sequence[Item],
        source: str,
        *,
        score: str | None = None,
        question: str = "question",
        answer: str = "answer",
        extract: str = "all",
    ):
        check_rows(rows, source, question, None if score else answer)
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
        return {**row, "question": row[self.question_key]}

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
        """The extracted answer; written by `math_answer` where math-verify judges, so that 0.5 is 1/2."""
        completion = self.extract(completion)
        by_text = self.function is not None or not self._parsed_gold(item)
        return completion if by_text else math_answer(completion)

    def _parsed_gold(self, item: Item) -> list[Any]:
        """The known answer, parsed by math-verify; [] if it finds no mathematics: then texts are compared."""
        from math_verify import parse

        # A bare answer such as 3/4 or (0, 2] is put into a box; a worked solution has one already
        gold = str(item[self.answer_key])
        return parse(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")


def math_answer(completion: str) -> str | None:
    """The final answer as math-verify parses it, as text: the same for 0.5 and 1/2. None without one."""
    from math_verify import parse

    parsed = parse(completion)
    return str(_exact(parsed[0])) if parsed else None


def _exact(expression: Any) -> Any:
    """A rational number as a fraction; any other expression unchanged."""
    if not getattr(expression, "is_number", False):
        return expression
    import sympy

    return sympy.nsimplify(expression, rational=True)
