"""G2RLTrainer as each of the systems that the paper compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from tiny_trl import Letters, Watched, assert_same_run, logged, trained
from trl import GRPOTrainer

from g2rl_kernels.group.evol import evol_rewards, majority_labels
from g2rl_kernels.integrations import systems
from g2rl_kernels.integrations.trl_head import completion_text

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


@pytest.fixture
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "SentenceEncoder", Letters)


def last_letter(text: str) -> str | None:
    """A completion that is empty, or ends with a space or a letter after f, has no answer."""
    return text[-1:] if "!" < text[-1:] <= "f" else None


def completions_of(trainer: Any) -> list[str]:
    return trainer.processing_class.batch_decode(trainer.generated[1], skip_special_tokens=True)


@pytest.mark.parametrize("algorithm", ["grpo", "entropy_bonus"])
def test_unshaped_systems_are_trls_to_the_bit_and_measured(make: Callable[..., Any], algorithm: str) -> None:
    coef = {"grpo": 0.0, "entropy_bonus": 0.003}[algorithm]
    ours = trained(make, g2rl_algorithm=algorithm, g2rl_fused_logprobs=False)
    theirs = trained(make, GRPOTrainer, entropy_coef=coef)
    assert_same_run(ours, theirs)
    assert len(logged(ours, "g2rl/cos_mean")) == 2
    assert ours.args.epsilon_high is None


@pytest.mark.usefixtures("_letters")
@pytest.mark.parametrize("labels", ["truth", "majority"])
def test_evol_rl_trains_on_its_rewards(make: Callable[..., Any], labels: str) -> None:
    trainer = make(
        Watched,
        g2rl_algorithm="evol_rl",
        g2rl_labels=labels,
        g2rl_answer_func="test_trl_systems.last_letter",
        g2rl_encoder="org/letters",
        log_completions=True,
        max_steps=1,
    )
    assert (trainer.args.entropy_coef, trainer.epsilon_high) == (0.003, 0.28)
    trainer.train()
    (seen,) = trainer.seen
    texts = completions_of(trainer)
    answers = [last_letter(text) for text in texts]
    assert None in answers
    right = seen["rewards"][:, 0] > 0.5
    if labels == "majority":
        assert not torch.equal(right, majority_labels(answers, torch.arange(len(answers)) // 4))
        right = majority_labels(answers, torch.arange(len(answers)) // 4)
    valid = torch.tensor([answer is not None for answer in answers])
    evolved = evol_rewards(trainer._reader.encoder(texts), right, torch.arange(len(right)) // 4, valid)
    groups = ((evolved + 1) / 2).view(-1, 4)  # the correctness reward is 0 or 1
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(seen["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    bonus = torch.tensor(list(trainer._logs["extra"]["g2rl_bonus"]))
    torch.testing.assert_close(bonus, (evolved - torch.where(right, 1.0, -1.0)) / 2)
    assert logged(trainer, "g2rl/shaped_reward_mean")[0] == pytest.approx(evolved.mean().item())
    # accuracy is by the correctness reward, whatever the labels
    assert logged(trainer, "g2rl/accuracy")[0] == logged(trainer, "reward")[0]
    torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)


def nothing_known(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def test_majority_labels_need_no_truth(make: Callable[..., Any]) -> None:
    settings = {"g2rl_answer_func": "test_trl_systems.last_letter", "g2rl_labels": "majority", "max_steps": 1}
    trainer = trained(make, Watched, g2rl_algorithm="grpo", reward_funcs=nothing_known, **settings)
    answers = [last_letter(text) for text in completions_of(trainer)]
    labels = majority_labels(answers, torch.arange(len(answers)) // 4).float()
    groups = labels.view(-1, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(trainer.seen[0]["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    assert logged(trainer, "g2rl/accuracy") == [None]  # as TRL's metrics of rewards
    assert logged(trainer, "reward") == [None]


@pytest.mark.usefixtures("_letters")
def test_a_batch_without_answers_is_told(make: Callable[..., Any]) -> None:
    trainer = make(g2rl_algorithm="evol_rl", g2rl_answer_func="builtins.min", max_steps=1)
    trainer._reader.answer = lambda text: " "
    with pytest.warns(UserWarning, match="no response of the batch has an answer: g2rl_answer_func"):
        trainer.train()


def test_answers_are_math_verifys_unless_a_function_is_named(make: Callable[..., Any]) -> None:
    pytest.importorskip("math_verify")
    trainer = make(g2rl_labels="majority")
    conversation = [{"role": "assistant", "content": r"so \boxed{0.5}"}, {"role": "tool", "content": "7"}]
    assert completion_text(conversation) == r"so \boxed{0.5}"
    assert completion_text("text") == "text"
    texts = [completion_text(conversation), r"\boxed{\frac{1}{2}}", "who knows", ""]
    assert trainer._read(texts) == {"votes": ["1/2", "1/2", None, None]}
    votes = trainer._read([r"\boxed{10^{-3}}", r"\boxed{x = 0.001}", r"\boxed{0.1\%}", r"\boxed{0.01}"])[
        "votes"
    ]
    assert votes[0] is not None
    assert votes[0] == votes[1] == votes[2] != votes[3]
