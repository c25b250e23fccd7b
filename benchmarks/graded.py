"""What shaping does to the advantages of graded rewards: by the threshold, and by `graded_rewards`.

    python -m benchmarks.graded

Groups of 16 random features about a few directions, as of responses that repeat a few solutions; scores are
grades, or 0 and 1. Prints the correlation of shaped with raw advantages, the share whose sign changes, and
the mean bonus, in deviations of the scores, of novel responses (nubar above a half) in each quarter of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group.options import ShapingOptions
from g2rl_kernels.group.shaping import shape_scores

GROUPS, SIZE, WIDTH = 500, 16, 64


def grades(kind: str, generator: torch.Generator) -> Tensor:
    """Scores [GROUPS, SIZE]: each group has its own level, as problems differ in difficulty."""
    draws = torch.rand(GROUPS, SIZE, generator=generator)
    level = 0.2 + 0.6 * torch.rand(GROUPS, 1, generator=generator)
    kinds: dict[str, Callable[[], Tensor]] = {
        "0 and 1": lambda: (draws < level).float(),
        "grades below 0.9": lambda: 0.9 * draws,
        "grades by a power law": lambda: 0.9 * draws ** (1 / level - 0.5),
        "thirds of 0.9": lambda: (draws / level * 2).floor().clamp(max=3) * 0.3,
    }
    return kinds[kind]()


KINDS = ("0 and 1", "grades below 0.9", "grades by a power law", "thirds of 0.9")


def compare(kind: str, graded: bool, seed: int = 0) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    scores = grades(kind, generator)
    centres = torch.randn(GROUPS, 4, WIDTH, generator=generator)
    which = torch.randint(4, (GROUPS, SIZE), generator=generator)
    features = centres.gather(1, which[..., None].expand(-1, -1, WIDTH))
    features = features + 0.7 * torch.randn(GROUPS, SIZE, WIDTH, generator=generator)
    flat = features.flatten(0, 1)
    shaped = shape_scores(flat, scores.flatten(), ShapingOptions(), group_size=SIZE, graded=graded)
    raw, new = (
        g2.group_geometry(flat, s, group_size=SIZE, shaping="none").advantages.view(GROUPS, SIZE)
        for s in (scores.flatten(), shaped.scores)
    )
    mixed = scores.amax(1) > scores.amin(1)
    raw, new = raw[mixed], new[mixed]
    yield torch.corrcoef(torch.stack([raw.flatten(), new.flatten()]))[0, 1].item()
    yield (raw * new < 0).float().mean().item()
    nu = shaped.geometry.exploration_score.view(GROUPS, SIZE)[mixed]
    novel = (nu - nu.amin(1, keepdim=True)) / (nu.amax(1, keepdim=True) - nu.amin(1, keepdim=True)) > 0.5
    deviation = scores[mixed].std(1, keepdim=True)
    bonus = shaped.bonus.view(GROUPS, SIZE)[mixed] / deviation
    quarter = raw.argsort(1).argsort(1) * 4 // SIZE
    for part in range(4):
        yield bonus[novel & (quarter == part)].mean().item()


def main() -> None:
    warnings.simplefilter("ignore")
    print("| scores | rule | correlation | sign changes | bonus of novel answers, worst quarter to best |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        for graded in (False, True):
            together, flips, *bonus = compare(kind, graded)
            parts = ", ".join(f"{one:+.2f}" for one in bonus)
            rule = "graded" if graded else "threshold"
            print(f"| {kind} | {rule} | {together:.2f} | {100 * flips:.1f} % | {parts} |")


if __name__ == "__main__":
    main()
