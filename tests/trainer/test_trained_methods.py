"""Methods of other papers in our trainer: what they are given, and that they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_systems import measured
from tiny import Letters, LetterTask, make_model, make_trainer

import g2rl_kernels as g2
from g2rl_kernels.errors import ConfigError
from g2rl_kernels.group.methods import METHODS
from g2rl_kernels.group.options import MethodOptions, ShapingOptions
from g2rl_kernels.group.shaping import shape_rewards
from g2rl_kernels.models import method_inputs
from g2rl_kernels.tasks.sources import load_task
from g2rl_kernels.trainer import TrainerConfig
from g2rl_kernels.trainer import trainer as trainer_module


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "SentenceEncoder", Letters)


@pytest.mark.parametrize("name", METHODS)
def test_each_trains_and_changes_advantages(tmp_path: Path, name: str) -> None:
    keys: dict[str, Any] = {"batch_size": 32, "group_size": 8, "temperature": 1.5, "steps": 2}
    trainer = make_trainer(tmp_path / name, algorithm=name, **keys)
    if name == "dirl":  # a random model's own direction has all responses on one side
        direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
        trainer.inputs.direction = torch.nn.functional.normalize(direction, dim=0)
    _, at = measured(trainer)
    _, plain = measured(make_trainer(tmp_path / "grpo", algorithm="grpo", **keys))
    assert torch.equal(at.rewards, plain.rewards)
    assert torch.equal(at.geometry.similarity, plain.geometry.similarity) == (name != "dirl")
    assert (at.geometry.advantages - plain.geometry.advantages).abs().max() > 1e-4
    moved = not torch.equal(at.geometry.shaped_rewards, at.rewards)
    assert moved == (METHODS[name].gives == "rewards")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    steps = trainer.train()
    assert len(steps) == 2
    assert all(metrics["grad_norm"] > 0 for metrics in steps)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


@pytest.mark.parametrize("similarity", ["gradient", "text"])
@pytest.mark.parametrize("truncated", ["keep", "drop"])
def test_settings_reach_the_method(tmp_path: Path, similarity: str, truncated: str) -> None:
    trainer = make_trainer(
        tmp_path,
        algorithm="dqo",
        similarity=similarity,
        strength=0.3,
        uniform_groups="skip",
        truncated=truncated,
        encoder="org/letters",
        batch_size=32,
        group_size=8,
        temperature=1.5,
    )
    seen: dict[str, torch.Tensor] = {}
    shape = trainer._shape

    def watched(features: torch.Tensor, keys: torch.Tensor, *others: Any) -> Any:
        seen.update(features=features, keys=keys)
        return shape(features, keys, *others)

    trainer._shape = watched
    rollout, at = measured(trainer)
    ids = torch.arange(32) // 8
    if truncated == "drop":
        ids = ids.masked_fill(rollout.truncated, -1)
    texts = {"embeddings": Letters("", "cpu")(rollout.completions)} if similarity == "text" else {}
    expected = shape_rewards(
        seen["features"],
        at.rewards,
        ShapingOptions(uniform_groups="skip"),
        group_ids=ids,
        keys=seen["keys"],
        algorithm="dqo",
        method_options=MethodOptions(strength=0.3, similarity=similarity),
        **texts,
    )
    for found, one in zip(at.geometry, expected):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)
    assert (similarity == "text") == (getattr(trainer, "encoder", None) is not None)


def test_an_encoder_is_loaded_where_texts_are_compared_alone(tmp_path: Path) -> None:
    assert not hasattr(make_trainer(tmp_path / "one", algorithm="dra"), "encoder")
    assert hasattr(make_trainer(tmp_path / "two", algorithm="dra", similarity="text"), "encoder")


def whole_responses(trainer: Any, rollout: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states that predict each response's tokens, and these tokens; by the model's own forward."""
    found, width = [], rollout.mask.shape[1]
    for ids, attention, mask in zip(rollout.ids, rollout.attention, rollout.mask):
        kept = ids[attention.bool()]
        with torch.no_grad():
            hidden = trainer.model.model(input_ids=kept[None]).last_hidden_state[0]
        count = int(mask.sum())
        assert torch.equal(kept[-count:], ids[-width:][mask])
        found.append((hidden[-count - 1 : -1], kept[-count:]))
    return found


def test_dropout_does_not_move_dirls_direction(tmp_path: Path) -> None:
    """A model that comes in training mode, as a resumed one may, has the direction of evaluation mode."""
    model = make_model(attention_dropout=0.5)
    found = [
        make_trainer(tmp_path / str(at), model=model.train(training), algorithm="dirl").inputs.direction
        for at, training in enumerate((True, False))
    ]
    assert torch.equal(*found)


OWN_PROMPTS = {"reasoning": ["1+2=", "3+4+5=", "6-1="], "memory": ["a", "bb"]}


@pytest.mark.parametrize("own", [False, True])
def test_dirl_weighs_tokens_by_its_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    trainer = make_trainer(
        tmp_path,
        algorithm="dirl",
        batch_size=16,
        group_size=8,
        temperature=1.5,
        direction_prompts=OWN_PROMPTS if own else {},
    )
    tokenizer, model = trainer.tokenizer, trainer.model.model
    means = []
    for prompts in (
        OWN_PROMPTS.values() if own else (method_inputs.REASONING_PROMPTS, method_inputs.MEMORY_PROMPTS)
    ):
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in prompts]
        with torch.no_grad():
            last = [model(input_ids=one).last_hidden_state[0, -1] for one in ids]
        means.append(torch.stack(last).mean(0))
    k = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    torch.testing.assert_close(trainer.inputs.direction, k, rtol=1e-4, atol=1e-5)

    given: list[torch.Tensor] = []
    head_features = g2.head_features

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options["token_weights"])
        return head_features(*args, **options)

    monkeypatch.setattr(g2, "head_features", watched)
    rollout, at = measured(trainer)
    projected = [hidden @ k for hidden, _ in whole_responses(trainer, rollout)]
    torch.testing.assert_close(torch.cat(given), torch.sigmoid(torch.cat(projected)), rtol=1e-4, atol=1e-5)
    alignment = torch.stack([one.mean() for one in projected])
    torch.testing.assert_close(trainer.inputs.alignment(), alignment, rtol=1e-4, atol=1e-4)
    assert at.geometry.shaped_rewards.isfinite().all()


def test_gar_compares_with_the_solution(tmp_path: Path) -> None:
    """Against autograd through the model's own logits."""
    trainer = make_trainer(tmp_path, algorithm="gar", batch_size=16, group_size=8, micro_batch_size=4)
    rollout, _ = measured(trainer)
    weight = trainer.model.lm_head.weight.detach()

    def vector(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        leaf = hidden.clone().requires_grad_(True)
        torch.nn.functional.cross_entropy(leaf @ weight.T, tokens).backward()
        return torch.nn.functional.normalize((leaf.grad * leaf.detach()).mean(0), dim=0)

    cosines = []
    for row, (hidden, tokens) in enumerate(whole_responses(trainer, rollout)):
        item = rollout.items[row][1]
        prompt = trainer.tokenizer(item["question"])["input_ids"]
        solution = trainer.tokenizer(item["solution"])["input_ids"]
        with torch.no_grad():
            states = trainer.model.model(input_ids=torch.tensor([prompt + solution])).last_hidden_state[0]
        anchor = vector(states[len(prompt) - 1 : -1], torch.tensor(solution))
        cosines.append(vector(hidden, tokens) @ anchor)
    torch.testing.assert_close(trainer.inputs.alignment(), torch.stack(cosines), rtol=1e-3, atol=1e-4)


def test_gar_needs_solutions_that_fit(tmp_path: Path) -> None:
    class Unsolved(LetterTask):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "abc="}

    with pytest.raises(ConfigError, match=r"^task: Unsolved\[0\] has no text 'solution', with which gar"):
        make_trainer(tmp_path, task=Unsolved(), algorithm="gar")

    class Long(LetterTask):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "abc=", "solution": 80 * "a"}

    message = r"^task: Long\[0\]: solution: it has 80 tokens after .* 4, .* 64 positions"
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, task=Long(), algorithm="gar")


@pytest.mark.parametrize("solution", [None, 80 * "a", "a\ud83d"])
def test_gar_reads_every_solution_of_a_file_before_work(tmp_path: Path, solution: str | None) -> None:
    rows = [{"question": "abc=", "answer": "a", "solution": "1+1=a"} for _ in range(4)]
    rows[2]["solution"] = solution
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task({"kind": "jsonl", "path": str(tmp_path / "x.jsonl")})
    with pytest.raises(
        ConfigError, match=r"^task: AnswerTask\[2\](: solution: it has 80|: solution: char| has no text)"
    ):
        make_trainer(tmp_path, task=task, algorithm="gar")
    rows[2]["question"] = 40 * "a"  # is skipped, as it is longer than max_prompt_tokens
    if solution == 80 * "a":
        task.rows[2] = rows[2]
        make_trainer(tmp_path, task=task, algorithm="gar")


@pytest.mark.parametrize("name", ["dirl", "gar"])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    """dirl's direction is the starting model's, also in a run that resumes."""
    keys: dict[str, Any] = {"algorithm": name, "batch_size": 16, "group_size": 8, "temperature": 1.5}
    whole = make_trainer(tmp_path / "whole", steps=3, **keys)
    whole.train()
    make_trainer(tmp_path / "parts", steps=2, **keys).train()
    parts = make_trainer(tmp_path / "parts", steps=3, **keys)
    parts.train()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters()))


def test_majority_labels_work_with_methods(tmp_path: Path) -> None:
    class Last(LetterTask):
        def answer(self, completion: str, item: dict[str, Any]) -> str | None:
            return completion[-1:]

    trainer = make_trainer(tmp_path, task=Last(), algorithm="passk", pass_k=2, labels="majority")
    _, at = measured(trainer)
    expected = []
    for r in at.rewards.view(-1, 4):
        pairs = [(i, j) for i in range(4) for j in range(i)]
        won = torch.tensor([float((r[[*pair]] > 0).any()) for pair in pairs])
        spread = (won.mean() * (1 - won.mean())).sqrt() + 1e-6
        for i in range(4):
            mine = torch.tensor([i in pair for pair in pairs])
            expected.append(((won[mine].mean() - won.mean()) / spread).item())
    torch.testing.assert_close(at.geometry.advantages, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_setpo_adds_to_scaled_advantages(tmp_path: Path) -> None:
    for scale in ("group", "none"):
        trainer = make_trainer(tmp_path / scale, algorithm="setpo", scale=scale, strength=0.0)
        _, at = measured(trainer)
        plain = g2.group_geometry(
            torch.ones(8, 1), at.rewards, group_size=4, shaping="none", scale=scale
        ).advantages
        torch.testing.assert_close(at.geometry.advantages, plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strength": -1}, r"^strength: got -1\.0, needs a positive finite number, 0, or None"),
        ({"similarity": "words"}, r"^similarity='words': choose one of gradient, text"),
        (
            {"similarity": "text"},
            r"^similarity: got 'text' with algorithm=g2rl, .* use repexp, dqo, setpo, dra",
        ),
        ({"algorithm": "passk", "group_size": 4}, r"^pass_k: got 4, needs fewer than group_size=4"),
        ({"ridge": 0}, r"^ridge: got 0\.0, needs a positive finite number"),
        (
            {"direction_prompts": {"reasoning": ["a"]}},
            r"^direction_prompts: got the keys reasoning, needs {reasoning: \[prompts\], memory:",
        ),
        (
            {"direction_prompts": {"reasoning": "a", "memory": ["b"]}},
            r"^direction_prompts\.reasoning: got 'a', needs a list of texts",
        ),
        (
            {"direction_prompts": {"reasoning": ["a"], "memory": ["b", " "]}},
            r"^direction_prompts\.memory: got \['b', ' '\], needs a list of texts, none of them empty",
        ),
        ({"direction_prompts": {"reasoning": ["a"], "memory": []}}, r"^direction_prompts\.memory: got \[\]"),
        (
            {"direction_prompts": {"reasoning": ["a"], "memory": ["b", "\udc00"]}},
            r"^direction_prompts\.memory\[1\]: character 1 is .*, half of a surrogate pair",
        ),
        ({"direction_prompts": ["a"]}, r"^direction_prompts=\['a'\]: expected dict, got list"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig.from_dict(values)
