"""What verl and SkyRL share: seams, the paper's systems as settings, and what is read from texts."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from g2rl_kernels import versions
from g2rl_kernels.group import shaping
from g2rl_kernels.group.options import ShapingOptions
from g2rl_kernels.group.shaping import shape_scores
from g2rl_kernels.integrations import systems
from g2rl_kernels.integrations.seams import check_seams
from g2rl_kernels.integrations.systems import SystemSettings, TextReader


class Trainer:
    def step(self, batch, metrics):
        pass

    def run(self, *args, **options):
        pass


def test_seams_that_are_there_pass():
    check_seams("verl", {Trainer: {"step": "batch metrics", "run": "anything", "__init__": ""}})


def test_missing_seams_are_all_named_with_the_versions_that_have_them(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda _package: "9.9.1")
    monkeypatch.setitem(versions.TESTED, "verl", ("0.9", "0.10"))
    seams = {Trainer: {"step": "batch scores", "stop": ""}, torch: {"nowhere": ""}}
    message = (
        r"verl 9\.9\.1 lacks what g2rl-kernels builds on: Trainer\.step \(its parameters scores\), "
        r"Trainer\.stop, torch\.nowhere; .* \(0\.9 to 0\.10: pip install 'verl==0\.10\.\*'\)"
    )
    with pytest.raises(ImportError, match=message):
        check_seams("verl", seams)


class Config:
    def __init__(self, others=None):
        self.others = others


def test_places_are_imported_and_attributes_found(monkeypatch):
    monkeypatch.setitem(versions.TESTED, "torch", ("2.11", "2.15"))
    here = f"torch.{Path(__file__).stem}"
    monkeypatch.setitem(sys.modules, here, sys.modules[__name__])
    check_seams("torch", {f"{here}:Config": {"others": ""}, f"{here}:Trainer": {"step": "batch / metrics"}})
    seams = {
        f"{here}:Config": {"other": ""},
        f"{here}:Trainer": {"step": "metrics batch / metrics", "run": "one / two"},
        f"{here}:Tester": {"step": ""},
        f"{here}.parts": {},
    }
    message = (
        rf"builds on: Config\.other, Trainer\.step \(its parameters metrics, batch\), "
        rf"Trainer\.run \(its parameters one\), {here}\.Tester, {here}\.parts; install"
    )
    with pytest.raises(ImportError, match=message):
        check_seams("torch", seams)


def test_a_missing_package_is_told_from_a_missing_dependency(monkeypatch, tmp_path):
    (tmp_path / "parted.py").write_text("import of_the_parted")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"needs unparted: pip install 'g2rl-kernels\[unparted\]'$"):
        check_seams("unparted", {"unparted.parts": {}})
    with pytest.raises(ModuleNotFoundError, match="No module named 'of_the_parted'"):
        check_seams("parted", {"parted:Part": {}})


class Lengths:
    """In place of the sentence encoder: a unit vector that depends on a text's length."""

    def __init__(self, name: str, device: object) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.texts += texts
        angles = torch.tensor([len(text) / 10 for text in texts])
        return torch.stack([angles.cos(), angles.sin()], 1)


TEXTS = [
    "so \\boxed{0.5}",
    "padding",
    "<think>\\boxed{3}</think>\\boxed{\\frac{1}{2}}",
    "\\boxed{7}",
    "",
    "\\boxed{2}",
]
GROUPS = torch.tensor([4, -1, 4, 4, 0, 0])


def reader(monkeypatch, **settings):
    monkeypatch.setattr(systems, "SentenceEncoder", Lengths)
    return TextReader(SystemSettings(**settings))


def test_votes_are_the_same_text_for_the_same_answer(monkeypatch):
    pytest.importorskip("math_verify")
    found = reader(monkeypatch, labels="majority")(TEXTS, GROUPS)
    assert found == {"votes": ["1/2", None, "1/2", "7", None, "2"]}


def test_evol_rl_gets_embeddings_and_answers_of_rows_with_a_group(monkeypatch):
    path = f"{__name__}.first_word"
    one = reader(monkeypatch, algorithm="evol_rl", answer_func=path)
    found = one(TEXTS, GROUPS)
    assert one.encoder.texts == [
        "so \\boxed{0.5}",
        "\\boxed{\\frac{1}{2}}",
        "\\boxed{7}",
        "",
        "\\boxed{2}",
    ]
    assert found["answered"].tolist() == [True, False, False, False, False, False]
    expected = Lengths("", None)(one.encoder.texts)
    assert torch.equal(found["embeddings"][GROUPS >= 0], expected)
    assert not found["embeddings"][1].any()


def first_word(text: str) -> str | None:
    return text.split()[0] if text[:1].isalpha() else " "


def test_a_batch_without_answers_is_said_and_one_of_padding_is_not(monkeypatch, recwarn):
    one = reader(monkeypatch, algorithm="evol_rl", labels="majority", answer_func="builtins.min")
    found = one(["a", "b"], torch.tensor([-1, -1]))
    assert found["votes"] == [None, None]
    assert found["embeddings"].shape[0] == 2
    assert not recwarn.list
    one.answer = lambda text: None
    with pytest.warns(UserWarning, match=r"no response .*: algorithm\.g2rl\.answer_func names the function"):
        one(["a", "b"], torch.tensor([0, 0]))


def test_an_answer_func_gives_texts(monkeypatch):
    with pytest.raises(ValueError, match=r"^algorithm\.g2rl\.answer_func: 'math\.pi' is 3\.14.*, needs a"):
        reader(monkeypatch, labels="majority", answer_func="math.pi")
    one = reader(monkeypatch, labels="majority", answer_func="builtins.len")
    with pytest.raises(TypeError, match=r"^algorithm\.g2rl\.answer_func: builtins\.len gave 1, needs a text"):
        one(["a"], torch.tensor([0]))


def test_shaping_is_that_of_shape_scores_with_the_settings_and_its_warnings():
    features, scores = torch.randn(4, 8), torch.tensor([0.1, 0.2, 0.4, torch.nan])
    rows = {"group_ids": torch.tensor([0, 0, 0, -1]), "has_tokens": torch.tensor([True, True, True, False])}
    options = ShapingOptions(lam=0.9, shaping="intent")
    settings = SystemSettings(lam=0.9, shaping="intent", rewards="graded", correctness_threshold=0.3)
    expected = shape_scores(features, scores, options, threshold=0.3, graded=True, **rows)
    assert torch.equal(settings.shape(features, scores, **rows).bonus, expected.bonus)
    assert expected.bonus.any()
    with pytest.warns(UserWarning, match=r"g2rl\.correctness_threshold=0\.999999, .*rewards='graded'"):
        SystemSettings().shape(features, scores, **rows)
    with pytest.warns(UserWarning, match=r"further apart than algorithm\.g2rl\.correctness_gap=0\.1"):
        SystemSettings(correctness_gap=0.1, correctness_threshold=0.3).shape(features, scores, **rows)


@pytest.mark.parametrize(
    ("settings", "matters"),
    [
        ({}, True),
        ({"algorithm": "dra"}, True),
        ({"lam": 0}, False),
        ({"algorithm": "grpo"}, False),
        ({"algorithm": "passk", "pass_k": 2}, False),
        ({"algorithm": "setpo"}, False),
        ({"labels": "majority"}, False),
    ],
)
def test_a_gap_that_changes_nothing_is_not_warned_of(settings, matters):
    rows = {"group_ids": torch.tensor([0, 0, 0, 0])}
    if "labels" in settings:
        rows["votes"] = ["a", "a", "b", None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = SystemSettings(correctness_threshold=0.0, **settings)
        settings.shape(torch.randn(4, 8), torch.tensor([1.0, 1.0, -1.0, -1.0]), **rows)
    assert any("further apart" in str(one.message) for one in said) == matters


def test_settings_are_checked_and_small_groups_are_told(monkeypatch):
    monkeypatch.setattr(shaping, "_told", set())
    with pytest.warns(
        UserWarning, match=r"^rollout\.n=2: .* equally novel, .* or algorithm\.g2rl\.lam to 0$"
    ):
        SystemSettings().check(2, "rollout.n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SystemSettings().check(4, "rollout.n")
        SystemSettings(algorithm="grpo").check(2, "n")
    with pytest.raises(ValueError, match=r"^algorithm\.g2rl\.clip: got 0"):
        SystemSettings(clip=0).check(4, "rollout.n")


@pytest.mark.parametrize(
    ("settings", "theirs", "found"),
    [
        ({}, 0.0, 0.0),
        ({}, 0.01, 0.01),
        ({"algorithm": "evol_rl"}, 0.0, 0.003),
        ({"algorithm": "evol_rl"}, 0.01, 0.01),
        ({"algorithm": "evol_rl", "entropy_coef": 0.0}, 0.01, 0.0),
        ({"algorithm": "entropy_bonus", "entropy_coef": 0.02}, 0.0, 0.02),
    ],
)
def test_the_entropy_coefficient(settings, theirs, found):
    assert SystemSettings(**settings).entropy(theirs, "coef") == found


@pytest.mark.parametrize(
    "settings", [{"algorithm": "grpo"}, {"algorithm": "entropy_bonus", "entropy_coef": 0.0}]
)
def test_a_bonus_that_contradicts_the_algorithm_is_refused(settings):
    with pytest.raises(ValueError, match=r"^coef: got 0\.\d* with algorithm\.g2rl\.algorithm="):
        SystemSettings(**settings).entropy(0.01, "coef")


@pytest.mark.parametrize(
    ("settings", "theirs", "found"),
    [
        ({}, 0.2, 0.2),
        ({"algorithm": "evol_rl"}, 0.2, 0.28),
        ({"algorithm": "evol_rl"}, None, 0.28),
        ({"algorithm": "evol_rl"}, 0.3, 0.3),
        ({"algorithm": "evol_rl", "ratio_clip_high": 0.2}, 0.3, 0.2),
    ],
)
def test_the_upper_clip(settings, theirs, found):
    assert SystemSettings(**settings).clip_high(theirs, 0.2) == found


def test_the_alarm_names_the_settings_of_the_trainer():
    assert SystemSettings(shaping="intent").alarm().remedy == "try algorithm.g2rl.shaping=right"
    assert "learning rate" in SystemSettings(algorithm="grpo").alarm().remedy
