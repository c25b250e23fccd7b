"""Reward functions that TRL calls: conversations, columns, numbers as numbers, and failures in the log."""

from __future__ import annotations

from typing import Any

import pytest

from g2rl_kernels.integrations import rewards
from g2rl_kernels.tasks.base import Verdict

pytest.importorskip("math_verify", reason="needs math-verify: pip install 'g2rl-kernels[train]'")


def said(text: Any, *others: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}, *others]


def test_the_assistants_last_message_counts() -> None:
    conversations = [
        said(r"\boxed{5}"),
        said(r"\boxed{5}", {"role": "tool", "content": "7"}),
        said(
            r"\boxed{4}", {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": r"\boxed{5}"}
        ),
        said([{"type": "text", "text": r"\boxed{5}"}]),
        said(None),
        [],
    ]
    assert rewards.math_answer(conversations, answer=["5"] * 6) == [1, 1, 1, 1, 0, 0]
    assert rewards.last_number(conversations, answer=[5] * 6) == [1, 1, 1, 1, 0, 0]


def test_known_answers_are_texts_numbers_or_worked_solutions() -> None:
    texts = [r"\boxed{0.00001}", r"\boxed{\frac34}", "The answer is yes.", r"\boxed{2\sqrt3}", r"\boxed{5}"]
    known = [0.00001, 0.75, "yes", r"Hence $\boxed{2\sqrt{3}}$.", None]
    assert rewards.math_answer(texts, solution=known) == [1, 1, 1, 1, None]
    assert rewards.math_answer(texts[:1], answer=["4"], solution=["1e-5"]) == [0]
    assert rewards.last_number(["1,024", "x = −3", "2,3", "7.0", "7"], ["1024", -3, "3", 7, None]) == [
        1,
        1,
        1,
        1,
        None,
    ]
    with pytest.raises(ValueError, match="needs a column of known answers, 'answer' or 'solution'"):
        rewards.math_answer(["5"], result=["5"])


def test_failures_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, float]] = []

    def log_metric(name: str, value: float) -> None:
        logged.append((name, value))

    rewards.math_answer(["5", "6"], answer=["5", "5"], log_metric=log_metric)
    failed = [Verdict(1.0, "5"), Verdict(0.0, None, "too slow"), Verdict(0.0, None, "out of memory")]
    monkeypatch.setattr(rewards, "verdicts", lambda *_: failed)
    assert rewards.last_number(["5", "6", "7"], ["5"] * 3, log_metric=log_metric) == [1, 0, 0]
    assert logged == [("verify_failures", 0.0), ("verify_failures", 2.0)]
