"""Verdicts on many completions: in worker processes for a library's verifier, here for a user's function."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .base import Item, Judge, Task, Verdict, final_answer, score_completion
from .pool import Limits, Packed, Reply, Worker, pool

MAX_FAILURES = 2  # comparisons of an answer that may fail
_shown: set[str] = set()  # kinds of judges whose first failure has been shown


def verify(
    asked: Sequence[tuple[Task, Item, str]], *, answers: bool = True, limits: Limits | None = None
) -> list[Verdict]:
    """The verdict on every (task, item, completion), from any thread.

    A task with an attribute `judge` (a `Judge`, not None) is verified in worker processes: a completion that
    exceeds their limits, or makes the judge raise, scores 0, without an answer. The first such failure is
    shown as a warning. Other tasks are called here.

    answers: find final answers too; they are None without. limits: of the workers; None: the defaults.

    Raises:
        RewardError: the score of a task without a judge raised, or is not a finite number.
        TrainerError: worker processes cannot run the judge at all.
    """
    verdicts: list[Verdict | None] = [None] * len(asked)
    waiting: list[tuple[int, Packed, str, Any]] = []
    packed: dict[int, Packed] = {}  # by the task's id
    for place, (task, item, completion) in enumerate(asked):
        judge: Judge | None = getattr(task, "judge", None)
        if judge is None:
            answer = final_answer(task, completion, item) if answers else None
            verdicts[place] = Verdict(score_completion(task, completion, item), answer)
        else:
            if id(task) not in packed:
                packed[id(task)] = Packed.of(judge)
            waiting.append((place, packed[id(task)], completion, task.known(item)))  # type: ignore[attr-defined]

    def work(worker: Worker, one: tuple[int, Packed, str, Any]) -> Verdict:
        _, judge, completion, known = one
        return _verdict(worker.ask(judge, "verdict", completion, known, answers))

    found = _map(work, waiting, limits, "verify")
    for (place, *_), verdict in zip(waiting, found):
        verdicts[place] = verdict
    _show(asked, verdicts)
    return [verdict for verdict in verdicts if verdict is not None]


def answers_of(judge: Judge, completions: Sequence[str], limits: Limits | None = None) -> list[str | None]:
    """The final answer of every completion, where no right answer is known; None where the judge fails.

    Raises TrainerError as `verify`.
    """
    packed = Packed.of(judge)

    def work(worker: Worker, completion: str) -> str | None:
        reply = worker.ask(packed, "answer", completion)
        return _text(reply.value)

    return _map(work, list(completions), limits, "answers")


def unify(
    groups: Sequence[tuple[Judge | None, Sequence[str | None]]], limits: Limits | None = None
) -> list[list[str | None]]:
    """The answers of each group, where the same answers have one text: that of the first of them.

    A judge's `same` compares them, in worker processes; None compares texts. An answer is compared with the
    first one of every class before it, and belongs to the first that is the same. One whose comparison fails
    is compared with each of them alone, where limits are for one comparison, and two that cannot be compared
    differ. An answer that fails with MAX_FAILURES others is no longer compared. Raises TrainerError as
    `verify`.
    """
    waiting = []
    for place, (judge, answers) in enumerate(groups):
        texts = list(dict.fromkeys(answer for answer in answers if answer is not None))
        if judge is not None and len(texts) > 1:
            waiting.append((place, judge, texts))

    def work(worker: Worker, one: tuple[int, Judge, list[str]]) -> dict[str, str]:
        _, judge, texts = one
        packed, first, classes = Packed.of(judge), dict[str, str](), list[str]()
        failures = Counter[str]()
        for text in texts:
            usable = [other for other in classes if failures[other] < MAX_FAILURES]
            reply = worker.ask(packed, "first_same", text, usable) if usable else Reply(None)
            first[text] = text if reply.value is None else usable[reply.value]
            failed = list[str]()
            for other in usable if reply.failure is not None else ():
                reply = worker.ask(packed, "first_same", text, [other])
                if reply.value is not None:
                    first[text] = other
                    break
                failed += [other] * (reply.failure is not None)
                if len(failed) == MAX_FAILURES:  # the fault is this one's
                    failed = [text] * MAX_FAILURES
                    break
            failures.update([text, *failed] if failed else ())
            if first[text] == text:
                classes.append(text)
        return first

    found = _map(work, waiting, limits, "compare answers")
    firsts = {place: first for (place, *_), first in zip(waiting, found)}
    return [
        [None if answer is None else firsts.get(place, {}).get(answer, answer) for answer in answers]
        for place, (_, answers) in enumerate(groups)
    ]


def _map(work: Any, items: list[Any], limits: Limits | None, title: str) -> list[Any]:
    if not items:
        return []
    from tqdm import tqdm

    with tqdm(total=len(items), desc=title, delay=3, leave=False, dynamic_ncols=True) as bar:
        return pool(limits or Limits()).map(work, items, bar.update)


def _verdict(reply: Reply) -> Verdict:
    if reply.failure is not None:
        return Verdict(0.0, None, reply.failure)
    score, answer = reply.value
    if not -1e300 < score < 1e300:  # NaN too
        return Verdict(0.0, None, f"ValueError: the score is {score}")
    return Verdict(score, _text(answer))


def _text(answer: Any) -> str | None:
    return None if answer is None else str(answer).strip() or None


def _show(asked: Sequence[tuple[Task, Item, str]], verdicts: Sequence[Verdict | None]) -> None:
    """Warns of the first failure of each kind of task; an empty completion may be one to begin with."""
    failed = [at for at, verdict in enumerate(verdicts) if verdict and verdict.failure and asked[at][2]]
    for place in failed:
        task, _, completion = asked[place]
        verdict, kind = verdicts[place], type(task).__name__
        if kind in _shown or verdict is None:
            continue
        _shown.add(kind)
        warnings.warn(
            f"{kind}: the verifier failed on {len(failed)} of {len(asked)} completions, which score 0 and "
            f"count as verify_failures; the first: {' '.join(str(verdict.failure).split())[:200]}, on the "
            f"completion {completion[:200]!r}",
            stacklevel=3,
        )
