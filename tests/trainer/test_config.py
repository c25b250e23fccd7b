from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import warnings
from pathlib import Path

import pytest

from g2rl_kernels.group import shaping
from g2rl_kernels.group.shaping import ALGORITHMS
from g2rl_kernels.head.logprobs import LOGITS_MEMORY
from g2rl_kernels.trainer import ConfigError, TrainerConfig
from g2rl_kernels.trainer.config import warn_emulated

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
# Those of this trainer: TRL's name their engine, slime's has its own settings alone.
RECIPES = [path for path in RECIPES if "engine:" not in path.read_text() and "slime" not in path.stem]


def test_yaml_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-5\ntasks: {kind: reasoning_gym, name: gcd, cfg: {a: 1}}\nscale: none\n")
    config = TrainerConfig.load(
        path, ["steps=7", "tasks.0.cfg.b=[1, 2]", "tasks.0.name=lcm", "beta=1e-3", "exploration_score=sqrt"]
    )
    assert config.lr == 1e-5  # YAML itself reads 1e-5 as text
    assert config.beta == 1e-3
    assert config.steps == 7
    assert config.tasks == [{"kind": "reasoning_gym", "name": "lcm", "cfg": {"a": 1, "b": [1, 2]}}]
    assert config.scale == "none"
    assert (
        TrainerConfig.load(None, []).to_dict()
        == TrainerConfig.from_dict(TrainerConfig.load(None).to_dict()).to_dict()
    )


def test_logits_memory_is_the_ops_own_unless_set() -> None:
    assert TrainerConfig.load(None).logits_memory == LOGITS_MEMORY
    assert TrainerConfig.load(None, ["logits_memory=0"]).logits_memory == 0
    assert TrainerConfig.load(None, ["logits_memory=1_000_000"]).resolved().logits_memory == 1_000_000


def test_sizes_left_at_zero_follow() -> None:
    config = TrainerConfig.from_dict({"batch_size": 32, "mini_batch_size": 16}).resolved()
    assert (config.mini_batch_size, config.micro_batch_size, config.generate_batch_size) == (16, 16, 32)


def has_bf16(monkeypatch: pytest.MonkeyPatch, isa: str, gpu: bool) -> None:
    """Pretends that the CPU is one of `isa`, and that a GPU has bf16 products, or emulates them."""
    monkeypatch.setattr("g2rl_kernels._C.best_isa", lambda: isa)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: gpu or including_emulation
    )


@pytest.mark.parametrize(
    ("isa", "gpu", "device", "autocast"),
    [
        ("avx512bf16", False, "cpu", "bfloat16"),
        ("avx512", True, "cpu", "none"),
        ("plain", True, "cpu", "none"),
        ("avx2", True, "cuda", "bfloat16"),
        ("avx512bf16", False, "cuda", "none"),  # V100, T4: torch emulates bf16
        ("avx512bf16", True, "mps", "none"),
        ("avx512bf16", True, None, "auto"),  # the device is not known yet
    ],
)
def test_autocast_auto(
    isa: str, gpu: bool, device: str | None, autocast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bf16(monkeypatch, isa, gpu)
    config = TrainerConfig.from_dict({"autocast": "auto"})
    assert config.resolved(device).autocast == autocast
    assert TrainerConfig.from_dict({"autocast": "none"}).resolved("cuda").autocast == "none"
    assert TrainerConfig.from_dict({"autocast": "bfloat16"}).resolved("cpu").autocast == "bfloat16"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_emulated_bf16_warns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainerConfig.from_dict({"autocast": "bfloat16"})
    has_bf16(monkeypatch, "avx2", False)
    with pytest.warns(UserWarning, match="^autocast=bfloat16: this .* emulates .*: autocast=auto or none"):
        warn_emulated(config, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_emulated(dataclasses.replace(config, autocast="none"), device)
        has_bf16(monkeypatch, "avx512bf16", True)
        warn_emulated(config, device)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown config key 'learning_rat'"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"group_size": 7}, "group_size=7 does not divide batch_size=32"),
        ({"mini_batch_size": 24}, "mini_batch_size=24 does not divide batch_size=32"),
        ({"micro_batch_size": 5}, "micro_batch_size=5 does not divide mini_batch_size=32"),
        ({"lr": "fast"}, "lr='fast': expected float, got str"),
        ({"steps": 2.5}, "steps=2.5: expected int, got float"),
        ({"steps": True}, "steps=True: expected int, got bool"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"seed": 2**63}, "seed=9223372036854775808: must fit in 64 bits"),
        ({"seed": -(2**63) - 1}, "must fit in 64 bits"),
        ({"logits_memory": -1}, "logits_memory=-1: must be at least 0"),
        ({"logits_memory": 2**63}, "logits_memory=9223372036854775808: must fit in 64 bits"),
        ({"logits_memory": True}, "logits_memory=True: expected int, got bool"),
        ({"logits_memory": "64 MiB"}, "logits_memory='64 MiB': expected int, got str"),
        ({"temperature": 0}, "temperature=0.0: must be from 1e-8 to 1e8"),
        ({"temperature": 1e-9}, "temperature=1e-09: must be from 1e-8 to 1e8"),
        ({"output_dir": 2024.1}, "output_dir=2024.1: YAML reads a number, .*: quote it"),
        ({"system_prompt": "a\ud83d"}, "system_prompt: character 2 is .*, half of a surrogate pair"),
        ({"tasks": [{"args": {datetime.date(2026, 1, 2): 1}}]}, r"tasks\.0\.args: key: got datetime\.date"),
        ({"stop_tokens": [datetime.date(2026, 1, 2)]}, r"stop_tokens\.0: got datetime\.date"),
        (
            {"chat_template_args": {"date_string": datetime.date(2026, 1, 2)}},
            r"chat_template_args\.date_string: got datetime.date\(2026, 1, 2\), needs .*: quote a text",
        ),
        (
            {"tasks": [{"kind": "python", "args": {"levels": [1, math.nan]}}]},
            r"tasks\.0\.args\.levels\.1: got nan, needs a text, number",
        ),
        *(
            ({key: value}, f"{key}={value}: must be a finite number")
            for key in ("temperature", "lam", "clip", "lr", "beta", "ratio_clip_high", "score_gate")
            for value in (float("nan"), float("inf"))
        ),
        ({"algorithm": "ppo"}, "algorithm='ppo': choose one of grpo, entropy_bonus, evol_rl, g2rl"),
        ({"prompt_template": "Solve it."}, "must contain {question}"),
        ({"adam_beta2": 1}, r"adam_beta2=1.0: must be in \[0, 1\)"),
        ({"labels": "gold"}, "labels='gold': choose one of truth, majority"),
        ({"entropy_coef": -0.1}, "entropy_coef=-0.1: must be at least 0"),
        ({"algorithm": "entropy_bonus", "entropy_coef": 0}, "entropy_coef=0.0: .*needs one above 0"),
        ({"algorithm": "grpo", "entropy_coef": 0.01}, "entropy_coef=0.01: grpo has no entropy bonus"),
    ],
)
def test_wrong_values_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainerConfig.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- a\n- b", [], "expected `key: value` lines, got a list"),
        ("a: [", [], "is not YAML"),
        ("{}", ["lr"], "expected key=value"),
        ("{}", ["lr=["], "the value is not YAML"),
        ("{}", ["output_dir=2026-13-01"], "the value is not YAML; quote it"),
        ("output_dir: 2026-13-01", [], "is not YAML"),
        ("{}", ["lrr=1"], "did you mean 'lr'"),
        ("tasks: []", ["tasks.0.name=gcd"], "tasks has no element '0'"),
        ("lr: 1", ["lr.x=1"], "lr is a value, not a mapping"),
    ],
)
def test_wrong_files_and_overrides(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        TrainerConfig.load(tmp_path / "x.yaml", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["2024.10", "0123", "12:30", "1_0", "2026-12-01", "on", "007"])
def test_an_override_of_a_text_is_taken_as_it_stands(text: str) -> None:
    config = TrainerConfig.load(None, [f"output_dir={text}", f"model={text}", f"pad_token={text}"])
    assert (config.output_dir, config.model, config.pad_token) == (text, text, text)
    assert TrainerConfig.load(None, ["pad_token=null", "output_dir='a b'"]).pad_token is None
    assert TrainerConfig.load(None, ["output_dir='a b'"]).output_dir == "a b"


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        TrainerConfig.load("nowhere.yaml")


def test_what_json_changes_is_no_difference() -> None:
    """A checkpoint's keys are texts and its sequences lists."""
    task = {"kind": "python", "args": {"levels": {1: 0.5}, "names": ("a", "b")}}
    config = TrainerConfig.from_dict({"tasks": [task]})
    assert config.differences(json.loads(json.dumps(config.to_dict()))) == []


def test_what_may_change_on_resume() -> None:
    config = TrainerConfig.from_dict({"steps": 10})
    other = {**config.to_dict(), "steps": 5, "output_dir": "elsewhere", "checkpoint_every": 1}
    assert config.differences(other) == []
    assert config.differences({**other, "lr": 1.0, "seed": 4}) == ["lr", "seed"]
    for key in ("micro_batch_size", "logits_memory"):  # in bfloat16 they may round differently
        assert config.differences({**other, key: 1}) == [key]
    del other["logits_memory"]  # of an earlier version
    assert config.differences(other) == []
    assert config.differences(config.resolved().to_dict()) == []
    assert config.resolved().differences(config.to_dict()) == []
    assert config.differences({**other, "algorithm": "evol_rl"}) == [
        "algorithm",
        "entropy_coef",
        "ratio_clip_high",
    ]
    assert config.differences({**other, "score": "sqrt"}) == ["score"]  # of another version
    config.lr_schedule = other["lr_schedule"] = "linear"  # its slope depends on the number of steps
    assert config.differences(other) == ["steps"]


@pytest.mark.parametrize(
    ("algorithm", "coef", "high"),
    [("grpo", 0, 0.1), ("entropy_bonus", 0.003, 0.1), ("evol_rl", 0.003, 0.28), ("g2rl", 0, 0.1)],
)
def test_an_algorithm_brings_its_own_settings(algorithm: str, coef: float, high: float) -> None:
    config = TrainerConfig.from_dict({"algorithm": algorithm, "ratio_clip": 0.1}).resolved()
    assert (config.entropy_coef, config.ratio_clip_high) == (coef, high)
    assert config.resolved() == config
    assert TrainerConfig.from_dict(config.to_dict()) == config
    if algorithm != "grpo":
        keys = {"algorithm": algorithm, "entropy_coef": 0.5, "ratio_clip_high": 0.2}
        asked = TrainerConfig.from_dict(keys).resolved()
        assert (asked.entropy_coef, asked.ratio_clip_high) == (0.5, 0.2)
    if algorithm == "evol_rl":
        none = TrainerConfig.from_dict({"algorithm": algorithm, "entropy_coef": 0}).resolved()
        assert none.entropy_coef == 0


def test_a_configuration_is_written_as_it_was_given(tmp_path: Path) -> None:
    """What one algorithm or batch brings along must not stay where a written file is the start of another."""
    given = TrainerConfig.from_dict({"algorithm": "evol_rl", "batch_size": 32})
    given.check()
    (tmp_path / "config.yaml").write_text(given.to_yaml())
    assert TrainerConfig.load(tmp_path / "config.yaml") == given
    changed = ["algorithm=g2rl", "batch_size=64"]
    other = TrainerConfig.load(tmp_path / "config.yaml", changed).resolved()
    assert other == TrainerConfig.load(None, changed).resolved()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_with_every_system(path: Path, algorithm: str) -> None:
    config = TrainerConfig.load(path, [f"algorithm={algorithm}"])
    assert config.tasks
    assert config.algorithm == algorithm


def test_small_groups_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "_told", set())
    with pytest.warns(UserWarning, match=r"^group_size=2: .* equally novel, .* or lam to 0$"):
        TrainerConfig.from_dict({"group_size": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainerConfig.from_dict({"group_size": 4})
        TrainerConfig.from_dict({"group_size": 2, "algorithm": "grpo"})
        TrainerConfig.from_dict({"group_size": 2, "lam": 0.0})
