"""g2rl_keep_sampling_mask and the model's own generation_config, which gives what TRL leaves unset."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")

from masked_runs import Recorded, kept_by_transformers, kept_sets
from tiny import make_model
from tiny_trl import logged, make_tokenizer
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # how TRL calls transformers


def with_generation(path: Path, **settings: Any) -> str:
    """A model whose generation_config.json has these settings; the config's own check has them valid."""
    model = make_model()
    model.generation_config.update(do_sample=True, **settings)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("paged", [False, True], ids=["generate", "continuous batching"])
@pytest.mark.parametrize(
    ("of_model", "of_args"),
    [({"min_p": 0.3}, {"top_p": 0.95}), ({"top_k": 3}, {"top_k": None, "top_p": 0.95})],
    ids=["min_p", "top_k"],
)
def test_what_trl_leaves_unset_is_the_models_own(
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_model: dict[str, Any],
    of_args: dict[str, Any],
    paged: bool,
) -> None:
    """generate() takes it from the model's generation_config; continuous batching leaves it out."""
    model = with_generation(tmp_path / "model", **of_model)
    seen, theirs = [], torch.multinomial

    def watched(p: Tensor, *others: Any, **keywords: Any) -> Tensor:
        seen.append((p > 0).sum(-1).flatten())
        return theirs(p, *others, **keywords)

    trainer = make(
        Recorded,
        model=model,
        g2rl_keep_sampling_mask=True,
        use_transformers_continuous_batching=paged,
        max_steps=1,
        **of_args,
    )
    monkeypatch.setattr(torch, "multinomial", watched)
    trainer.train()
    monkeypatch.undo()
    batch = trainer.batches[0]
    mask = batch["completion_mask"] > 0
    found = kept_sets(batch, 25).sum(2)[mask].float().mean()
    args = copy.copy(trainer.args)
    vars(args).update({} if paged else of_model)
    with torch.no_grad():
        expected = kept_by_transformers(trainer.policies[0], batch, args).sum(2)[mask].float().mean()
    assert found == expected
    if not paged:  # one call a token
        assert torch.equal(kept_sets(batch, 25).sum(2)[mask], torch.stack(seen, 1)[mask])
    assert logged(trainer, "g2rl/added_tokens")[0] == 0


@pytest.mark.parametrize(
    "settings", [{"typical_p": 0.5}, {"suppress_tokens": [5, 6]}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_settings_of_the_model_that_move_logits_are_named(
    make: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = with_generation(tmp_path / "model", **settings)
    (name,) = settings
    said = rf"generate\(\) samples with {name}=.*: set model\.generation_config\.{name} = None"
    with pytest.raises(ValueError, match=f"^g2rl_keep_sampling_mask=True: {said}"):
        make(model=model, g2rl_keep_sampling_mask=True, top_p=0.9)
    with pytest.warns(UserWarning, match=f"^model.generation_config has {name}=.*by which generate"):
        make(model=model, top_p=0.9)


def test_truncation_of_the_model_is_warned_of(make: Callable[..., Any], tmp_path: Path) -> None:
    """Where GRPOConfig leaves it unset, and generate() takes it."""
    model = with_generation(tmp_path / "model", min_p=0.3, top_k=3, top_p=0.5, temperature=0.6)
    with pytest.warns(UserWarning, match="^model.generation_config has min_p=0.3, by which"):
        make(model=model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model.generation_config has")
        make(model=model, min_p=0.0)
        make(model=model, use_transformers_continuous_batching=True)
