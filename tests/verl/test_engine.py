"""Features from verl's real FSDP engine, on one rank here and on two under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import Rows, infer, make_engine, save_model, stacked
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Qwen3ForCausalLM

from g2rl_kernels.errors import TrainerError
from g2rl_kernels.head import reference
from g2rl_kernels.head.spec import HeadSpec, Responses
from g2rl_kernels.integrations.verl.engine import FEATURES, KEYS, MASKS, REQUEST, SAMPLING, SECONDS

ROWS = Rows()
ALL = list(range(len(ROWS.ids)))


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return save_model(path, tie_word_embeddings=request.param == "tied")


def test_the_tied_head_is_in_the_root_and_the_untied_one_a_unit_of_its_own(model):
    engine = make_engine(model)
    assert isinstance(engine.module.lm_head, FSDPModule) == ("untied" in str(model))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("strategy", "temperature"), [("fsdp2", 1.0), ("fsdp2", 0.7), ("fsdp", 0.7)])
def test_features_are_those_of_the_reference(model, packed, strategy, temperature):
    engine = make_engine(model, packed=packed, strategy=strategy)
    options = {REQUEST: True, "use_remove_padding": packed, "temperature": temperature}
    out = infer(engine, ROWS.batch(ALL, **options))
    check(stacked(out[FEATURES]), ROWS.features(model, temperature))
    assert (stacked(out[SECONDS]) > 0).all()
    keys = stacked(out[KEYS])[:, 0].tolist()
    assert len({*keys}) == len(keys) == len(ALL)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_features_over_the_ids_that_sampling_kept(model, packed):
    engine = make_engine(model, packed=packed)
    sampling = {"top_k": 4, "top_p": 1.0, "rules": "vllm", "logits_dtype": None}
    options = {REQUEST: True, SAMPLING: sampling, "use_remove_padding": packed, "temperature": 0.7}
    out = infer(engine, ROWS.batch(ALL, **options))
    expected = ROWS.features(model, 0.7, top_k=4)
    check(stacked(out[FEATURES]), expected)
    assert (expected - ROWS.features(model, 0.7)).norm(dim=1)[0] > 0.01
    kept, whole, added, tokens = stacked(out[MASKS]).T
    assert tokens.tolist() == [int(mask.sum()) for mask in ROWS.masks]
    assert torch.equal(kept, 4 * tokens + added)  # most of these tokens are random ones
    assert added.sum() > 0.5 * tokens.sum()
    assert not whole.any()
    plain = infer(engine, ROWS.batch(ALL, **{**options, SAMPLING: None}))
    assert MASKS not in plain
    assert torch.equal(plain["log_probs"].values(), out["log_probs"].values())  # verl's own head gives them


def check(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert expected[3].abs().max() == 0 < expected[[0, 1, 2, 4, 5]].abs().amax(1).min()
    error = (ours - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-3)
    assert error.max() < 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_in_bfloat16_features_are_exact_for_the_hidden_states_that_the_engine_had(model, packed):
    engine = make_engine(model, packed=packed, dtype="bf16")
    seen = []
    hook = engine.module.model.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    rows = [4, 1]
    data = ROWS.batch(rows, **{REQUEST: True, "use_remove_padding": packed})
    ours = stacked(infer(engine, data)[FEATURES])
    hook.remove()
    (hidden,) = seen
    assert hidden.dtype == torch.bfloat16
    lengths = [len(ROWS.ids[row]) for row in rows]
    split = hidden[0].split(lengths) if packed else [row[:n] for row, n in zip(hidden, lengths)]
    weight = engine.module.lm_head.weight.full_tensor().bfloat16().double()
    for feature, states, row in zip(ours, split, rows):
        ids, mask = ROWS.ids[row], ROWS.masks[row].bool()
        start = len(ids) - len(mask)
        states = states[start - 1 : -1][mask].double()
        cu_seqlens = torch.tensor([0, len(states)])
        ((expected,), *_) = reference.head_features(
            states, ids[start:][mask], HeadSpec(weight), Responses(cu_seqlens)
        )
        assert (feature - expected).norm() < 1e-5 * expected.norm()


def test_rows_come_back_in_order_from_micro_batches_by_tokens(model):
    engine = make_engine(model)
    options = {REQUEST: True, "use_dynamic_bsz": True, "max_token_len_per_gpu": 20}
    ours = stacked(infer(engine, ROWS.batch(ALL, **options))[FEATURES])
    check(ours, ROWS.features(model))


def test_a_batch_in_another_order_gives_the_same_rows(model):
    engine, order = make_engine(model), [5, 3, 0, 4, 2, 1]
    ours = stacked(infer(engine, ROWS.batch(order, **{REQUEST: True}))[FEATURES])
    check(ours[torch.tensor(order).argsort()], ROWS.features(model))


def test_without_a_request_nothing_changes_and_nothing_is_left_behind(model):
    engine = make_engine(model)
    plain = infer(engine, ROWS.batch(ALL))
    asked = infer(engine, ROWS.batch(ALL, **{REQUEST: True}))
    again = infer(engine, ROWS.batch(ALL))
    assert plain.keys() == again.keys() == asked.keys() - {FEATURES, KEYS, SECONDS}
    for key in plain:
        assert torch.equal(plain[key].values(), asked[key].values())
        assert torch.equal(plain[key].values(), again[key].values())
    ours = [
        hook for m in engine.module.modules() for hook in m._forward_hooks.values() if "g2rl" in repr(hook)
    ]
    assert not ours
    check_sharded(engine)


def check_sharded(engine) -> None:
    """Every unit is sharded again but for the root, which FSDP2 keeps gathered after a forward."""
    units = [m for m in engine.module.modules() if isinstance(m, FSDPModule) and m is not engine.module]
    assert len(units) >= 2
    for unit in units:
        (group,) = unit._get_fsdp_state()._fsdp_param_groups
        assert group.is_sharded, unit


def test_the_update_after_a_measurement_is_that_without_one(model):
    losses, weights = [], []
    for request in ({}, {REQUEST: True}):
        engine = make_engine(model)
        infer(engine, ROWS.batch(ALL, **request))
        with engine.train_mode():
            data = ROWS.batch(ALL)
            out = engine.train_batch(data, loss_function=loss)
        losses.append(out["loss"])
        weights.append(engine.module.lm_head.weight.full_tensor())
    assert losses[0] == losses[1]
    assert torch.equal(*weights)


def loss(model_output: dict, data: object, dp_group: object = None) -> tuple[Tensor, dict]:
    return -model_output["log_probs"].values().mean(), {}


def test_with_verls_fused_kernels_which_form_no_logits_either(model, monkeypatch):
    """Under FSDP2 they cannot train an untied head, with or without us; the head is left as it was found."""
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)  # verl replaces the class's
    options = {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "torch"}}
    engine = make_engine(model, **options)
    data = ROWS.batch(ALL, **{REQUEST: True, "use_fused_kernels": True})
    check(stacked(infer(engine, data)[FEATURES]), ROWS.features(model))
    check_sharded(engine)


@pytest.mark.parametrize("targets", [{}, {"target_modules": ["lm_head", "q_proj"]}], ids=["backbone", "head"])
def test_with_lora_features_are_those_of_the_adapted_model(model, targets):
    """The first measurement of an engine compares its logits with the model's own."""
    if targets and "untied" in model.name:  # verl wraps such a head by itself, and fails
        with pytest.raises(TypeError, match="object layout differs"):
            make_engine(model, lora_rank=4, lora_alpha=8, **targets)
        return
    engine = make_engine(model, lora_rank=4, lora_alpha=8, **targets)
    plain = stacked(infer(engine, ROWS.batch(ALL, **{REQUEST: True}))[FEATURES])
    check(plain, ROWS.features(model))  # a new adapter changes nothing
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    adapted = infer(engine, ROWS.batch(ALL, **{REQUEST: True}))
    assert (stacked(adapted[FEATURES]) - plain).norm() > 0.1 * plain.norm()
    with engine.disable_adapter():  # as for the reference model's log-probs
        again = stacked(infer(engine, ROWS.batch(ALL, **{REQUEST: True}))[FEATURES])
    check(again, ROWS.features(model))


def test_a_head_that_does_something_unknown_is_refused(model):
    engine = make_engine(model)
    inner = engine.module.lm_head.forward
    engine.module.lm_head.forward = lambda hidden: 2 * inner(hidden)
    with pytest.raises(TrainerError, match="something unknown between hidden states and logits"):
        infer(engine, ROWS.batch(ALL, **{REQUEST: True}))


def test_two_ranks(model, tmp_path):
    """Two data-parallel ranks, and one sequence cut in two: tests/verl/two_ranks.py compares."""
    script = Path(__file__).with_name("two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess.run([*launch, model], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("same as the reference") == (10 if "untied" not in str(model) else 8)
