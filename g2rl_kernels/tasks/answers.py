"""Questions with a known answer, verified by the judge of mathematics or by a user's function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, need
from .base import Item, Verdict, check_rows, import_function
from .mathematics import MathJudge
from .mathematics.extract import answer_tag, boxed, last_number
from .verify import verify

EXTRACTORS: dict[str, Callable[[str], str]] = {
    "all": str.strip,
    "boxed": boxed,
    "answer_tag": answer_tag,
    "last_number": last_number,
}


def extractor(name: str) -> Callable[[str], str]:
    """The function EXTRACTORS[name]; ConfigError for an unknown name."""
    if name not in EXTRACTORS:
        raise ConfigError(f"task: extract={name!r}: choose one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


class AnswerTask:
    """Questions with a known answer, verified by `MathJudge` in worker processes, or by a function.

    Args:
        rows: the items; other fields are passed on to the function.
        source: where they came from, for messages.
        score: the function that verifies, "module:function", called with (completion, item).
        question, answer: the names of these fields in a row.
        extract: which part of a completion is the answer, a key of EXTRACTORS.

    Attributes:
        judge: the `MathJudge`; None with a function.
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
        self.judge = None if score else MathJudge(extract)
        if self.judge is not None and extract != "last_number":  # numbers alone are compared without it
            try:
                import math_verify  # noqa: F401
            except ImportError as error:
                raise need("math-verify", error) from None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        return {**row, "question": row[self.question_key]}

    def known(self, item: Item) -> Any:
        """The known answer, as the data has it."""
        return item[self.answer_key]

    def score(self, completion: str, item: Item) -> float:
        """1 for a right completion, 0 for a wrong one or one that the judge could not verify."""
        if self.function is not None:
            return self.function(self.extract(completion), item)
        return verify([(self, item, completion)], answers=False)[0].score

    def answer(self, completion: str, item: Item) -> str | None:
        """The final answer, the same text for equal numbers; with a function, the extracted text."""
        if self.function is not None:
            return self.extract(completion)
        return verify([(self, item, completion)])[0].answer


class KnownAnswers:
    """Known answers that a caller holds, for `verify`: an item is {"answer": the known answer, or None}."""

    def __init__(self, extract: str = "all"):
        self.judge = MathJudge(extract)

    def known(self, item: Item) -> Any:
        return item["answer"]


def verdicts(completions: Sequence[str], known: Sequence[Any], extract: str = "all") -> list[Verdict]:
    """`MathJudge`'s verdicts on completions, without answers; the score is 0 where `known` is None."""
    task: Any = KnownAnswers(extract)
    asked = [(task, {"answer": answer}, text) for text, answer in zip(completions, known, strict=True)]
    return verify(asked, answers=False)
