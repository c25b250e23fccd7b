"""Verdicts on many completions: in worker processes for a library's verifier, here for a user's function."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Item, Judge, Task, Verdict, final_answer, score_completion


def verify(asked: Sequence[tuple[Task, Item, str]], answers: bool = True) -> list[Verdict]:
    """The verdict on every (task, item, completion).

    A task with an attribute `judge` (a `Judge`, not None) is verified in worker processes: a completion that
    exceeds their limits, or makes the judge raise, scores 0, without an answer. Other tasks are called here.

    answers: find final answers too; they are None without.

    Raises:
        RewardError: the score of a task without a judge raised, or is not a finite number.
    """
    verdicts = []
    for task, item, completion in asked:
        judge: Judge | None = getattr(task, "judge", None)
        if judge is None:
            answer = final_answer(task, completion, item) if answers else None
            verdicts.append(Verdict(score_completion(task, completion, item), answer))
        else:
            known = task.known(item)  # type: ignore[attr-defined]
            verdicts.append(Verdict(judge.score(completion, known), judge.answer(completion, known)))
    return verdicts


def unify(groups: Sequence[tuple[Judge | None, Sequence[str | None]]]) -> list[list[str | None]]:
    """The answers of each group, where equal ones (by `judge.same`; None: equal texts) have one text."""
    return [list(answers) for _, answers in groups]
