"""Trains one setting with GRPOTrainer and with G2RLTrainer, and compares the runs.

`compare` trains four times from the same weights and seed:

    plain      GRPOTrainer
    unshaped   G2RLTrainer, lam=0: equal to `plain` to the bit
    default    G2RLTrainer: the features are those that autograd finds, and the first batch of responses has
               the rewards, lengths and log-probs of `plain`
    replayed   GRPOTrainer whose rewards are the shaped ones of `default`: the two train alike
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from tiny_trl import G2RLConfig, G2RLTrainer, config, parity, prompts, weights
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

NOT_COMPARED = re.compile(r"runtime|per_second|step_time|feature_seconds|_mem_")
NOISY = re.compile(r"kl|entropy|sampling/|loss|aux_loss|vespo|grad_norm|clip")  # rounding reaches these
G2RL = {
    "cos_mean",
    "exploration_score_mean",
    "negative_pairs",
    "accuracy",
    "shaped_reward_mean",
    "sign_flips",
}


@dataclass(frozen=True)
class Case:
    """One setting of GRPOTrainer. Its name and the values of its options are shown in docs/trl-options.md."""

    name: str
    settings: dict[str, Any]  # of GRPOConfig
    arguments: Callable[[Place], dict[str, Any]] | None = None  # of GRPOTrainer, made anew for each run
    model: dict[str, Any] = field(default_factory=dict)  # settings of the tiny model on disk
    own: dict[str, Any] = field(default_factory=dict)  # of G2RLConfig, for the runs with G2RLTrainer
    deterministic: bool = True  # False: a forward draws random numbers, so that features have no oracle
    shapes: bool = True  # False: shaping has nothing to change
    alike: int = 99  # steps for which `default` and `replayed` are compared
    fast: bool = False  # part of `make test`


@dataclass
class Place:
    """Where the runs of one test find their model and leave their files."""

    path: Path
    model_dir: Callable[..., str]  # model_dir(**settings of the tiny model)
    case: Case

    def model(self) -> str:
        return self.model_dir(**self.case.model)


class Recorded:
    """Mixed into a trainer: keeps what each generation batch of training was made of."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.batches: list[dict[str, Any]] = []
        self.rewards: list[Tensor] = []
        self.completions: list[list[list[int]]] = []

    def _generate(self, prompts: list) -> tuple[Any, ...]:
        self.generated = super()._generate(prompts)  # type: ignore[misc]
        return self.generated

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        self.scored = super()._calculate_rewards(*inputs)  # type: ignore[misc]
        return self.scored

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training:  # type: ignore[attr-defined]
            self.batches.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()})
            self.rewards.append(self.scored.clone())
            self.completions.append([list(ids) for ids in self.generated[1]])
        return batch


class Plain(Recorded, GRPOTrainer):
    pass


class Ours(Recorded, G2RLTrainer):
    """Keeps features and what shaping added, too."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.features: list[Tensor] = []
        self.exact: list[Tensor] = []
        self.error: list[float] = []  # largest, of the features that torch computes in the run's precision
        self.bonuses: list[Tensor] = []

    def _shape(self, measurement: Any, count: int) -> Tensor:
        advantages = super()._shape(measurement, count)
        self.features.append(torch.cat(measurement.features))
        self.exact.append(features_by_autograd(self, exactly=True))
        self.error.append(float((features_by_autograd(self, exactly=False) - self.exact[-1]).abs().max()))
        bonus = list(self._logs["extra"]["g2rl_bonus"])[-count:]
        self.bonuses.append(torch.tensor([0.0 if b is None else b for b in bonus]).nan_to_num(nan=0.0))
        return advantages


class Replayed(Recorded, GRPOTrainer):
    """Trains on rewards that another run has shaped."""

    source: Ours

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*inputs)
        if self.model.training:
            rewards[:, self.source._correctness] += self.source.bonuses[len(self.batches)]
        return rewards


@torch.enable_grad()
def features_by_autograd(trainer: Any, exactly: bool) -> Tensor:
    """Features [S, d] of the responses just generated: each alone, without padding, from the model's logits.

    A feature is the mean over the scored tokens of temperature * d log p(token) / d (input of the LM head).
    exactly: in float64; else in the precision of the run.
    """
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    vars(causal).pop("forward", None)  # the class's own: logits, by no code of TRL's or ours
    if exactly:
        vars(head).pop("forward", None)  # cast_lm_head_to_fp32
        causal.get_input_embeddings()._forward_hooks.clear()
        if hasattr(causal, "set_experts_implementation"):
            causal.set_experts_implementation("eager")  # the default has no float64
        model.double()
    seen: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(inputs[0].detach().requires_grad_())
        return (seen[-1],)

    hook = head.register_forward_pre_hook(watch)
    prompt_ids, completion_ids, tool_mask = trainer.generated[:3]
    features = []
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids)):
        ids = torch.tensor([[*prompt, *completion]])
        with nullcontext() if exactly else trainer.accelerator.autocast():
            logits = causal(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / trainer.temperature
        ).log_softmax(-1)
        chosen = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0]
        counts = torch.tensor(tool_mask[row] if tool_mask is not None else [1] * len(completion)).double()
        if trainer.mask_truncated_completions and completion[-1] not in (*trainer.eos_token_ids, 0):
            counts *= 0
        slope = torch.autograd.grad((chosen * counts).sum() * trainer.temperature, seen[-1])[0]
        features.append(slope.double().sum((0, 1)) / (counts.sum() + 1e-8))
    hook.remove()
    return torch.stack(features).detach()


# --- runs ---------------------------------------------------------------------------------------------------


def run(kind: type, place: Place, name: str, source: Ours | None = None, **own: Any) -> Any:
    case = place.case
    args = config(place.path / name, G2RLConfig if kind is Ours else GRPOConfig, **case.settings, **own)
    given = {"model": place.model(), "reward_funcs": parity, "train_dataset": prompts()}
    given |= case.arguments(place) if case.arguments else {}
    trainer = kind(**given, args=args)
    if source is not None:
        trainer.source = source
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def compare(place: Place) -> None:
    case = place.case
    plain = run(Plain, place, "plain")
    same_to_the_bit(run(Ours, place, "unshaped", **case.own, g2rl_lam=0), plain)
    shaping = {"g2rl_shaping": "equation"}  # shapes wrong answers too, which most are here
    default = run(Ours, place, "default", **shaping | case.own)
    same_first_batch(default, plain)
    trains(default, case)
    if case.deterministic and case.alike:
        train_alike(default, run(Replayed, place, "replayed", default), case.alike)


# --- what must hold -----------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)  # NaN is like NaN


def same_tensor(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=9.0), other.nan_to_num(nan=9.0))


def compared(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not NOT_COMPARED.search(key)}


def same_to_the_bit(ours: Any, plain: Any) -> None:
    history, theirs = ours.state.log_history, plain.state.log_history
    assert [list(compared(entry)) for entry in history] == [list(compared(e)) for e in theirs]
    for entry, other in zip(history, theirs):
        for key, value in compared(entry).items():
            assert same(value, other[key]), (entry["step"], key, value, other[key])
    assert any("loss" in entry for entry in history)
    assert ours.completions == plain.completions
    assert [len(batch) for batch in ours.batches] == [len(batch) for batch in plain.batches]
    for batch, other in zip(ours.batches, plain.batches):
        for key, value in batch.items():
            assert not isinstance(value, Tensor) or same_tensor(value, other[key]), key
    if plain.use_vllm:
        assert ours.vllm_generation.settings == plain.vllm_generation.settings
    found, expected = weights(ours), weights(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def same_first_batch(ours: Any, plain: Any) -> None:
    """The first responses, their rewards and TRL's metrics of them, which G2RL must leave as they are."""
    assert ours.completions[0] == plain.completions[0]
    assert same_tensor(ours.rewards[0], plain.rewards[0])
    first, theirs = (next(e for e in t.state.log_history if "reward" in e) for t in (ours, plain))
    assert {key for key in first if not key.startswith("g2rl/")} == theirs.keys()
    for key, value in theirs.items():
        if not (NOT_COMPARED.search(key) or NOISY.search(key)) and first["step"] == 1:
            assert same(value, first[key]), (key, value, first[key])
    for batch, other in zip(ours.batches[:1], plain.batches[:1]):
        assert batch.keys() == other.keys()
        rounded = {"old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio"}
        for key in batch.keys() - {"advantages", *rounded}:
            assert not isinstance(batch[key], Tensor) or same_tensor(batch[key], other[key]), key
        for key in batch.keys() & rounded:
            torch.testing.assert_close(batch[key], other[key], rtol=1e-4, atol=1e-4)
    tables = sorted((Path(plain.args.output_dir) / "completions").glob("*.parquet"))[:1]
    for table in tables if plain.eval_dataset is None else []:  # an evaluation overwrites it
        own = pandas.read_parquet(Path(ours.args.output_dir) / "completions" / table.name)
        pandas.testing.assert_frame_equal(
            own.drop(columns=["g2rl_bonus", "advantage"]),
            pandas.read_parquet(table).drop(columns="advantage"),
        )


def trains(ours: Ours, case: Case) -> None:
    """Everything is finite, G2RL's metrics are there, shaping shapes, and features are those of autograd."""
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert logged
    for entry in logged:
        assert math.isfinite(entry["loss"])
        assert math.isfinite(entry["grad_norm"])
    measured = [entry for entry in logged if "reward" in entry]
    assert all(math.isfinite(entry[f"g2rl/{name}"]) for entry in measured for name in G2RL)
    assert ours.features
    groups = torch.cat([bonus.view(-1, ours.num_generations) for bonus in ours.bonuses])
    assert bool((groups.amax(1) > groups.amin(1)).any()) == case.shapes  # one bonus for all changes nothing
    if case.deterministic:
        assert torch.cat(ours.exact).norm(dim=1).max() > 0.05
        for found, exact, error in zip(ours.features, ours.exact, ours.error):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=4 * error + 1e-5)


def train_alike(ours: Ours, replayed: Replayed, steps: int) -> None:
    """GRPOTrainer, given the shaped rewards, makes the same updates, up to rounding of the log-probs."""
    assert ours.completions[:steps] == replayed.completions[:steps]
    for batch, other in list(zip(ours.batches, replayed.batches))[:steps]:
        torch.testing.assert_close(batch["advantages"], other["advantages"], rtol=1e-4, atol=1e-4)
    for entry, other in zip(ours.state.log_history, replayed.state.log_history):
        for key in entry.keys() & other.keys() if entry["step"] <= steps else ():
            if NOISY.search(key) and not key.startswith("g2rl/"):
                value, theirs = entry[key], other[key]
                assert value == theirs or value == pytest.approx(theirs, rel=2e-3, abs=2e-5, nan_ok=True), key
