"""Methods of other papers in G2RLTrainer: advantages by TRL's formula of their rewards, or theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from datasets import Dataset
from tiny_trl import Letters, Watched, length, logged, parity, prompts, trained

from g2rl_kernels.errors import ConfigError
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.group.options import MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import shape_rewards
from g2rl_kernels.integrations import systems
from g2rl_kernels.integrations.trl import G2RLTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


def expected_advantages(seen: dict[str, Any], name: str, scale: str, **options: Any) -> torch.Tensor:
    signs = 2 * seen["rewards"][:, 0] - 1
    given = {key: options.pop(key) for key in ("embeddings", "alignment") if key in options}
    found = shape_rewards(
        seen["features"],
        signs,
        ShapingOptions(scale=scale),
        group_size=4,
        algorithm=name,
        method_options=MethodOptions(pass_k=2, **options),
        scores=seen["rewards"][:, 0],
        **given,
    )
    if METHODS[name].gives == "advantages":
        return found.advantages
    groups = ((found.shaped_rewards + 1) / 2).view(-1, 4)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


GROUP_METHODS = ("repexp", "dqo", "setpo", "dra", "passk")


@pytest.mark.parametrize("name", GROUP_METHODS)
@pytest.mark.parametrize("scale", ["group", "none"])
def test_each_trains_on_its_rewards_or_advantages(make: Callable[..., Any], name: str, scale: str) -> None:
    settings = {"g2rl_algorithm": name, "g2rl_pass_k": 2, "g2rl_strength": 1.0, "scale_rewards": scale}
    trainer = trained(make, Watched, reward_funcs=parity, **settings)
    assert len(trainer.seen) == 2
    changed = False
    for seen in trainer.seen:
        expected = expected_advantages(seen, name, scale, strength=1.0)
        torch.testing.assert_close(seen["advantages"], expected, rtol=1e-3, atol=1e-4)
        plain = expected_advantages(seen, name, scale, strength=0.0)
        changed |= name == "passk" or not torch.allclose(plain, expected, atol=1e-4)
    assert changed
    assert len(logged(trainer, "g2rl/cos_mean")) == 2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    bonus = torch.tensor(list(trainer._logs["extra"]["g2rl_bonus"]))
    assert (bonus == 0).all() == (METHODS[name].gives == "advantages")


@pytest.mark.parametrize("name", ["dirl", "gar"])
def test_methods_with_inputs_of_their_own(make: Callable[..., Any], name: str) -> None:
    """TRL's responses, one by one through the model: alignments by autograd on its logits, and advantages."""
    rows = Dataset.from_list([{**row, "solution": f"{i % 3}+1=a"} for i, row in enumerate(prompts())])
    trainer = make(
        Watched, reward_funcs=parity, g2rl_algorithm=name, g2rl_strength=2.0, train_dataset=rows, max_steps=1
    )
    if name == "dirl":
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        trainer._inputs.direction = torch.nn.functional.normalize(direction, dim=0)
    model, found = trainer.model, {}
    alignment = trainer._inputs.alignment

    def watched(inputs: Any, batch: Any) -> Any:
        found.update(alignment(inputs, batch), inputs=inputs, expected=expected())
        return {"alignment": found["alignment"]}

    def states(prompt: list[int], response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        return hidden[len(prompt) - 1 : -1]

    def vector(prompt: list[int], response: list[int]) -> torch.Tensor:
        leaf = states(prompt, response).clone().requires_grad_(True)
        with torch.enable_grad():
            logits = leaf @ model.lm_head.weight.detach().T
            (gradient,) = torch.autograd.grad(
                torch.nn.functional.cross_entropy(logits, torch.tensor(response)), leaf
            )
        return torch.nn.functional.normalize((gradient * leaf.detach()).mean(0), dim=0)

    def expected() -> torch.Tensor:
        values = []
        for prompt, response, row in zip(*trainer.generated[:2], found["inputs"]):
            if name == "dirl":
                values.append((states(prompt, response) @ trainer._inputs.direction).mean())
                continue
            solution = trainer._tokenizer(row["solution"])["input_ids"]
            values.append(vector(prompt, response) @ vector(prompt, solution))
        return torch.stack(values)

    def recorded(inputs: Any, batch: Any) -> Any:
        found["inputs"] = inputs
        return watched(inputs, batch)

    trainer._inputs.alignment = recorded
    trainer.train()
    torch.testing.assert_close(found["alignment"], found["expected"], rtol=1e-3, atol=1e-4)
    (seen,) = trainer.seen
    given = {"alignment": found["alignment"], "strength": 2.0}
    advantages = expected_advantages(seen, name, "group", **given)
    torch.testing.assert_close(seen["advantages"], advantages, rtol=1e-3, atol=1e-4)
    plain = expected_advantages(seen, name, "group", **{**given, "strength": 0.0})
    assert not torch.allclose(plain, advantages, atol=1e-4)
    assert torch.allclose(seen["features"], seen["expected"], atol=1e-4) == (name == "gar")


@pytest.mark.parametrize("name", ["dirl", "gar"])
def test_their_own_direction_and_solutions_train(make: Callable[..., Any], name: str) -> None:
    rows = Dataset.from_list([{**row, "solution": "1+1=a"} for row in prompts()])
    trainer = trained(make, reward_funcs=parity, g2rl_algorithm=name, train_dataset=rows)
    assert len(logged(trainer, "g2rl/cos_mean")) == 2
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    if name == "gar":
        some = Dataset.from_list([{**row, "solution": "a" if i else ""} for i, row in enumerate(prompts())])
        for rows in (some, Dataset.from_list(prompts())):
            with pytest.raises(ConfigError, match=r"^train_dataset: row 0 has no text 'solution', with"):
                make(reward_funcs=parity, g2rl_algorithm=name, train_dataset=rows)
        made = Dataset.from_list(prompts()).with_transform(
            lambda rows: {**rows, "solution": ["1+1=a"] * len(rows["prompt"])}
        )
        make(reward_funcs=parity, g2rl_algorithm=name, train_dataset=made)


def test_directions_of_prompts_of_ones_own(make: Callable[..., Any]) -> None:
    """By two sets of one prompt each, given as on the command line."""
    given = '{"reasoning": ["1+2="], "memory": ["b"]}'
    trainer = make(reward_funcs=parity, g2rl_algorithm="dirl", g2rl_direction_prompts=given)
    last = []
    for text in ("1+2=", "b"):
        ids = torch.tensor([trainer._inputs._encode(text)])
        with torch.no_grad():
            last.append(trainer.model.model(input_ids=ids).last_hidden_state[0, -1])
    k = torch.nn.functional.normalize(last[0] - last[1], dim=0)
    torch.testing.assert_close(trainer._inputs.direction, k, rtol=1e-4, atol=1e-5)


def test_texts_are_compared_without_answers(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer function is needed, as no answer is read."""
    monkeypatch.setattr(systems, "SentenceEncoder", Letters)
    monkeypatch.setattr(systems, "answer_function", None)
    settings = {"g2rl_similarity": "text", "g2rl_strength": 2.0, "g2rl_encoder": "org/letters"}
    trainer = trained(
        make, Watched, reward_funcs=parity, g2rl_algorithm="dra", g2rl_fused_logprobs=True, **settings
    )
    assert trainer._reader.encoder.name == "org/letters"
    seen = trainer.seen[-1]
    texts = trainer.processing_class.batch_decode(trainer.generated[1], skip_special_tokens=True)
    embeddings = Letters("", "cpu")(texts)
    expected = expected_advantages(
        seen, "dra", "group", strength=2.0, similarity="text", embeddings=embeddings
    )
    torch.testing.assert_close(seen["advantages"], expected, rtol=1e-3, atol=1e-4)


def test_advantages_of_one_reward_refuse_others(make: Callable[..., Any]) -> None:
    message = r"reward_funcs: got parity, length, but g2rl_algorithm=setpo gives advantages of one reward"
    with pytest.raises(ValueError, match=message):
        make(G2RLTrainer, reward_funcs=[parity, length], g2rl_algorithm="setpo")
    make(G2RLTrainer, reward_funcs=[parity, length], g2rl_algorithm="dra", g2rl_correctness_reward="parity")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"g2rl_strength": -1.0}, r"^g2rl_strength: got -1\.0, needs a positive finite number, 0, or None"),
        ({"g2rl_similarity": "text"}, r"^g2rl_similarity: got 'text' with g2rl_algorithm=g2rl"),
        ({"g2rl_algorithm": "passk"}, r"^g2rl_pass_k: got 4, needs fewer than num_generations=4"),
        ({"g2rl_direction_prompts": "a.json"}, r"^g2rl_direction_prompts: got 'a\.json', needs {reasoning: "),
        (
            {"g2rl_direction_prompts": '{"reasoning": ["a"], "memory": []}'},
            r"^g2rl_direction_prompts\.memory: got \[\], needs a list of texts",
        ),
        (
            {"g2rl_algorithm": "passk", "g2rl_pass_k": 2, "g2rl_rewards": "graded"},
            r"^g2rl_rewards: got 'graded' with g2rl_algorithm=passk",
        ),
    ],
)
def test_settings_that_cannot_work(make: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
