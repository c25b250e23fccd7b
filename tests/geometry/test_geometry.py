"""Statistics of groups: against plain numpy in float64, and cases with known results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'g2rl-kernels[train]'")

from examples import given, st
from tiny import make_model, make_tokenizer, make_trainer

import g2rl_kernels as g2
from g2rl_kernels.geometry.measure import (
    difference,
    effective_rank,
    group_statistics,
    measure,
    most,
    overall,
)
from g2rl_kernels.geometry.rows import STATISTICS
from g2rl_kernels.group.metrics import describe
from g2rl_kernels.models.lm_head import find_head


def by_numpy(features: np.ndarray) -> dict[str, Any]:
    """The statistics of one group without zero rows."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(unit)) for j in range(i + 1, len(unit))]
    cosines = [float(unit[i] @ unit[j]) for i, j in pairs]
    shares = np.linalg.svd(unit, compute_uv=False) ** 2
    shares = shares[shares > 1e-12] / shares.sum()
    return {
        "cos_mean": np.mean(cosines) if pairs else None,
        "negative_pairs": np.mean([c < 0 for c in cosines]) if pairs else None,
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
    }


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**30))
def test_ragged_groups_against_numpy(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(len(sizes)) + 7, sizes))  # interleaved
    features = rng.standard_normal((len(ids), 6)) + rng.standard_normal(6)
    features[rng.random(len(ids)) < 0.2] = 0
    features[rng.random(len(ids)) < 0.1] = np.nan
    found = group_statistics(torch.tensor(features), group_ids=torch.tensor(ids))
    assert len(found) == len(sizes)
    for group, ours in zip(dict.fromkeys(ids.tolist()), found):
        rows = features[ids == group]
        there = np.nan_to_num(np.linalg.norm(rows, axis=1)) > 0
        assert ours["responses"] == len(rows)
        assert ours["measured"] == there.nonzero()[0].tolist()
        theirs = by_numpy(rows[there]) if there.any() else dict.fromkeys(("cos_mean", "effective_rank"))
        for name, value in theirs.items():
            assert ours[name] == (None if value is None else pytest.approx(value, abs=2e-4)), name


def test_identical_orthogonal_and_opposed_features() -> None:
    same, orthogonal = torch.tensor([[3.0, 4.0]]).expand(4, 2), 5 * torch.eye(4)
    (one,), (four,) = group_statistics(same, group_size=4), group_statistics(orthogonal, group_size=4)
    assert one["cos_mean"] == pytest.approx(1, abs=1e-5)
    assert one["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert four["cos_mean"] == 0
    assert four["effective_rank"] == pytest.approx(4)
    assert one["negative_pairs"] == four["negative_pairs"] == 0
    (opposed,) = group_statistics(torch.tensor([[1.0, 0], [2, 0], [-1, 0]]), group_size=3)
    assert opposed["cos_mean"] == pytest.approx(-1 / 3, abs=1e-5)
    assert opposed["negative_pairs"] == pytest.approx(2 / 3)
    assert opposed["effective_rank"] == pytest.approx(1, abs=1e-6)  # one line, both ways
    half = torch.tensor([[1.0, 0.5], [0.5, 1.0]])  # eigenvalues 3/2 and 1/2
    assert effective_rank(half) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_a_group_of_one_and_of_none() -> None:
    (alone, nobody) = group_statistics(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), group_ids=torch.tensor([5, 2]))
    assert alone["effective_rank"] == pytest.approx(1)
    assert [alone[name] for name in ("cos_mean", "negative_pairs", "redundant", "opposed")] == [None] * 4
    assert nobody["measured"] == []
    assert nobody["effective_rank"] is None
    assert group_statistics(torch.ones(1, 2), group_ids=torch.tensor([-1])) == []


def test_answers_scores_entropy_and_length() -> None:
    (found,) = group_statistics(
        torch.eye(5),
        group_size=5,
        scores=[1, 1, 0, 0.5, 1],
        answers=["8", "8", "7", None, "16/2"],
        entropy=torch.tensor([2.0, 1.0, 0.0, 4.0, 1.0]),
        lengths=torch.tensor([4, 1, 0, 10, 1]),
    )
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["distinct_answers"] == 3
    assert found["distinct_right"] == 2
    assert found["entropy"] == pytest.approx(8 / 16)  # a token, not a response, is what counts
    assert found["length"] == pytest.approx(16 / 5)
    assert found["semantic_cosine"] is None


def test_entropy_is_that_of_responses_where_it_is_finite() -> None:
    entropy, lengths = torch.tensor([2.0, torch.nan, 4.0, torch.inf]), torch.tensor([1, 5, 3, 5])
    (found,) = group_statistics(torch.eye(4), group_size=4, entropy=entropy, lengths=lengths)
    assert found["entropy"] == pytest.approx(6 / 4)
    assert found["length"] == pytest.approx(14 / 4)
    (found,) = group_statistics(
        torch.eye(4), group_size=4, entropy=torch.full((4,), torch.nan), lengths=lengths
    )
    assert found["entropy"] is None
    assert overall([found])["entropy"] is None


@pytest.mark.parametrize("scale", [1e6, 1e-3, 1e-6, 1e-9])
def test_cosines_do_not_depend_on_the_length_of_features(scale: float) -> None:
    torch.manual_seed(3)
    features = torch.randn(1, 8) + 0.1 * torch.randn(4, 8)
    (plain,), (scaled,) = (
        group_statistics(features, group_size=4),
        group_statistics(scale * features, group_size=4),
    )
    assert plain["cos_mean"] > 0.9
    for name in ("cos_mean", "effective_rank"):
        assert scaled[name] == pytest.approx(plain[name], abs=1e-5)


def test_the_most_telling_pairs_are_of_different_texts() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0.1], [0, 0], [-1, 0.5]])
    vectors = torch.nn.functional.normalize(torch.arange(10.0).view(5, 2) + 1)
    (found,) = group_statistics(features, group_size=5, texts=["a", "a", "b", "c", "d"], embeddings=vectors)
    assert found["redundant"]["samples"] == [0, 2]
    assert found["redundant"]["cosine"] == pytest.approx(1 / np.sqrt(1.01), abs=1e-5)
    assert found["redundant"]["semantic"] == pytest.approx((vectors[0] @ vectors[2]).item(), abs=1e-6)
    assert found["opposed"]["samples"] == [0, 4]
    kept = vectors[[0, 1, 2, 4]]
    expected = np.mean([(kept[i] @ kept[j]).item() for i in range(4) for j in range(i)])
    assert found["semantic_cosine"] == pytest.approx(expected)
    (alike,) = group_statistics(torch.eye(2), group_size=2, texts=["a", "a"])
    assert alike["redundant"] is alike["opposed"] is None


def test_overall_is_the_mean_over_problems() -> None:
    torch.manual_seed(0)
    features, rewards = torch.randn(24, 5) + 0.4, torch.randint(2, (24,)).float()
    problems = group_statistics(features, group_size=4, scores=rewards.tolist())
    found = overall(problems)
    assert found.keys() == STATISTICS.keys()
    for name in ("cos_mean", "negative_pairs", "effective_rank", "accuracy"):
        values = [problem[name] for problem in problems]
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]
        assert found[name]["problems"] == 6
    assert found["semantic_cosine"] is None
    words = describe(
        g2.group_geometry(features, 2 * rewards - 1, group_size=4), 2 * rewards - 1
    )  # over pairs
    for name in ("cos_mean", "negative_pairs", "accuracy"):  # groups of one size: the same
        assert found[name]["mean"] == pytest.approx(words[name], abs=1e-6), name
    single = overall(problems[:1])["cos_mean"]
    assert (single["low"], single["high"]) == (None, None)

    top, bottom = most("redundant", problems), most("opposed", problems)
    cosines = [np.array(problem["cosine"])[np.triu_indices(4, 1)] for problem in problems]
    assert top == int(np.argmax([c.max() for c in cosines]))
    assert bottom == int(np.argmin([c.min() for c in cosines]))
    assert most("opposed", []) is None


def test_differences_are_paired_by_problem() -> None:
    torch.manual_seed(1)
    one, other = (group_statistics(torch.randn(20, 5), group_size=4) for _ in range(2))
    for place in range(5):
        one[place]["problem"], other[place]["problem"] = f"p{place}", f"p{4 - place}"
    del other[0]  # p4
    found = difference(one, other)["cos_mean"]
    pairs = [(one[place], other[3 - place]) for place in range(4)]
    assert found["mean"] == pytest.approx(np.mean([a["cos_mean"] - b["cos_mean"] for a, b in pairs]))
    assert found["problems"] == 4
    same = difference(one, one)["cos_mean"]
    assert (same["mean"], same["low"], same["high"]) == (0, 0, 0)
    assert difference(one, [])["cos_mean"] is None
    asked, other_asked = ([{**p, "question": q} for p in one] for q in ("1+1?", "1+2?"))
    assert difference(asked, asked)["cos_mean"]["problems"] == 5
    with pytest.raises(ValueError, match="p0 is another problem in the model than in the first one"):
        difference(other_asked, asked)


@pytest.mark.parametrize("size", [0, 5])
def test_wrong_groups_are_named(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^group_size: got {size}"):
        group_statistics(torch.eye(4), group_size=size)


def test_measured_as_the_trainer_measures(tmp_path: Path) -> None:
    """The responses of a training step, padded otherwise and in other micro-batches, one without tokens."""
    trainer = make_trainer(tmp_path, model=make_model(), temperature=0.7)
    rollout = trainer.sampler.sample()
    theirs = trainer.measure(rollout, trainer.verify(rollout))
    width = rollout.ids.shape[1] - rollout.mask.shape[1]
    prompts = [
        row[seen.bool()].tolist() for row, seen in zip(rollout.ids[:, :width], rollout.attention[:, :width])
    ]
    responses = [row[mask].tolist() for row, mask in zip(rollout.ids[:, width:], rollout.mask)]
    seen: list[int] = []
    head = find_head(trainer.model)
    found = measure(head, prompts, responses, temperature=0.7, batch_size=3, advance=seen.append)
    assert seen == [3, 3, 2]
    assert found.lengths.tolist() == rollout.mask.sum(1).tolist()
    geometry = g2.group_geometry(found.features, theirs.rewards, group_size=4)
    torch.testing.assert_close(geometry.similarity, theirs.geometry.similarity, rtol=1e-4, atol=1e-5)
    assert found.entropy.sum().item() / rollout.mask.sum().item() == pytest.approx(theirs.entropy, rel=1e-5)
    empty = measure(head, prompts[:2], [[], responses[1]])
    assert not empty.features[0].any()
    assert empty.entropy[0] == empty.lengths[0] == 0
    assert empty.features[1].any()


def test_bf16_is_near_float32() -> None:
    head, ids = find_head(make_model().eval()), make_tokenizer()("1+2=")["input_ids"]
    exact, rounded = (measure(head, [ids] * 2, [[3, 4, 1], [7, 9]], autocast=cast) for cast in (False, True))
    cosine = torch.nn.functional.cosine_similarity(exact.features, rounded.features)
    assert (cosine > 0.99).all()
    assert not torch.equal(exact.features, rounded.features)
