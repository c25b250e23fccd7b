"""Start-up checks in TRL: log-probs are the model's, or training is refused; GeometryCallback's too."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

import peft
import transformers
from datasets import Dataset
from tiny_trl import G2RLTrainer, Watched, logged, make_model, make_tokenizer, weights
from torch import Tensor
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from g2rl_kernels.errors import RewardError, TrainerError
from g2rl_kernels.integrations.geometry_callback import GeometryCallback
from g2rl_kernels.integrations.trl_head import runs_here
from g2rl_kernels.trainer.startup import make_probe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers

SIZES: dict[str, Any] = {
    "vocab_size": 25,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
GPT |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)  # TRL trains with dropout


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """save(class, settings): a tiny model of this class on disk, whose logits matter."""

    def save(kind: str, **settings: Any) -> str:
        torch.manual_seed(0)
        config = getattr(transformers, kind).config_class(**{**SIZES, **settings})
        model = getattr(transformers, kind)(config)
        if kind == "RecurrentGemmaForCausalLM":  # its softcap, 30, moves only logits that are large
            model.get_input_embeddings().weight.data.mul_(40)
        model.save_pretrained(tmp_path / kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


@torch.no_grad()
def own(model: Any, probe: Any) -> Tensor:
    """Log-probs of each row alone, as the model's documentation says to compute them."""
    model.eval()
    found = []
    for ids, attention, mask in zip(probe.ids, probe.attention, probe.mask):
        seen, count = ids[attention.bool()], int(mask.sum())
        z = model(seen[None]).logits[0, -count - 1 : -1].log_softmax(-1)
        found.append(z.gather(1, seen[-count:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def trained_on(trainer: Any, probe: Any, model: Any = None) -> Tensor:
    """The log-probs that TRL's loss would see."""
    model = trainer.model if model is None else model
    length = probe.mask.shape[1]
    return trainer._get_per_token_logps_and_entropies(model, probe.ids, probe.attention, length)[0][
        probe.mask
    ]


@pytest.mark.parametrize("settings", [{}, {"g2rl_fused_logprobs": False}, {"g2rl_lam": 0}], ids=str)
def test_learned_positions_are_passed(
    make: Callable[..., Any], save: Callable[..., str], settings: dict[str, Any]
) -> None:
    path = save("GPT2LMHeadModel", **GPT)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel needs position_ids.*TRL passes none"):
        trainer = make(model=path, beta=0.1, **settings)
    probe = make_probe(trainer.model, 0)
    expected = own(trainer.model, probe)
    torch.testing.assert_close(trained_on(trainer, probe), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained_on(trainer, probe, trainer.ref_model), expected, rtol=0, atol=1e-5)
    theirs = make(GRPOTrainer, model=path)
    assert (trained_on(theirs, probe) - expected).abs().max() > 0.5  # why
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


def test_positions_that_matter_little_are_passed_under_autocast(
    make: Callable[..., Any], save: Callable[..., str]
) -> None:
    path = save("GPT2LMHeadModel", **GPT)
    model = transformers.GPT2LMHeadModel.from_pretrained(path)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(0.02)
    model.save_pretrained(path)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel needs position_ids"):
        trainer = make(model=path, bf16=True)
    assert "autocast" not in vars(trainer.accelerator)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel needs position_ids"):
        make(model=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert GeometryCallback(make(GRPOTrainer, model=path, bf16=True)).ours.positions


def test_features_of_learned_positions(make: Callable[..., Any], save: Callable[..., str]) -> None:
    with pytest.warns(UserWarning, match="needs position_ids"):
        trainer = make(Watched, model=save("GPT2LMHeadModel", **GPT), max_steps=1)
    trainer.train()
    torch.testing.assert_close(trainer.seen[0]["features"], trainer.seen[0]["expected"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("RecurrentGemmaForCausalLM", {"num_hidden_layers": 3}),
        ("ModernBertDecoderForCausalLM", {"max_position_embeddings": 64}),
    ],
)
@pytest.mark.parametrize("lam", [0.5, 0.0])
def test_families_whose_head_trl_does_not_know_are_refused(
    make: Callable[..., Any], save: Callable[..., str], kind: str, settings: dict[str, Any], lam: float
) -> None:
    path = save(kind, **settings)
    theirs = make(GRPOTrainer, model=path)
    probe = make_probe(theirs.model, 0)
    assert (trained_on(theirs, probe) - own(theirs.model, probe)).abs().max() > 1  # what TRL trains on
    if kind == "RecurrentGemmaForCausalLM" and lam > 0:  # `find_head` knows its softcap, TRL's head does not
        ours = make(model=path, g2rl_lam=lam)
        torch.testing.assert_close(trained_on(ours, probe), own(ours.model, probe), rtol=0, atol=1e-4)
        return
    with pytest.raises(TrainerError, match=rf"{kind}.* between (its )?hidden states and logits"):
        make(model=path, g2rl_lam=lam)


@pytest.mark.parametrize("lam", [0.5, 0.0])
def test_a_family_that_ignores_the_mask_is_refused(
    make: Callable[..., Any], save: Callable[..., str], lam: float
) -> None:
    path = save("RwkvForCausalLM")
    with pytest.raises(TrainerError, match="RwkvForCausalLM: it ignores attention_mask"):
        make(model=path, g2rl_lam=lam)


@pytest.mark.parametrize("lam", [0.5, 0.0])
def test_infinite_logits_are_seen_by_trainer_and_callback(make: Callable[..., Any], lam: float) -> None:
    def masked() -> Any:
        model = make_model()
        forward = model.forward

        @functools.wraps(forward)
        def excluding(*args: Any, **inputs: Any) -> Any:
            out = forward(*args, **inputs)
            out.logits[..., 3:9] = -torch.inf
            return out

        model.forward = excluding
        return model

    given = {"model": masked(), "processing_class": make_tokenizer()}
    masks = r"masks 6 entries of its vocabulary \(ids 3, 4, 5"
    unfused = "unknown happens between its hidden states and logits"
    with pytest.raises(TrainerError, match=masks if lam else unfused):
        make(g2rl_lam=lam, **given)
    trainer = make(GRPOTrainer, **{**given, "model": masked()})
    with pytest.raises(TrainerError, match=masks):
        GeometryCallback(trainer)


def test_padding_without_embedding_is_named(make: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(TrainerError, match="processing_class: its padding has the token '<new>', number 25"):
        make(processing_class=tokenizer)


def test_positions_that_do_not_matter_are_not_passed(make: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours, theirs = make(g2rl_lam=0), make(GRPOTrainer)
    probe = make_probe(ours.model, 0)
    assert torch.equal(trained_on(ours, probe), trained_on(theirs, probe))


@pytest.mark.parametrize(
    ("attention", "device", "main", "runs"),
    [
        ("sdpa", "cuda", True, True),
        ("flash_attention_2", "cuda", True, False),  # under FSDP the weights are on the CPU yet
        ("flash_attention_2", "cpu", True, True),
        ("sdpa", "cpu", False, False),
    ],
)
def test_where_a_model_can_run_before_training(attention: str, device: str, main: bool, runs: bool) -> None:
    model = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=attention), device=torch.device("cpu")
    )
    accelerator = SimpleNamespace(is_local_main_process=main, device=torch.device(device))
    assert runs_here(accelerator, model) == runs


# --- learned prompts ------------------------------------------------------------------------------------


def test_prefix_tuning_is_right_with_positions(make: Callable[..., Any]) -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.warns(UserWarning, match="needs position_ids"):
        trainer = make(peft_config=prefix)
    probe = make_probe(trainer.model, 0)
    expected = own(trainer.model, probe)
    torch.testing.assert_close(trained_on(trainer, probe), expected, rtol=0, atol=1e-5)
    theirs = make(GRPOTrainer, peft_config=prefix)
    assert (trained_on(theirs, probe) - own(theirs.model, probe)).abs().max() > 1
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(trainer).items())


@pytest.mark.parametrize(
    "learned",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ],
    ids=lambda learned: learned.peft_type.value,
)
def test_prompt_tuning_samples_another_distribution_and_is_refused(
    make: Callable[..., Any], learned: Any
) -> None:
    with pytest.raises(TrainerError, match=r"Qwen3ForCausalLM with P[A-Z_]*: after padding.*use LoRA"):
        make(peft_config=learned)


# --- prompts, weights, checkpoints ----------------------------------------------------------------------


def test_a_prompt_token_without_embedding_is_named(make: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = Dataset.from_dict({"prompt": ["abc<new>="] * 16})
    trainer = make(processing_class=tokenizer, train_dataset=rows)
    said = "prompt 'abc<new>=' has the token '<new>', number 25, but the model embeds 25 tokens"
    with pytest.raises(TrainerError, match=said):
        trainer.train()


def test_bfloat16_weights_that_will_not_move_are_counted(make: Callable[..., Any]) -> None:
    settings = {"model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-6}
    with pytest.warns(
        UserWarning, match=r"an update of lr=1e-06 is rounded away in (9\d|100)% of.*bf16=True"
    ):
        make(**settings)


class Repacking(torch.nn.Linear):
    """Changes its weight in evaluation mode, for good, as a 4-bit layer of bitsandbytes does on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.weight.data = self.weight.data.flip(0).flip(0) + 1e-7
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_checks_leave_weights_and_modes_as_they_were(make: Callable[..., Any], training: bool) -> None:
    model = make_model()
    for layer in model.model.layers:
        packed = Repacking(32, 48, bias=False)
        packed.weight = layer.mlp.gate_proj.weight
        layer.mlp.gate_proj = packed
    model.train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make(model=model, processing_class=make_tokenizer())
    assert [module.training for module in trainer.model.modules()] == modes
    GeometryCallback(make(GRPOTrainer, model=model, processing_class=make_tokenizer()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"num_iterations": 2}, 2),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, 2),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, 1),
        ({}, 1),
    ],
    ids=str,
)
def test_save_steps_between_generations_are_told_and_the_rule_is_trls(
    make: Callable[..., Any], tmp_path: Path, settings: dict[str, Any], needed: int
) -> None:
    keys = {"save_strategy": "steps", "per_device_train_batch_size": 4, "max_steps": 4, **settings}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = make(save_steps=1, **keys)
    said = [str(one.message) for one in told if "save_steps=1" in str(one.message)]
    assert len(said) == (needed > 1)
    assert all(f"set save_steps to a multiple of {needed}" in text for text in said)
    trainer.train()
    kept = logged(trainer, "loss")
    for step in (1, 2):
        again = make(**{**keys, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{step}"))
        assert (logged(again, "loss")[-4 + step :] == kept[step:]) == (step % needed == 0)


# --- GeometryCallback -----------------------------------------------------------------------------------


def sft(path: str, tmp_path: Path, **settings: Any) -> Any:
    rows = Dataset.from_list([{"text": f"abc+{i % 7}={i % 10}"} for i in range(8)])
    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    options |= {"gradient_checkpointing": False, "disable_tqdm": True, "max_steps": 1, **settings}
    return SFTTrainer(path, SFTConfig(str(tmp_path / "sft"), **options), train_dataset=rows)


@pytest.mark.parametrize("trainer", [GRPOTrainer, G2RLTrainer])
def test_the_callback_measures_learned_positions(
    make: Callable[..., Any], save: Callable[..., str], trainer: type
) -> None:
    settings = {"g2rl_lam": 0} if trainer is G2RLTrainer else {}
    path = save("GPT2LMHeadModel", **GPT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = make(trainer, model=path, max_steps=1, **settings)
    callback = GeometryCallback(made)
    assert callback.ours.positions
    probe = make_probe(made.model, 0)
    with callback._measuring():
        torch.testing.assert_close(trained_on(made, probe), own(made.model, probe), rtol=0, atol=1e-5)
    made.add_callback(callback)
    made.train()
    assert logged(made, "g2rl/cos_mean")


def test_the_callback_refuses_models_that_it_would_measure_wrongly(
    make: Callable[..., Any], save: Callable[..., str], tmp_path: Path
) -> None:
    path = save("RwkvForCausalLM")
    with pytest.raises(TrainerError, match="it ignores attention_mask"):
        GeometryCallback(sft(path, tmp_path), prompts=["1+1="])
    with pytest.raises(TrainerError, match="it ignores attention_mask"):
        GeometryCallback(make(GRPOTrainer, model=path))


def test_the_callback_names_prompts_that_the_model_cannot_take(
    make: Callable[..., Any], model_dir: str, tmp_path: Path
) -> None:
    trainer = sft(model_dir, tmp_path)
    with pytest.raises(
        TrainerError, match=r"prompts: 'aaa.*\(60 tokens\) \+ max_new_tokens = 69: the model has 64"
    ):
        GeometryCallback(trainer, prompts=["1+1=", "a" * 60], max_new_tokens=9)
    trainer.processing_class.add_tokens(["<new>"])
    with pytest.raises(TrainerError, match="prompts: 'a<new>' has the token '<new>', number 25"):
        GeometryCallback(trainer, prompts=["a<new>"], max_new_tokens=9)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "returned 1 rewards for 8 completions"),
        ([1.0, 0.0, 1.0], "returned 3 rewards for 8 completions"),
        (1.0, "returned 1.0, needs a list of 8 numbers or None"),
        ("11111111", "returned '11111111', needs a list of 8"),
        (["1"] * 8, "returned '1' for a completion, needs a finite number or None"),
        ([float("inf")] * 8, "returned inf for a completion"),
        ([[1.0]] * 8, r"returned \[1.0\] for a completion"),
    ],
    ids=str,
)
def test_the_callback_refuses_rewards_that_do_not_fit(
    model_dir: str, tmp_path: Path, returned: Any, said: str
) -> None:
    trainer = sft(model_dir, tmp_path)
    given = {"num_generations": 4, "max_new_tokens": 3, "reward_func": lambda **_: returned}
    trainer.add_callback(GeometryCallback(trainer, prompts=["1+1=", "2="], **given))
    with pytest.raises(RewardError, match=f"^reward_func: {said}"):
        trainer.train()


@pytest.mark.parametrize(
    "returned",
    [[1, None, 0.0, True] * 2, torch.tensor([1.0, 0.0] * 4), [torch.tensor(1.0), None] * 4],
    ids=str,
)
def test_the_callback_takes_numbers_and_none(model_dir: str, tmp_path: Path, returned: Any) -> None:
    trainer = sft(model_dir, tmp_path)
    given = {"num_generations": 4, "max_new_tokens": 3, "reward_func": lambda **_: returned}
    trainer.add_callback(GeometryCallback(trainer, prompts=["1+1=", "2="], **given))
    trainer.train()
    known = [float(score) for score in returned if score is not None]
    assert logged(trainer, "g2rl/accuracy")[0] == pytest.approx(sum(known) / len(known), abs=0.26)
