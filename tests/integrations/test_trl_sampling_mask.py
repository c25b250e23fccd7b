"""G2RLTrainer with g2rl_keep_sampling_mask: the ids that sampling kept are those of every log-prob."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

import trl.trainer.grpo_trainer as grpo_trainer
from masked_runs import (
    Measured,
    Recorded,
    kept_by_transformers,
    kept_sets,
    logits,
    logits_of,
    logprobs,
    run,
    same_where,
)
from tiny_trl import assert_same_run, logged, lora, make_tokenizer, prompts, save_model, trained, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TopKLogitsWarper
from trl import GRPOTrainer

import g2rl_kernels as g2
from g2rl_kernels.integrations.trl_support import KEPT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers

SETTINGS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
}
filters = pytest.mark.parametrize("filters", SETTINGS.values(), ids=SETTINGS)
STALE = {"num_iterations": 2}  # TRL runs the forward of the old log-probs
WAYS = {"generate's states": {}, "stale": STALE, "forward": {"kind": Measured, **STALE}}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# --- the sets -----------------------------------------------------------------------------------------------


@ways
@filters
def test_the_sets_are_those_of_transformers(
    make: Callable[..., Any], filters: dict[str, Any], way: dict[str, Any]
) -> None:
    trainer = run(make, **filters, **way)
    batch, model = trainer.batches[0], trainer.policies[0]
    mask = batch["completion_mask"] > 0
    with torch.no_grad():
        expected = kept_by_transformers(model, batch, trainer.args)[mask]
    found = kept_sets(batch, expected.shape[1])[mask]
    assert torch.equal(found, expected)
    assert 0.02 < found.float().mean() < 0.9
    assert logged(trainer, "g2rl/kept_ids")[0] == pytest.approx(float(found.sum(1).float().mean()))
    assert logged(trainer, "g2rl/added_tokens")[0] == logged(trainer, "g2rl/whole_tokens")[0] == 0
    assert logged(trainer, "g2rl/masks_recomputed")[0] == 1


@ways
def test_the_sets_of_an_adapted_head(make: Callable[..., Any], tmp_path: Path, way: dict[str, Any]) -> None:
    torch.manual_seed(0)
    adapter = lora(target_modules=["q_proj", "lm_head"], lora_alpha=3)
    model = save_model(tmp_path / "untied", tie_word_embeddings=False)
    trainer = run(make, model=model, peft_config=adapter, top_p=0.7, beta=0.1, **way)
    batch, policy = trainer.batches[0], trainer.policies[0]
    mask = batch["completion_mask"] > 0
    with torch.no_grad():
        expected = kept_by_transformers(policy, batch, trainer.args)
        plain = kept_by_transformers(AutoModelForCausalLM.from_pretrained(model), batch, trainer.args)
    assert torch.equal(kept_sets(batch, expected.shape[2])[mask], expected[mask])
    assert (plain != expected)[mask].any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("transformers", None)),
        ({"bf16": True}, ("transformers", torch.bfloat16)),
        ({"bf16": True, "cast_lm_head_to_fp32": True}, ("transformers", None)),
        ({"bf16": True, "kind": Measured}, ("transformers", torch.bfloat16)),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain",
)
def test_the_samplers_rounding_is_repeated(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    expected: tuple[str, torch.dtype | None],
) -> None:
    asked, theirs = set(), g2.sampling_support

    def watched(*args: Any, **keywords: Any) -> Any:
        asked.add((keywords["rules"], keywords["logits_dtype"]))
        return theirs(*args, **keywords)

    monkeypatch.setattr(g2, "sampling_support", watched)
    trainer = run(make, top_k=5, **settings)
    assert asked == {expected}
    assert logged(trainer, "g2rl/added_tokens")[0] < 0.1


@pytest.mark.parametrize("way", [{}, STALE], ids=["aligned", "stale"])
def test_in_16_bits_the_sets_are_those_that_generate_drew_from(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    """Rounded logits are often equal: two lists of five would be others without the rounding."""
    seen, theirs = [], TopKLogitsWarper.__call__

    def watched(*given: Any) -> Tensor:
        seen.append(theirs(*given))
        return seen[-1]

    monkeypatch.setattr(TopKLogitsWarper, "__call__", watched)
    sizes = {"vocab_size": 5000, "hidden_size": 64, "initializer_range": 0.5, "tie_word_embeddings": False}
    model = save_model(tmp_path / "large", **sizes)
    trainer = make(
        Recorded, model=model, g2rl_keep_sampling_mask=True, top_k=20, bf16=True, max_steps=1, **way
    )
    seen.clear()  # of the check before training
    trainer.train()
    batch = trainer.batches[0]
    drawn = torch.stack(seen, 1) != -torch.inf
    mask = batch["completion_mask"] > 0
    assert torch.equal(kept_sets(batch, drawn.shape[2])[mask], drawn[mask])
    assert drawn[mask].sum(1).float().mean() > 20


# --- log-probs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["reference model", "adapter turned off"])
@filters
def test_log_probs_are_those_of_the_truncated_softmax(
    make: Callable[..., Any], model_dir: str, filters: dict[str, Any], adapter: bool
) -> None:
    """Of the policy, the old policy and the reference, over the ids that the policy kept."""
    settings = {"num_iterations": 2, "max_steps": 3, "beta": 0.1, **filters}
    if adapter:
        torch.manual_seed(0)
        settings["peft_config"] = lora()
    trainer = run(make, **settings)
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    assert len(trainer.batches) == 2
    for batch, model in zip(trainer.batches, trainer.policies):
        mask, T = batch["completion_mask"], trainer.args.temperature
        with torch.no_grad():
            kept = kept_by_transformers(model, batch, trainer.args)
            same_where(mask, batch["old_per_token_logps"], logprobs(model, batch, kept, T))
            same_where(mask, batch["ref_per_token_logps"], logprobs(reference, batch, kept, T))
            full = logprobs(model, batch, None, T)
        assert ((full - batch["old_per_token_logps"])[mask > 0]).min() < -0.05
    (first, second), later = trainer.forwards[:2], trainer.batches[1]
    same_where(first[0]["completion_mask"], first[1], first[0]["old_per_token_logps"])
    assert (first[1] - second[1]).abs().max() > 0.01  # another policy, over the same ids
    assert trainer.forwards[2][0][KEPT][0].ids.data_ptr() in {row.ids.data_ptr() for row in later[KEPT]}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"num_iterations": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"steps_per_generation": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"num_iterations": 2, "mask_truncated_completions": True, "max_completion_length": 3},
        {"num_iterations": 2, "gradient_checkpointing": True},
        {"num_iterations": 2, "pad_to_multiple_of": 8, "loss_type": "cispo"},
        {"num_iterations": 2, "use_transformers_continuous_batching": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_ratio_is_one_before_the_first_update(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    """The sets stay with their rows when TRL shuffles and splits a batch."""
    trainer = run(make, top_p=0.8, **settings)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    assert len(trainer.forwards) == accumulated
    spread = set()
    for inputs, found in trainer.forwards:
        mask = inputs["completion_mask"]
        assert len(inputs[KEPT]) == len(mask)
        torch.testing.assert_close(
            found[mask > 0], inputs["old_per_token_logps"][mask > 0], rtol=1e-5, atol=1e-5
        )
        spread |= {len(row.ids) for row in inputs[KEPT]}
    assert len(spread) > 2
    assert logged(trainer, "clip_ratio/region_mean")[:1] in ([0.0], [])


def test_evaluation_keeps_the_whole_vocabulary(make: Callable[..., Any]) -> None:
    trainer = run(make, top_p=0.7, eval_dataset=prompts(4), eval_strategy="steps", eval_steps=1)
    (inputs, found), learner = trainer.forwards[-1], trainer.learners[-1]
    assert KEPT not in inputs
    with torch.no_grad():
        same_where(inputs["completion_mask"], found, logprobs(learner, inputs, None, 1.0))


def test_a_batch_without_tokens_moves_nothing(make: Callable[..., Any]) -> None:
    settings = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 1, "beta": 0.1}
    for way in ({}, {"num_iterations": 2}):
        trainer = make(Recorded, g2rl_keep_sampling_mask=True, top_p=0.7, **settings, **way)
        trainer.eos_token_ids = []  # nothing ends: all are truncated
        trainer.train()
        assert logged(trainer, "loss") == logged(trainer, "grad_norm") == [0.0]


def test_lists_beyond_the_limit_stand_for_the_whole_vocabulary(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g2, "sampling_support", partial(g2.sampling_support, limit=5))
    trainer = run(make, top_p=0.8, num_iterations=2)
    batch, model = trainer.batches[0], trainer.policies[0]
    with torch.no_grad():
        kept = kept_by_transformers(model, batch, trainer.args)
        kept |= kept.sum(2, keepdim=True) > 5
        expected = logprobs(model, batch, kept, 1.0)
    mask = batch["completion_mask"]
    same_where(mask, batch["old_per_token_logps"], expected)
    share = float(kept.all(2)[mask > 0].float().mean())
    assert 0 < share < 1
    assert logged(trainer, "g2rl/whole_tokens") == [pytest.approx(share)]


def test_later_updates_have_the_sets_of_the_policy_that_sampled(make: Callable[..., Any]) -> None:
    trainer = run(make, top_p=0.8, num_iterations=2, max_steps=2, optim="sgd", learning_rate=0.3)
    (inputs, found), learner = trainer.forwards[1], trainer.learners[1]
    mask, old = inputs["completion_mask"], inputs["old_per_token_logps"]
    with torch.no_grad():
        kept = kept_by_transformers(trainer.policies[0], inputs, trainer.args)
        same_where(mask, found, logprobs(learner, inputs, kept, 1.0))
        own = kept_by_transformers(learner, inputs, trainer.args)
    assert (own != kept)[mask > 0].any()
    assert (found - old)[mask > 0].abs().max() > 0.01


# --- the update ---------------------------------------------------------------------------------------------


@ways
@filters
def test_an_update_is_that_of_the_truncated_softmax(
    make: Callable[..., Any], filters: dict[str, Any], way: dict[str, Any]
) -> None:
    """One step of SGD at learning rate 1 against autograd through the model's own logits."""
    plain = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    own = {"loss_type": "grpo", "entropy_coef": 0.1, "beta": 0.2}
    trainer = run(make, **plain, **own, **filters, **way)
    batch, model = trainer.batches[0], copy.deepcopy(trainer.policies[0])
    vars(model).pop("forward")
    mask = batch["completion_mask"].float()
    kept = kept_by_transformers(model, batch, trainer.args)

    def step(kept: Tensor | None) -> dict[str, Tensor]:
        model.zero_grad()
        log_p = logits_of(model, batch) / trainer.args.temperature
        log_p = (log_p if kept is None else log_p.masked_fill(~kept, -torch.inf)).log_softmax(-1)
        chosen = log_p.gather(2, batch["completion_ids"][..., None])[..., 0]
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
        objective = (
            chosen * batch["advantages"][:, None]
        )  # the KL's gradient is 0: the policy is the reference
        loss = -(objective * mask).sum(1).div(mask.sum(1)).mean() - 0.1 * (entropy * mask).sum() / mask.sum()
        loss.backward()
        return {name: p.detach() - p.grad for name, p in model.named_parameters()}

    found, expected, full = weights(trainer), step(kept), step(None)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    assert max(float((full[name] - weight).abs().max()) for name, weight in expected.items()) > 0.01


@ways
def test_features_are_of_the_truncated_softmax(make: Callable[..., Any], way: dict[str, Any]) -> None:
    class Features(way.get("kind", Recorded)):  # type: ignore[misc]
        def _shape(self, measurement: Any, count: int) -> Tensor:
            self.features = torch.cat(measurement.features)
            return super()._shape(measurement, count)

    trainer = run(make, **{**way, "kind": Features, "top_p": 0.7})
    batch, model = trainer.batches[0], trainer.policies[0]
    mask, weight = batch["completion_mask"][..., None].float(), model.lm_head.weight.detach()
    with torch.no_grad():
        kept = kept_by_transformers(model, batch, trainer.args)
        p = logits(model, batch).masked_fill(~kept, -torch.inf).softmax(-1)
    onehot = torch.nn.functional.one_hot(batch["completion_ids"], p.shape[-1])
    expected = (((onehot - p) @ weight) * mask).sum(1) / (mask.sum(1) + 1e-8)
    torch.testing.assert_close(trainer.features, expected, rtol=1e-3, atol=1e-5)


# --- samplers -----------------------------------------------------------------------------------------------


class Engine:
    """Stands in for vLLM: draws from the truncated softmax and reports its log-probs."""

    def __init__(self, **settings: Any):
        self.given = settings
        dtype = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
        self.llm, self.vllm_client = SimpleNamespace(llm_engine=dtype), self

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts: list, **_: Any) -> tuple[Any, ...]:
        model, T, top_p = (self.given[name] for name in ("model", "temperature", "top_p"))
        responses, found = [], []
        for prompt in prompts:
            ids, reported = list(prompt), []
            while len(reported) < self.given["max_completion_length"] and ids[-1] != 1:
                z = model(input_ids=torch.tensor([ids])).logits[0, -1] / T
                p, order = z.softmax(-1).sort(descending=True)
                p = torch.zeros_like(p).scatter(0, order, p.masked_fill(p.cumsum(0) - p >= top_p, 0.0))
                p = p / p.sum()
                ids.append(int(torch.multinomial(p, 1)))
                reported.append([float(p[ids[-1]].log())])
            responses.append(ids[len(prompt) :])
            found.append(reported)
        return prompts, responses, found, None


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllms_processed_log_probs_agree(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    settings = {"use_vllm": True, "vllm_mode": mode, "top_p": 0.7, "temperature": 1.3}
    ours = run(make, **settings)
    difference = "sampling/sampling_logp_difference/max"
    assert logged(ours, difference)[0] < 1e-4
    assert logged(ours, "sampling/importance_sampling_ratio/min")[0] == pytest.approx(1, abs=1e-3)
    assert ours._masks.settings["rules"] == "vllm"
    theirs = run(make, **settings, g2rl_keep_sampling_mask=False)
    assert logged(theirs, difference)[0] > 0.05
    assert logged(theirs, "sampling/importance_sampling_ratio/min")[0] < 0.95


def rollout(masks: Callable[[list[int]], Any]) -> Callable[..., Any]:
    """Random responses of 3 to 5 tokens, the second one a tool's; masks: from a response to its lists."""

    def function(batch: list[str], trainer: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        lengths = [3 + row % 3 for row in range(len(batch))]
        ids = [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in batch],
            "completion_ids": ids,
            "logprobs": None,
            "env_mask": [[1, 0, *[1] * (n - 2)] for n in lengths],
            "sampling_mask": [masks(row) for row in ids],
        }

    return function


def neighbours(ids: list[int]) -> list[list[int]]:
    """What vLLM gives: rising ids; nothing for a tool's token."""
    return [[one - 1, one, 24] if place != 1 else [] for place, one in enumerate(ids)]


def test_a_samplers_own_masks_are_taken(make: Callable[..., Any]) -> None:
    trainer = run(make, top_k=3, rollout_func=rollout(neighbours), num_iterations=2)
    for row, ids in zip(trainer.batches[0][KEPT], trainer.batches[0]["completion_ids"].tolist()):
        lists = neighbours(ids[: len(row.whole)])
        assert row.ids.tolist() == [*chain(*lists)]
        assert row.offsets.diff().tolist() == [*map(len, lists)]
        assert row.whole.tolist() == [not one for one in lists]
    assert logged(trainer, "g2rl/masks_recomputed") == [0]
    assert logged(trainer, "g2rl/kept_ids") == [3]  # a tool's tokens do not count
    assert logged(trainer, "g2rl/whole_tokens") == [0]
    batch, model = trainer.batches[0], trainer.policies[0]
    kept = kept_sets(batch, 25)
    kept[:, 1] = True
    with torch.no_grad():
        expected = logprobs(model, batch, kept | (batch["completion_mask"] == 0)[..., None], 1.0)
    same_where(batch["completion_mask"], batch["old_per_token_logps"], expected)


def test_tokens_that_the_rules_leave_out_are_added_and_counted(make: Callable[..., Any]) -> None:
    trainer = run(make, top_k=3, rollout_func=rollout(lambda ids: None))
    batch, model = trainer.batches[0], trainer.policies[0]
    with torch.no_grad():
        kept = kept_by_transformers(model, batch, trainer.args)
    inside = kept.gather(2, batch["completion_ids"][..., None])[..., 0]
    own = batch["tool_mask"] * batch["completion_mask"] > 0
    expected = float((~inside)[own].float().mean())
    assert expected > 0.5
    assert logged(trainer, "g2rl/added_tokens") == [pytest.approx(expected)]
    assert logged(trainer, "g2rl/masks_recomputed") == [1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda ids: [[one] for one in ids[1:]], r"sampling_mask: response 0 has 2 lists, needs 3"),
        (lambda ids: [[one + 1] for one in ids], r"sampling_mask: list 0 of response 0 lacks its token"),
        (lambda ids: [[one, 25] for one in ids], r"sampling_mask: list 0 of response 0 has id 25, .* 24"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    make: Callable[..., Any], masks: Callable[[list[int]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(make, top_k=3, rollout_func=rollout(masks))


# --- off, resumed, refused ----------------------------------------------------------------------------------


def test_off_nothing_is_looked_for(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g2, "sampling_support", None)
    supports, theirs = [], g2.linear_logprobs
    monkeypatch.setattr(
        g2, "linear_logprobs", lambda *a, **k: (supports.append(k["support"]), theirs(*a, **k))[1]
    )
    trainer = run(make, top_p=0.7, beta=0.1, g2rl_keep_sampling_mask=False)
    assert supports
    assert {*supports} == {None}
    assert not any(key.startswith("g2rl/kept") for entry in trainer.state.log_history for key in entry)
    assert KEPT not in trainer.batches[0]
    assert_same_run(trained(make, g2rl_lam=0, top_p=0.7), trained(make, GRPOTrainer, top_p=0.7))


@pytest.mark.parametrize("algorithm", ["grpo", "gar", "setpo"])
def test_a_run_killed_and_resumed_gives_the_same_numbers(make: Callable[..., Any], algorithm: str) -> None:
    rows = prompts().add_column("solution", [f"{i % 3}+1=a" for i in range(16)])
    settings = {
        "top_p": 0.8,
        "g2rl_keep_sampling_mask": True,
        "g2rl_algorithm": algorithm,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "train_dataset": rows,
    }
    whole = trained(make, **settings)
    again = make(**settings)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for key in ("loss", "entropy", "g2rl/kept_ids", "g2rl/cos_mean"):
        assert logged(again, key) == logged(whole, key)
    assert all(torch.equal(weights(again)[name], weight) for name, weight in weights(whole).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 1.0}, "top_k=0, top_p=1.0 and min_p=None leave nothing out of sampling"),
        ({"g2rl_lam": 0}, "g2rl_lam=0 is GRPOTrainer.*g2rl_algorithm='grpo' is plain GRPO"),
        ({"g2rl_fused_logprobs": False}, "needs g2.linear_logprobs, as TRL's head knows"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 changes which ids sampling can draw"),
        ({"generation_kwargs": {"top_k": 5}}, r"generation_kwargs=\{'top_k': 5\} changes which ids"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "vllm_structured_outputs_regex='.*' changes which ids"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_named(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^g2rl_keep_sampling_mask=True: {message}"):
        make(**{"top_p": 0.8, "g2rl_keep_sampling_mask": True, **settings})


def test_a_mixture_of_experts_is_refused(make: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**sizes, **experts, vocab_size=25, head_dim=16, pad_token_id=0)
    given = {"model": Qwen3MoeForCausalLM(config), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match="load-balancing loss of a mixture of experts"):
        make(top_p=0.8, g2rl_keep_sampling_mask=True, router_aux_loss_coef=0.1, **given)
