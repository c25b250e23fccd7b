"""The files of a run for people: metrics.jsonl, samples.jsonl, samples.md and curves.png."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from .._files import flush, save_figure, write_whole
from ..tasks.base import Question

BAR = ("reward", "accuracy", "length", "entropy", "cos_mean", "negative_pairs", "tokens_per_second")
BAR_NAMES = ("reward", "acc", "len", "ent", "cos", "neg", "tok/s")


class SampleRow(TypedDict):
    """One response: a line of samples.jsonl and a row of samples.md."""

    step: int
    question: str
    completion: str
    score: float  # by the task
    reward: float  # +1 | -1
    exploration_score: float
    shaped_reward: float
    advantage: float


class Report:
    """The files of one run in `output_dir`. Each step's line is written before the next step begins."""

    def __init__(self, output_dir: Path, title: str):
        self.dir, self.title = output_dir, title
        self.metrics: list[dict[str, Any]] = []
        self.samples: list[SampleRow] = []

    def begin(self, step: int) -> None:
        """Removes the lines that a killed run wrote after `step`, its last checkpoint."""
        self.metrics = _rewind(self.dir / "metrics.jsonl", step)
        self.samples = cast("list[SampleRow]", _rewind(self.dir / "samples.jsonl", step))

    def log(self, metrics: dict[str, Any]) -> None:
        """Appends the metrics of a step to metrics.jsonl."""
        self.metrics.append(metrics)
        _append(self.dir / "metrics.jsonl", [metrics])

    def log_samples(self, samples: list[SampleRow]) -> None:
        """Appends to samples.jsonl and rewrites samples.md, a table of the newest ones."""
        self.samples += samples
        _append(self.dir / "samples.jsonl", samples)
        write_whole(self.dir / "samples.md", f"# Samples: {self.title}\n\n" + table(samples))

    def flush(self) -> None:
        """Returns when all lines are on the disk; called before a checkpoint that counts on them."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.dir / name).exists():
                flush(self.dir / name)

    def draw(self) -> Path:
        """Draws all curves so far; returns the path of the picture."""
        path = self.dir / "curves.png"
        draw(self.metrics, self.title, path)
        return path


def shown(question: Question) -> str:
    """A question for people: a text as it is, messages as "role: content", one a line."""
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def bar_text(metrics: dict[str, Any]) -> str:
    """The text of the progress bar."""
    values = (
        f"{name} {metrics[key]:.0f}" if key == "tokens_per_second" else f"{name} {metrics[key]:.2f}"
        for name, key in zip(BAR_NAMES, BAR)
    )
    return " | ".join(values)


def table(samples: Sequence[SampleRow], width: int = 60) -> str:
    """Samples as a Markdown table with aligned columns."""

    def cell(text: Any, limit: int, end: int = 0) -> str:
        """The text on one line, shortened to `limit` characters; keeps its last `end` ones."""
        text = " ".join(str(text).split()).replace("|", "\\|")
        return text if len(text) <= limit else text[: limit - 1 - end] + "…" + text[len(text) - end :]

    heads = ("step", "question", "completion", "score", "reward", "exploration", "shaped", "advantage")
    rows = [
        (
            str(s["step"]),
            cell(s["question"], width, end=width // 2),
            cell(s["completion"], width),
            f"{s['score']:.2f}",
            f"{s['reward']:+.0f}",
            f"{s['exploration_score']:.3f}",
            f"{s['shaped_reward']:+.3f}",
            f"{s['advantage']:+.2f}",
        )
        for s in samples
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(text.ljust(w) for text, w in zip(row, widths)) + " |" for row in (heads, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines) + "\n"


PLOTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Accuracy", "share of right responses", {"accuracy": "accuracy"}),
    ("Reward", "mean over responses", {"reward": "raw", "shaped_reward": "shaped"}),
    ("Response length", "tokens", {"length": "length"}),
    ("Entropy", "nats a token", {"entropy": "entropy"}),
    (
        "Gradient geometry within groups",
        "",
        {"cos_mean": "mean cosine", "negative_pairs": "share of negative pairs"},
    ),
    ("Update", "", {"grad_norm": "gradient norm", "kl": "KL to the start"}),
)


def draw(metrics: Sequence[dict[str, Any]], title: str, path: Path, smooth: float = 0.8) -> None:
    """Six plots; each curve as measured (faint) and as an exponential moving average (bold).

    A dashed line marks the step of a `CollapseAlarm`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 6.6))
    FigureCanvasAgg(figure)
    # Measured once, here: a layout that matplotlib finds takes as long as the drawing.
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.085, top=0.88, wspace=0.2, hspace=0.36)
    alarm = next((m["step"] for m in metrics if m.get("alarm")), None)
    if alarm is not None:
        title += f" · collapsing at step {alarm} (dashed)"
    figure.suptitle(title, fontsize=13)
    for axes, (name, unit, curves) in zip(figure.subplots(2, 3).flat, PLOTS):
        shown = 0
        for color, (key, label) in zip(("#1f6fb4", "#d1603d"), curves.items()):
            points = [
                (m["step"], m[key]) for m in metrics if m.get(key) is not None and math.isfinite(m[key])
            ]
            if not points:
                continue
            steps, values = zip(*points)
            average, bold = values[0], []
            for value in values:
                average = smooth * average + (1 - smooth) * value
                bold.append(average)
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            axes.plot(steps, bold, color=color, linewidth=2.2, label=label)
            shown += 1
        if shown > 1 or (shown and not unit):  # without a unit the legend names the curve
            axes.legend(frameon=False, fontsize=9)
        if name == "Accuracy":
            axes.set_ylim(-0.02, 1.02)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel(unit or "")
        if alarm is not None:
            axes.axvline(alarm, color="#b3261e", linestyle="--", linewidth=1.2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=110)


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the complete lines up to `step`, removes the others; returns the rows kept."""
    rows = []
    # Lines end at \n only: JSON texts may hold U+2028. The last line may end within a character.
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            break  # cut off when the run was killed
        if row["step"] <= step:
            rows.append(row)
    if path.exists():
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows
