"""Follows one seed step by step: which groups, which answers, and what the advantages did to them.

    python -m benchmarks.learning.follow smollm2-gcd --seed 0      intent with shape and skip, and a figure
    python -m benchmarks.learning.follow scarce --seed 1 --systems GRPO 'G2RL equation, shape, 0.5'

Each run is written to OUT/<setting>-<seed>-<system>.jsonl, a line a step with every group; a run that is
there is not run again. OUT/<setting>-<seed>.json holds `summary` of every step, from which the figure is
drawn. --document puts both where docs/evidence.md shows them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from g2rl_kernels._files import write_whole

from . import document
from .evidence import Stage, plan
from .experiment import Run, trainer_of

if TYPE_CHECKING:
    from g2rl_kernels.trainer import Trainer

OUT = document.ROOT / "runs" / "follow"
SHOWN = (
    document.ROOT / "benchmarks" / "results" / "follow.json",
    document.ROOT / "docs" / "evidence-follow.png",
)
FOLLOWED = ("G2RL intent, shape, 0.5", "G2RL intent, skip, 0.5")
WIDTH = 5  # steps of a moving mean


class Group(TypedDict):
    """The responses to one prompt, in their order."""

    question: str
    texts: list[str]
    answers: list[str | None]
    rewards: list[float]
    nubar: list[float]  # exploration scores, scaled to 0..1 in the group
    advantages: list[float]


class Step(TypedDict):
    """One step of training, before its update."""

    step: int
    accuracy: float
    entropy: float
    cos_mean: float
    groups: list[Group]


def follow(this: Run, folder: Path) -> list[Step]:
    """Trains as `experiment.run` does, and returns every step."""
    from .bf16 import products_of

    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(this, folder, scratch)
        with products_of(trainer.config):
            trainer.begin()
            for _ in range(trainer.config.steps):
                metrics = trainer.step()
                steps.append(
                    {
                        "step": metrics["step"],
                        "accuracy": round(metrics["accuracy"], 5),
                        "entropy": round(metrics["entropy"], 5),
                        "cos_mean": round(metrics["cos_mean"], 5),
                        "groups": _groups(trainer),
                    }
                )
    return steps


def _groups(trainer: Trainer) -> list[Group]:
    """The groups of the trainer's last step."""
    from g2rl_kernels.group.reference import min_max

    rollout, measured = trainer.last
    answers = trainer.verify(rollout, votes=True).answers
    assert answers is not None
    size = trainer.config.group_size
    nu = measured.geometry.exploration_score.view(-1, size)
    nubar = min_max(nu, nu == nu).flatten()
    groups: list[Group] = []
    for first in range(0, len(answers), size):
        rows = slice(first, first + size)
        groups.append(
            {
                "question": str(rollout.items[first][1]["question"]),
                "texts": rollout.completions[rows],
                "answers": answers[rows],
                "rewards": measured.rewards[rows].tolist(),
                "nubar": [round(x, 4) for x in nubar[rows].tolist()],
                "advantages": [round(x, 4) for x in measured.geometry.advantages[rows].tolist()],
            }
        )
    return groups


# --- what is drawn ------------------------------------------------------------------------------------------

MEASURES = {
    "accuracy": "accuracy in training",
    "entropy": "entropy, nats a token",
    "cos_mean": "mean cosine between gradients",
    "all_wrong": "share of groups that are all wrong",
    "commonest": "share of a group that writes its commonest text",
    "wrong_commonest": "all-wrong groups: advantage of the commonest text",
    "wrong_other": "all-wrong groups: advantage of the other texts",
    "wrong_mass": "share of |advantages| in all-wrong groups",
    "right": "mixed groups: advantage of right answers",
}


def summary(step: Step) -> dict[str, float | None]:
    """The measures of one step, by the names of `MEASURES`; None where no group has them."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    total = wrong = 0.0
    for group in step["groups"]:
        rewards, advantages = group["rewards"], group["advantages"]
        text, count = Counter(group["texts"]).most_common(1)[0]
        mass = sum(map(abs, advantages))
        all_wrong = max(rewards) < 0
        total += mass
        wrong += mass * all_wrong
        found["all_wrong"].append(all_wrong)
        found["commonest"].append(count / len(rewards))
        if all_wrong:
            for given, advantage in zip(group["texts"], advantages):
                found["wrong_commonest" if given == text else "wrong_other"].append(advantage)
        elif min(rewards) < 0:
            found["right"] += [a for a, reward in zip(advantages, rewards) if reward > 0]
    means: dict[str, float | None] = {name: sum(x) / len(x) if x else None for name, x in found.items()}
    means |= {"accuracy": step["accuracy"], "entropy": step["entropy"], "cos_mean": step["cos_mean"]}
    means["wrong_mass"] = wrong / total if total else None
    return means


def draw(runs: dict[str, list[dict[str, float | None]]], title: str, path: Path) -> None:
    """A panel a measure, a curve a system: moving means over `WIDTH` steps.

    runs: for each system the `summary` of every step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    colours = document.COLOURS | document.SKIPPED
    panels = list(figure.subplots(3, 3).flat)
    for system, found in runs.items():
        style = "--" if system in document.SKIPPED else "-"
        for axes, name in zip(panels, MEASURES):
            curve = moving_means([one[name] for one in found])
            at = [step for step, point in enumerate(curve, 1) if point is not None]
            points = [point for point in curve if point is not None]
            axes.plot(at, points, style, color=colours.get(system), linewidth=1.8, label=system)
    for axes, label in zip(panels, MEASURES.values()):
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def moving_means(values: Sequence[float | None]) -> list[float | None]:
    """Means over the latest `WIDTH` values that are there; None where none of them is."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        there = [value for value in values[max(end - WIDTH, 0) : end] if value is not None]
        means.append(sum(there) / len(there) if there else None)
    return means


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning.follow", description=__doc__.split("\n")[0]
    )
    parser.add_argument("setting", help="of settings.py, e.g. scarce or smollm2-gcd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", nargs="+", metavar="NAME", default=FOLLOWED)
    parser.add_argument("--warm", type=Path, default=document.ROOT / "runs" / "evidence", help="warm starts")
    parser.add_argument("--document", action="store_true", help="show these runs in docs/evidence.md")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the steps and the figure")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tuned = document.best(Stage(document.RESULTS / "tuning.json").rows)
    planned = {this.system: this for this in plan(args.setting, tuned, [args.seed])}
    runs: dict[str, list[dict[str, float | None]]] = {}
    for system in args.systems:
        name = f"{args.setting}-{args.seed}-{system.lower().replace(', ', '-').replace(' ', '-')}"
        path = args.out / f"{name}.jsonl"
        if not path.exists():
            steps: Sequence[Any] = follow(planned[system], args.warm)
            write_whole(path, "".join(json.dumps(step) + "\n" for step in steps))
        lines = path.read_text(encoding="utf-8").splitlines()
        runs[system] = [summary(json.loads(line)) for line in lines]
    title, stem = f"{args.setting}, seed {args.seed}", f"{args.setting}-{args.seed}"
    places = [SHOWN] if args.document else []
    for numbers, figure in [(args.out / f"{stem}.json", args.out / f"{stem}.png"), *places]:
        write_whole(numbers, json.dumps({"title": title, "runs": rounded(runs)}) + "\n")
        draw(runs, title, figure)
    return 0


def rounded(runs: dict[str, list[dict[str, float | None]]]) -> dict[str, list[dict[str, float | None]]]:
    """The summaries with four digits."""
    return {
        system: [{k: None if v is None else round(v, 4) for k, v in one.items()} for one in steps]
        for system, steps in runs.items()
    }


if __name__ == "__main__":
    sys.exit(main())
