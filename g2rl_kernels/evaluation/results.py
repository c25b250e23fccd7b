"""From samples to numbers: tables, results.json, a picture of pass@k, and paired differences between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_whole
from ..errors import ConfigError, TrainerError
from .metrics import bootstrap_interval, distinct_right, maj_at_k, pass_at_k

Row = dict[str, Any]
VOTES = 16  # maj@16 is what is usually reported
MOST_VOTES = 64  # of the k chosen here: an exact maj@k costs some k^2, about a second where k is 128 of 1024


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [1 << i for i in range(n.bit_length())]


def check_ks(ks: Sequence[int] | None, n: int) -> list[int]:
    """The k asked for, 1 among them; by default all powers of two. ConfigError unless all are in [1, n]."""
    chosen = sorted({1, *(powers(n) if ks is None else ks)})
    for k in chosen:
        if not 1 <= k <= n:
            raise ConfigError(f"k={k}: must be from 1 to n={n}, the number of responses a problem; raise -n")
    return chosen


def by_problem(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """{data set: {problem: its samples}}; TrainerError where problems differ in their number of samples, or a
    sample has no score."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["score"] is None:
            raise TrainerError(
                f"samples: problem {row['problem']}, sample {row['sample']} has no score: give its --data"
            )
        name = row.get("data") or str(row["problem"]).rpartition("/")[0]
        found.setdefault(name, {}).setdefault(row["problem"], []).append(row)
    for name, problems in found.items():
        sizes = {len(samples) for samples in problems.values()}
        if len(sizes) > 1:
            raise TrainerError(
                f"samples: the problems of {name} have {min(sizes)} to {max(sizes)} samples: the run is not "
                "finished; start it again"
            )
    return found


def vote_ks(ks: Sequence[int] | None, n: int) -> list[int]:
    """The k of maj@k: all those asked for; by default powers of two up to n, but not above MOST_VOTES."""
    chosen = check_ks(ks, n) if ks is not None else powers(min(n, MOST_VOTES))
    return sorted({*chosen, min(VOTES, n)})


def per_problem(
    problems: dict[str, list[Row]], ks: Sequence[int], votes: Sequence[int], gate: float
) -> dict[str, list[float]]:
    """Each metric's value for every problem, in order: pass@k for ks, maj@k for votes, distinct right ..."""
    values: dict[str, list[float]] = {}
    for samples in problems.values():
        right = [row["score"] >= gate for row in samples]
        answers = [row["answer"] for row in samples]
        for k in ks:
            values.setdefault(f"pass@{k}", []).append(pass_at_k(len(right), sum(right), k))
        for k in votes:
            values.setdefault(f"maj@{k}", []).append(maj_at_k(answers, right, k))
        values.setdefault("distinct_right", []).append(distinct_right(answers, right))
        values.setdefault("truncated", []).append(_mean([bool(row.get("truncated")) for row in samples]))
        lengths = [row["length"] if "length" in row else len(row.get("tokens") or ()) for row in samples]
        values.setdefault("length", []).append(_mean(lengths))
    return values


def summarise(rows: Sequence[Row], ks: Sequence[int] | None = None, gate: float = 0.99) -> dict[str, Any]:
    """{data set: {"problems", "samples", "metrics": {name: {"mean", "low", "high"}}}}.

    Means over problems, with 95 % bootstrap intervals over them (None for a single one). A response is right
    if score >= gate.
    """
    if not rows:
        raise ConfigError("samples: there are none")
    summary = {}
    for name, problems in by_problem(rows).items():
        n = len(next(iter(problems.values())))
        metrics = {}
        for metric, values in per_problem(problems, check_ks(ks, n), vote_ks(ks, n), gate).items():
            low, high = bootstrap_interval(values)
            metrics[metric] = {"mean": _mean(values), "low": low, "high": high}
        summary[name] = {"problems": len(problems), "samples": n, "metrics": metrics}
    return summary


def table(summary: dict[str, Any]) -> str:
    """A Markdown table, one column a data set: percent, with the 95 % interval."""
    metrics = _shown(summary.values())
    rows = [["", *summary]]
    rows.append(["problems x responses", *(f"{s['problems']} x {s['samples']}" for s in summary.values())])
    for metric in metrics:
        rows.append(
            [LABELS.get(metric, metric), *(_cell(s["metrics"].get(metric), metric) for s in summary.values())]
        )
    return _markdown(rows)


LABELS = {"distinct_right": "distinct right answers", "truncated": "cut off", "length": "length, tokens"}
COUNTS = ("distinct_right", "length")  # all others are shares


def _shown(summaries: Any) -> list[str]:
    """The metrics of a table: of the votes the usual one, or the largest there is."""
    names: dict[str, None] = {}
    for one in summaries:
        names.update(dict.fromkeys(one["metrics"]))
    votes = sorted(
        (int(name[4:]) for name in names if name.startswith("maj@")), key=lambda k: (k > VOTES, -k)
    )
    passes = sorted((name for name in names if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return [passes[0], *(f"maj@{k}" for k in votes[:1]), *passes[1:], "distinct_right", "truncated", "length"]


def _cell(value: dict[str, Any] | None, metric: str, sign: str = "") -> str:
    if value is None:
        return ""
    factor, digits = (1, 2) if metric == "distinct_right" else (1, 1) if metric in COUNTS else (100, 1)
    mean, *interval = (
        f"{factor * value[key]:{sign}.{digits}f}" for key in ("mean", "low", "high") if value[key] is not None
    )
    return f"{mean} ({' to '.join(interval)})" if interval else mean


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def compare(
    runs: Mapping[str, Sequence[Row]], ks: Sequence[int] | None = None, gate: float = 0.99
) -> dict[str, dict[str, Any]]:
    """Paired differences of every run to the first, over the problems that both have.

    {run: {data set: {"problems", "samples", "metrics": {name: {"base", "value", "mean", "low", "high"}}}}}:
    mean is that of value - base, its 95 % interval a bootstrap over problems, each with both of its values;
    None for a single problem.
    Without ks: the powers of two up to the smaller n. ConfigError where nothing is shared, or where a problem
    of the same name is another one.
    """
    (base, base_rows), *others = runs.items()
    first = by_problem(base_rows)
    found: dict[str, dict[str, Any]] = {}
    for name, rows in others:
        check_questions(rows, base_rows, name, base)
        found[name] = {}
        for data, problems in by_problem(rows).items():
            shared = [problem for problem in problems if problem in first.get(data, {})]
            if not shared:
                continue
            n = min(len(problems[shared[0]]), len(first[data][shared[0]]))
            used, votes = check_ks(ks, n), vote_ks(ks, n)
            ours = per_problem({p: problems[p] for p in shared}, used, votes, gate)
            theirs = per_problem({p: first[data][p] for p in shared}, used, votes, gate)
            metrics = {}
            for metric in ours:
                difference = np.subtract(ours[metric], theirs[metric])
                low, high = bootstrap_interval(difference)
                metrics[metric] = {
                    "base": _mean(theirs[metric]),
                    "value": _mean(ours[metric]),
                    "mean": float(difference.mean()),
                    "low": low,
                    "high": high,
                }
            if len(problems[shared[0]]) != len(first[data][shared[0]]):
                metrics.pop("distinct_right", None)  # more samples have more of them
            found[name][data] = {"problems": len(shared), "samples": n, "metrics": metrics}
        if not found[name]:
            raise ConfigError(f"compare: {name} and {base} share no problem")
    return found


def check_questions(ours: Sequence[Row], theirs: Sequence[Row], name: str, base: str) -> None:
    """Raises ConfigError where problems of the same name have other questions; rows hold both."""
    asked = {row["problem"]: row.get("question") for row in theirs}
    for row in ours:
        if row["problem"] in asked and row.get("question") != asked[row["problem"]]:
            raise ConfigError(f"compare: {row['problem']} is another problem in {name} than in {base}")


def comparison_table(base: str, compared: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of all differences; those whose interval leaves out 0 are bold."""
    rows = [["data", "problems", "metric", base, "other", "value", "difference"]]
    for run, data in compared.items():
        for name, one in data.items():
            for metric in _shown([one]):
                value = one["metrics"].get(metric)
                if value is None:
                    continue
                factor, digits = (
                    (1, 2) if metric == "distinct_right" else (1, 1) if metric in COUNTS else (100, 1)
                )
                cell = _cell(value, metric, "+")
                clear = value["low"] is not None and (value["low"] > 0 or value["high"] < 0)
                rows.append(
                    [
                        name,
                        str(one["problems"]),
                        LABELS.get(metric, metric),
                        f"{factor * value['base']:.{digits}f}",
                        run,
                        f"{factor * value['value']:.{digits}f}",
                        f"**{cell}**" if clear else cell,
                    ]
                )
    return _markdown(rows)


def write_results(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


COLORS = ("#1f6fb4", "#d1603d", "#3a8f5c", "#8b5fb0", "#b08a1f", "#5b6570", "#c2417f")


def draw(curves: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """pass@k over k, one line a data set (or run) with its 95 % interval, and maj@k dashed beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    largest = 1
    for color, (label, metrics) in zip(COLORS * len(curves), curves.items()):
        for kind, style in (("pass", "-"), ("maj", "--")):
            ks = sorted(int(name.partition("@")[2]) for name in metrics if name.startswith(f"{kind}@"))
            values = [metrics[f"{kind}@{k}"] for k in ks]
            means = [value["mean"] for value in values]
            axes.plot(
                ks,
                means,
                style,
                color=color,
                linewidth=2.2 if kind == "pass" else 1.4,
                marker="o" if kind == "pass" else None,
                markersize=4,
                label=label if kind == "pass" else None,
            )
            if kind == "pass" and values[0]["low"] is not None:
                lows, highs = ([value[key] for value in values] for key in ("low", "high"))
                axes.fill_between(ks, lows, highs, color=color, alpha=0.15, linewidth=0)
            largest = max(largest, *ks)
    axes.set_xscale("log", base=2)
    axes.set_xticks(powers(largest), [str(k) for k in powers(largest)])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("k, responses")
    axes.set_ylabel("share of problems")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    handles += [Line2D([], [], color="#5b6570", linestyle=style) for style in ("-", "--")]
    axes.legend(handles, [*labels, "pass@k", "maj@k"], frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
