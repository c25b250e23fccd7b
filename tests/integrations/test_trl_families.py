"""Both trainers, one step, on families whose head or backbone is unusual: tools/families.py."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from tool import load_tool

pytest.importorskip("trl", reason="needs TRL: pip install 'g2rl-kernels[trl]'")


@pytest.fixture(scope="module")
def families() -> ModuleType:
    return load_tool("families")


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("falcon_h1", "right"),  # lm_head_multiplier
        ("mllama", "fails: .* has no attribute 'last_hidden_state'"),  # the backbone has another name
        ("inkling2_text", "wrong by .* nats"),  # a softcap, and rows of W that are no tokens
    ],
    ids=["falcon_h1", "mllama", "inkling2_text"],
)
def test_both_trainers_score_what_the_model_says(families: ModuleType, family: str, own: str) -> None:
    if family not in families.FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    for trained in (families.ours, families.trl):
        assert families.verdict(lambda trained=trained: trained(families.build(family))) == "right"
    assert re.fullmatch(own, families.verdict(lambda: families.own_head(families.build(family))))


def test_both_trainers_refuse_a_model_that_ignores_the_mask(families: ModuleType) -> None:
    for trained in (families.ours, families.trl):
        found = families.verdict(lambda trained=trained: trained(families.build("rwkv")))
        assert found == "refused: ignores the mask"
