"""Chooses the default among the variants of G2RL, by a rule written down before the runs.

    python -m benchmarks.learning.choice        from the committed results

Candidates are `intent`, `equation` and `right`, each with `shape` and `skip`, at lam 0.5. A variant that was
not run on a setting is not judged there. Each step keeps some of the candidates:

1. Collapse: on no setting more collapsed runs than GRPO (collapse.py).
2. Accuracy: on every setting, pass@1 and maj@16 at least the best candidate's, or within the interval: the
   95 % interval of the difference, paired by seed, reaches zero. Where no candidate passes everywhere, those
   that fail least often stay.
3. pass@16, mean over the settings: the best, and those whose paired interval to the best reaches zero.
4. Distinct right answers, as a multiple of GRPO's, mean over the settings: the highest is the choice.

While some candidates have fewer seeds than others, the best is that of the seeds that all have.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import document
from .collapse import BASELINE, collapses
from .experiment import Row
from .settings import LEVELS, VARIANTS, g2rl

STAGES = ("fluent", "halting", "scarce", "smollm2-gcd")
CANDIDATES = tuple(
    g2rl(*choice, 0.5)[0] for choice in itertools.product(("intent", "equation", "right"), ("shape", "skip"))
)
assert VARIANTS.keys() >= set(CANDIDATES)

Results = Mapping[str, Sequence[Row]]  # setting -> rows


@dataclass
class Choice:
    """The chosen variant, and a line for each step of the rule."""

    system: str | None
    why: list[str] = field(default_factory=list)


def choose(results: Results) -> Choice:
    """Applies the rule to the rows of every setting."""
    ran = {stage: {row["system"] for row in rows} for stage, rows in results.items()}
    left = [name for name in CANDIDATES if any(name in names for names in ran.values())]
    choice = Choice(None)
    if not left:
        choice.why.append("No candidate has been run.")
        return choice

    out = _collapsing(results, left)
    left = [name for name in left if name not in out]
    choice.why.append(_said("Collapse", out, left))
    if not left:
        return choice

    out = _less_accurate(results, left)
    fewest = min(len(out.get(name, ())) for name in left)
    kept = [name for name in left if len(out.get(name, ())) == fewest]
    out = {name: found for name, found in out.items() if name not in kept}
    choice.why.append(_said("Accuracy", out, kept))
    if fewest:
        choice.why[-1] += f" (No candidate passes everywhere; these fail {fewest} times.)"
    left = kept

    shared = [stage for stage in results if ran[stage] >= {*left, BASELINE}]
    if shared and len(left) > 1:
        kept = _highest(results, left, shared, "pass@16")
        means = {name: sum(_seeds(results, name, shared, "pass@16").values()) for name in left}
        count = {name: len(_seeds(results, name, shared, "pass@16")) for name in left}
        said = ", ".join(f"{name} {means[name] / max(count[name], 1):.3f}" for name in left)
        choice.why.append(f"pass@16 over {', '.join(shared)}: {said}. Left: {'; '.join(kept)}.")
        left = kept
    distinct = {
        name: sum(
            document.mean_of(results[stage], name, "distinct right")
            / max(document.mean_of(results[stage], BASELINE, "distinct right"), 1e-9)
            for stage in shared
        )
        / max(len(shared), 1)
        for name in left
    }
    choice.system = max(left, key=lambda name: distinct[name])
    said = ", ".join(f"{name} {distinct[name]:.2f}" for name in left)
    choice.why.append(f"Distinct right answers, as a multiple of GRPO's: {said}. Choice: {choice.system}.")
    return choice


def _collapsing(results: Results, names: Sequence[str]) -> dict[str, list[str]]:
    """For each candidate that collapses more often than GRPO somewhere: where."""
    found: dict[str, list[str]] = {}
    for stage, rows in results.items():
        allowed = len(collapses(rows, BASELINE))
        for name in names:
            if (count := len(collapses(rows, name))) > allowed:
                found.setdefault(name, []).append(f"{count} on {stage}, GRPO {allowed}")
    return found


def _less_accurate(results: Results, names: Sequence[str]) -> dict[str, list[str]]:
    """For each candidate that is clearly less accurate than the best one somewhere: where."""
    found: dict[str, list[str]] = {}
    for (stage, rows), measure in itertools.product(results.items(), ("pass@1", "maj@16")):
        here = [name for name in names if document.of_seeds(rows, name, measure)]
        if not here:
            continue
        best = _best({name: document.of_seeds(rows, name, measure) for name in here})
        for name in here:
            mean, half = document.difference(rows, name, measure, best)
            if mean + half < 0:
                said = f"{measure} on {stage} {mean:+.3f} ± {half:.3f} to {best}"
                found.setdefault(name, []).append(said)
    return found


def _seeds(results: Results, name: str, stages: Sequence[str], measure: str) -> dict[int, float]:
    """A measure of each seed, mean over the settings that all have the seed."""
    values = [document.of_seeds(results[stage], name, measure) for stage in stages]
    seeds = set.intersection(*(set(value) for value in values))
    return {seed: sum(value[seed] for value in values) / len(values) for seed in sorted(seeds)}


def _best(values: Mapping[str, Mapping[int, float]]) -> str:
    """The candidate of the highest mean over the seeds that all have; over its own where they share none."""
    shared = set.intersection(*(set(seeds) for seeds in values.values()))

    def mean(name: str) -> float:
        seeds = shared or values[name].keys()
        return sum(values[name][seed] for seed in seeds) / len(seeds)

    return max(values, key=mean)


def _highest(results: Results, names: Sequence[str], stages: Sequence[str], measure: str) -> list[str]:
    """The best by a measure, and the candidates whose paired interval to it reaches zero."""
    values = {name: _seeds(results, name, stages, measure) for name in names}
    if not all(values.values()):
        return list(names)
    best, kept = _best(values), []
    for name in names:
        both = values[name].keys() & values[best].keys()
        mean, half = document.interval([values[name][seed] - values[best][seed] for seed in sorted(both)])
        if not mean + half < 0:
            kept.append(name)
    return kept


def _said(step: str, out: Mapping[str, Sequence[str]], left: Sequence[str]) -> str:
    lost = "; ".join(f"{name} ({', '.join(found)})" for name, found in out.items())
    return f"{step}: out {lost or 'nobody'}. Left: {'; '.join(left) or 'nobody'}."


def stored(folder: Path = document.RESULTS) -> dict[str, list[Row]]:
    """The rows of the settings that the rule reads, as far as a folder of results has them."""
    paths = {stage: folder / f"{stage}.json" for stage in STAGES}
    return {stage: document.load(path) for stage, path in paths.items() if path.exists()}


def said(results: Results) -> str:
    """The steps, a line each, and what the small levels alone choose."""
    lines = [f"{number}. {line}" for number, line in enumerate(choose(results).why, 1)]
    small = choose({stage: rows for stage, rows in results.items() if stage in LEVELS})
    return "\n".join([*lines, "", f"From the three small levels alone: {small.system}.", ""])


def main() -> int:
    print(said(stored()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
