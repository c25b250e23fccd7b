"""One run: trains a model by one system, then evaluates it on the held-out problems."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from g2rl_kernels._files import write_whole

from .settings import GROUP, SETTINGS, Setting

if TYPE_CHECKING:
    from typing_extensions import NotRequired

    from g2rl_kernels.trainer import Trainer, TrainerConfig

CURVES = ("accuracy", "entropy", "length", "cos_mean", "negative_pairs")
POINTS = 20  # points of a stored curve, each the mean of equally many steps
EVALUATION_SEED = 20251217


@dataclass(frozen=True)
class Run:
    """Decides a run's numbers, for one machine and one number of threads."""

    setting: str
    system: str
    seed: int
    keys: tuple[tuple[str, Any], ...]  # keys of the trainer's configuration, beside the setting's

    @property
    def identity(self) -> dict[str, Any]:
        return {"setting": self.setting, "system": self.system, "seed": self.seed, "keys": dict(self.keys)}


class Evaluation(TypedDict):
    """A policy on the held-out problems."""

    problems: dict[str, list[float]]  # measure -> a number a held-out problem
    geometry: dict[str, float]  # measure -> mean over the problems' groups


class Row(Evaluation):
    """One run in benchmarks/results/learning/*.json, with the policy after training."""

    setting: str
    system: str
    seed: int
    keys: dict[str, Any]
    start: NotRequired[Evaluation]  # the policy before training, of the problems pass@1 alone
    curves: dict[str, list[float]]  # measure -> POINTS means over the steps of training
    seconds: float
    step_cpu_seconds: NotRequired[float]  # processor time of a step, mean
    products: NotRequired[str]  # how a CPU without bfloat16 products computed them (bf16.py)


def run(this: Run, folder: Path) -> Row:
    """Trains and evaluates. Only warm starts, and what is known of them, are kept, in `folder`."""
    from .bf16 import products_of

    start, setting = time.perf_counter(), SETTINGS[this.setting]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        trainer = trainer_of(this, folder, scratch)
        products = stack.enter_context(products_of(trainer.config))
        shared = share_encoder(trainer)
        before = evaluate_start(trainer, setting, setting.place(folder, this.seed))
        trainer.begin()  # seeds the generators that the evaluation used
        began, spared = time.process_time(), shared.spared if shared else 0.0
        steps = [trainer.step() for _ in range(trainer.config.steps)]
        spent = time.process_time() - began
        if shared:
            spent += shared.spared - spared
        spent /= len(steps)
        row: Row = {
            "setting": this.setting,
            "system": this.system,
            "seed": this.seed,
            "keys": dict(this.keys),
            "start": before,
            "curves": {key: thin([step[key] for step in steps]) for key in CURVES},
            **evaluate(trainer, setting),
            "seconds": round(time.perf_counter() - start, 1),
            "step_cpu_seconds": round(spent, 4),
        }
        if products:
            row["products"] = "bfloat16 in float32"
        return row


class SharedEncoder:
    """A `SentenceEncoder` whose vectors serve all runs of this process.

    A text's vector has the same bits in every run, so results are those of a run alone. `spared`: the
    processor time that texts of other runs saved.
    """

    def __init__(self, encoder: Any, vectors: dict[str, Any]):
        self.encoder, self.vectors = encoder, vectors
        self.mine: set[str] = set()  # texts that this run alone would have encoded
        self.spared, self.seconds, self.encoded = 0.0, 0.0, 0

    def __call__(self, texts: Sequence[str]) -> Any:
        import torch

        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        others = {text for text in texts if text not in self.mine} - {*new}
        began = time.process_time()
        if new:
            self.vectors.update(zip(new, self.encoder(new)))
        self.seconds += time.process_time() - began
        self.encoded += len(new)
        self.spared += len(others) * self.seconds / max(self.encoded, 1)
        self.mine.update(texts)
        return torch.stack([self.vectors[text] for text in texts])


_VECTORS: dict[str, dict[str, Any]] = {}  # of each encoder, text -> vector


def share_encoder(trainer: Trainer) -> SharedEncoder | None:
    """Gives the trainer an encoder that knows what other runs have encoded; None where it needs none."""
    if not hasattr(trainer, "encoder"):
        return None
    vectors = _VECTORS.setdefault(str(trainer.config.encoder), {})
    shared = trainer.encoder = SharedEncoder(trainer.encoder, vectors)
    return shared


def trainer_of(this: Run, folder: Path, output_dir: str) -> Trainer:
    """A run's trainer, not begun; sets the number of threads."""
    import torch

    from g2rl_kernels.trainer import Trainer, TrainerConfig, load_model, load_tasks

    setting = SETTINGS[this.setting]
    torch.set_num_threads(setting.threads or torch.get_num_threads())
    config = TrainerConfig.from_dict(
        {
            **setting.base,
            **dict(this.keys),
            "model": setting.model(folder, this.seed),
            "tasks": [setting.train],
            "seed": this.seed,
            "output_dir": output_dir,
            "resume": "overwrite",
        }
    )
    return Trainer(*load_model(config), load_tasks(config.tasks), config)


def evaluate_start(trainer: Trainer, setting: Setting, place: Path) -> Evaluation:
    """`evaluate` before training, once for each model to start from and each sampler; kept in `place`."""
    path = place / start_name(trainer.config)
    if not path.exists():
        found = evaluate(trainer, setting)
        found["problems"] = {"pass@1": found["problems"]["pass@1"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found))
    kept: Evaluation = json.loads(path.read_text(encoding="utf-8"))
    return kept


def start_name(config: TrainerConfig) -> str:
    """The file of a start model's evaluation: start.json, or with what the sampler truncates."""
    cuts = {name: getattr(config, name) for name in ("top_k", "top_p", "min_p", "keep_sampling_mask")}
    plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    if all(cuts[name] == value for name, value in plain.items()):
        return "start.json"
    return f"start-{'-'.join(f'{name}={value}' for name, value in cuts.items())}.json"


def evaluate(trainer: Trainer, setting: Setting) -> Evaluation:
    """Samples answers to the held-out problems from the policy, and measures them."""
    import torch

    from g2rl_kernels.evaluation.metrics import distinct_right, maj_at_k, pass_at_k
    from g2rl_kernels.trainer import Trainer, load_tasks

    (task,) = load_tasks([setting.test])
    config = dataclasses.replace(
        trainer.config,
        algorithm="grpo",  # rewards without shaping
        similarity="gradient",
        entropy_coef=0.0,
        labels="truth",
        shuffle=False,
        batch_size=len(task) * GROUP,
        group_size=GROUP,
        mini_batch_size=0,
        micro_batch_size=256,
        generate_batch_size=256,
    )
    # A second trainer, which measures and never updates the model.
    judge = Trainer(trainer.model, trainer.tokenizer, task, _fit(config))
    torch.manual_seed(EVALUATION_SEED)
    answers: list[list[tuple[str, str | None, bool]]] = [[] for _ in range(len(task))]
    described = []
    for _ in range(setting.samples // GROUP):
        judge.sampler.position = 0
        rollout = judge.sampler.sample()
        verified = judge.verify(rollout, votes=True)
        assert verified.answers is not None
        described.append(judge._describe(rollout, judge.measure(rollout, verified)))
        right = (verified.scores >= config.score_gate).tolist()
        for row, found in enumerate(zip(rollout.completions, verified.answers, right)):
            answers[row // GROUP].append(found)
    problems: dict[str, list[float]] = {"pass@1": [], "maj@16": [], "pass@16": [], "distinct right": []}
    for given in answers:
        texts, finals, goods = zip(*given)
        n, c = len(given), sum(goods)
        problems["pass@1"].append(c / n)
        problems["maj@16"].append(round(maj_at_k(finals, goods, GROUP), 6))
        problems["pass@16"].append(round(pass_at_k(n, c, GROUP), 6))
        problems["distinct right"].append(distinct_right(texts, goods))
    keys = ("entropy", "length", "cos_mean", "negative_pairs", "exploration_score_mean")
    geometry = {key: round(sum(d[key] for d in described) / len(described), 6) for key in keys}
    return {"problems": problems, "geometry": geometry}


def _fit(config: TrainerConfig) -> TrainerConfig:
    """Lowers the sizes of micro-batches until they divide the batch."""
    for key in ("micro_batch_size", "generate_batch_size"):
        size = min(getattr(config, key), config.batch_size)
        while config.batch_size % size:
            size -= 1
        setattr(config, key, size)
    return config


def thin(values: Sequence[float]) -> list[float]:
    """At most POINTS means of consecutive values."""
    size = -(-len(values) // POINTS)
    runs = [values[start : start + size] for start in range(0, len(values), size)]
    return [round(sum(run) / len(run), 5) for run in runs]
