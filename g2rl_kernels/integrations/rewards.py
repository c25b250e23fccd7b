"""Reward functions that recipes name by dotted path: 1 for a right answer, 0 for a wrong one.

They judge as jsonl and hub tasks do (docs/evaluation.md, "What counts as right"), in worker processes with
limits. Where TRL hands over `log_metric`, the number of completions that could not be judged is logged as
`verify_failures`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..tasks.answers import verdicts
from ..tasks.choices import chosen, read_options, right_letter

LogMetric = Callable[[str, float], None]


def math_answer(
    completions: Sequence[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    log_metric: LogMetric | None = None,
    **_: Any,
) -> list[float | None]:
    """1.0 where the final answer of a completion is the known one, a final answer or a worked solution.

    Args:
        completions: texts or conversations; of a conversation, the assistant's last message counts.
        answer, solution: the column of known answers, texts or numbers; answer is read where there are both.
            None in it: no reward.
        log_metric: TRL's.

    Raises ValueError for neither column.
    """
    known = solution if answer is None else answer
    if known is None:
        raise ValueError("math_answer: the data set needs a column of known answers, 'answer' or 'solution'")
    return _rewards(completions, known, "all", log_metric)


def last_number(
    completions: Sequence[Any], answer: Sequence[Any], log_metric: LogMetric | None = None, **_: Any
) -> list[float | None]:
    """1.0 where the last number in a completion (a text or a conversation) equals the data set's `answer`.

    `answer` holds texts or numbers, compared as numbers: 1,024 is 1024, and 7.0 is 7. None in it: no reward.
    """
    return _rewards(completions, answer, "last_number", log_metric)


def choice_letter(
    completions: Sequence[Any], answer: Sequence[Any], choices: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where a completion (a text or a conversation) chooses the right option.

    answer, choices: columns of the data set, with the values that `kind: jsonl, choices: ...` takes. None in
    answer: no reward. Raises ConfigError for a row with other values.
    """
    found: list[float | None] = []
    for number, (completion, right, row) in enumerate(zip(completions, answer, choices)):
        if right is None:
            found.append(None)
            continue
        options, labels = read_options(row, f"choice_letter: row {number}: choices")
        letter = right_letter(right, options, labels, f"choice_letter: row {number}: answer")
        found.append(float(chosen(_text(completion), options) == letter))
    return found


def _rewards(
    completions: Sequence[Any], known: Sequence[Any], extract: str, log_metric: LogMetric | None
) -> list[float | None]:
    found = verdicts([_text(completion) for completion in completions], known, extract)
    if log_metric is not None:
        log_metric("verify_failures", float(sum(verdict.failure is not None for verdict in found)))
    return [None if right is None else verdict.score for verdict, right in zip(found, known)]


def _text(completion: Any) -> str:
    """A completion's text; of a conversation, the assistant's last message's."""
    if isinstance(completion, str):
        return completion
    said = [
        message.get("content") for message in completion if message.get("role", "assistant") == "assistant"
    ]
    content = said[-1] if said else ""
    if isinstance(content, list):  # parts of a multimodal message
        content = "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""
