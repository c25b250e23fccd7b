"""The model in G2RLTrainer: copied, pickled, unwrapped, compiled, called by a rollout_func."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

import transformers
from tiny_trl import G2RLTrainer, Watched, logged, lora, make_tokenizer
from torch import Tensor
from trl import GRPOTrainer

from g2rl_kernels.integrations.geometry_callback import GeometryCallback
from g2rl_kernels.integrations.trl_head import scoring_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])


def scored(model: Any) -> Tensor:
    """Log-probs by the call that TRL makes."""
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=mask, labels=IDS, fused_lm_head=True)
    return found.log_probs.float()


def own(model: Any) -> Tensor:
    """Log-probs by the logits of the model's class."""
    with torch.no_grad():
        z = type(model).forward(model, input_ids=IDS).logits[:, :-1].float()
    return z.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def assert_computes_with_its_own_weights(model: Any) -> None:
    expected = own(model)
    torch.testing.assert_close(scored(model), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def learned_positions() -> Any:
    """A tiny GPT-2, whose log-probs depend on where padding counts positions from."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=25, **sizes, **drops, **ends)
    return transformers.GPT2LMHeadModel(config)


def disturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- a model in one trainer after another ---------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("first", [G2RLTrainer, GRPOTrainer])
def test_a_second_trainer_measures_the_same_model(make: Callable[..., Any], first: type, bf16: bool) -> None:
    """TRL puts its forward before the first trainer's, and accelerate's autocast stays on the model."""
    trainer = make(first, num_iterations=2, bf16=bf16)
    trainer.train()
    second = make(Watched, model=trainer.model, num_iterations=2, temperature=0.6)
    second.train()
    for seen in second.seen:
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert trainer.model is second.model


def test_a_second_trainer_counts_positions(make: Callable[..., Any]) -> None:
    model = learned_positions()
    for _ in range(2):
        with pytest.warns(UserWarning, match="needs position_ids"):
            trainer = make(Watched, model=model, processing_class=make_tokenizer(), num_iterations=2)
        trainer.train()
        for seen in trainer.seen:
            torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["states", "forward"])
@pytest.mark.parametrize("second", [G2RLTrainer, GRPOTrainer])
def test_the_first_trainer_says_that_it_has_lost_the_model(
    make: Callable[..., Any], second: type, settings: dict[str, Any]
) -> None:
    """Its log-probs would be at the second one's temperature."""
    first = make(**settings)
    make(second, model=first.model, temperature=0.5)
    with pytest.raises(RuntimeError, match="another trainer was made of it since"):
        first.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_trains_again(make: Callable[..., Any], bf16: bool) -> None:
    trainer = make(Watched, max_steps=1, generation_kwargs={"repetition_penalty": 1.1}, bf16=bf16)
    for count in (1, 2):
        trainer.train()
        assert len(trainer.seen) == count
        assert scoring_of(trainer.model) is trainer._scoring


def test_the_callback_measures_in_a_second_trainer(make: Callable[..., Any]) -> None:
    model = None
    for _ in range(2):
        trainer = make(GRPOTrainer, **({"model": model} if model else {}))
        trainer.add_callback(GeometryCallback(trainer, every=1))
        trainer.train()
        assert len(logged(trainer, "g2rl/cos_mean")) == 2
        model = trainer.model


def test_a_copy_in_a_second_trainer_computes_with_its_own_weights(make: Callable[..., Any]) -> None:
    trainer = make()
    trainer.train()
    second = make(model=copy.deepcopy(trainer.model))
    assert_computes_with_its_own_weights(disturbed(second.model))


# --- copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"g2rl_fused_logprobs": False}], ids=str)
def test_a_copy_computes_with_its_own_weights(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    trainer = make(max_steps=1, **settings)
    before = scored(trainer.model)
    twin = disturbed(copy.deepcopy(trainer.model))
    assert_computes_with_its_own_weights(twin)
    assert (scored(twin) - before).abs().max() > 0.1
    assert torch.equal(scored(trainer.model), before)
    trainer.train()
    assert_computes_with_its_own_weights(disturbed(copy.deepcopy(trainer.model)))


def test_a_copy_generates(make: Callable[..., Any]) -> None:
    twin = disturbed(copy.deepcopy(make().model))
    fresh = type(twin)(twin.config)
    fresh.load_state_dict(twin.state_dict())
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(twin.generate(IDS, **settings), fresh.generate(IDS, **settings))


def test_a_copy_made_while_measuring_measures_nothing(make: Callable[..., Any]) -> None:
    trainer, copies = make(Watched, max_steps=1), []
    measure = trainer._measure

    def copying(*args: Any) -> Any:
        copies.append(copy.deepcopy(trainer.model))
        scored(copies[-1])
        return measure(*args)

    trainer._measure = copying
    trainer.train()
    assert len(copies) == 1
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)


def test_a_copy_holds_no_trainer(make: Callable[..., Any]) -> None:
    trainer = make()
    twin = copy.deepcopy(trainer.model)
    held = vars(twin)["_g2rl_scoring"]
    assert held is not vars(trainer.model)["_g2rl_scoring"]
    assert held.measure is None
    assert not any(value is trainer for value in vars(held).values())


def test_a_model_is_pickled_as_trls_is(make: Callable[..., Any]) -> None:
    for kind in (GRPOTrainer, G2RLTrainer):
        model = make(kind).model
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(own(again), own(model))
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_copy_with_positions_counts_them(make: Callable[..., Any], tmp_path: Any) -> None:
    learned_positions().save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.warns(UserWarning, match="needs position_ids"):
        trainer = make(model=str(tmp_path / "gpt2"), g2rl_lam=0)
    twin = disturbed(copy.deepcopy(trainer.model))
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (ids > 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found = twin(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, 3:]
    torch.testing.assert_close(found, own(twin), rtol=1e-4, atol=1e-5)


def test_the_callback_leaves_copies_alone(make: Callable[..., Any]) -> None:
    trainer = make(GRPOTrainer, max_steps=1)
    trainer.add_callback(GeometryCallback(trainer, every=1))
    trainer.train()
    assert logged(trainer, "g2rl/cos_mean")
    assert_computes_with_its_own_weights(disturbed(copy.deepcopy(trainer.model)))


# --- wrappers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("lam", [0.5, 0.0])
def test_unwrapped_after_bf16_training(make: Callable[..., Any], keep: bool, lam: float, peft: bool) -> None:
    settings = {"peft_config": lora()} if peft else {}
    trainer = make(bf16=True, max_steps=1, g2rl_lam=lam, **settings)
    trainer.train()
    expected = scored(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=keep)
    assert model is trainer.model
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert logits.isfinite().all()
    if lam > 0 or keep or peft:  # otherwise accelerate takes TRL's own forward away, too
        # Two units in the last place of a bfloat16 logit: one of the two rounds its logits.
        assert (scored(model) - expected).abs().max() < 2**-7 * expected.abs().max()
    assert model.generate(IDS, max_new_tokens=2, pad_token_id=0).shape[1] > IDS.shape[1]


def test_the_signature_is_the_models(make: Callable[..., Any]) -> None:
    model = make().model
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))


def test_a_compiled_model_trains_as_an_eager_one(make: Callable[..., Any]) -> None:
    settings = {"max_steps": 2, "learning_rate": 1e-3}
    compiled = make(Watched, torch_compile=True, torch_compile_backend="aot_eager", **settings)
    eager = make(Watched, **settings)
    for trainer in (compiled, eager):
        torch.manual_seed(0)
        trainer.train()
    for one, other in zip(compiled.seen, eager.seen):
        torch.testing.assert_close(one["features"], one["expected"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one["features"], other["features"], rtol=1e-3, atol=1e-4)
    for key in ("loss", "entropy", "g2rl/cos_mean"):
        assert logged(compiled, key) == pytest.approx(logged(eager, key), rel=1e-3, abs=1e-4), key


# --- forwards of a rollout_func -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"g2rl_fused_logprobs": False}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_forwards_of_a_rollout_func_are_its_own(
    make: Callable[..., Any], batched: bool, settings: dict[str, Any]
) -> None:
    iterations = []

    def rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
        iterations.append(trainer.num_iterations)
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in batch]
        draws = [torch.randint(3, 20, (4,), generator=generator).tolist() for _ in batch]
        other = torch.randint(3, 20, (len(batch), 7), generator=generator)  # it scores what it did not keep
        for rows in [other] if batched else other.split(1):
            trainer._get_per_token_logps_and_entropies(trainer.model, rows, torch.ones_like(rows), 4)
        return {"prompt_ids": ids, "completion_ids": draws, "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        iterations.append(trainer.num_iterations)
        return [float(i % 2) for i in range(len(completions))]

    trainer = make(Watched, rollout_func=rollout, reward_funcs=reward, max_steps=2, **settings)
    trainer.train()
    assert trainer.seen
    for seen in trainer.seen:
        assert len(seen["features"]) == 8
        torch.testing.assert_close(seen["features"], seen["expected"], rtol=1e-4, atol=1e-5)
    assert set(iterations) == {settings.get("num_iterations", 1)}
