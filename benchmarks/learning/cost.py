"""What a step of each system of docs/methods.md costs, turn by turn: writes methods-cost.json.

    python -m benchmarks.learning.cost --out runs/evidence      minutes; after a stage that warmed models up

One trainer a system, all on the same model and seed; in each round every one makes a step. Runs of the
stages do not tell: other work on the machine changes the processor time of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2rl_kernels._files import write_whole
from g2rl_kernels.cli.common import run_command

from .document import RESULTS
from .settings import COMPARED, COMPARISON

COST = f"{COMPARISON}cost.json"
LEVEL, SEED, WARM = "scarce", 0, 2  # rounds that are not counted


def ratios(folder: Path = RESULTS.parent, other: str = "GRPO") -> dict[str, float]:
    """The step of each system over that of another, medians over the rounds; empty where not measured."""
    if not (folder / COST).exists():
        return {}
    rows = json.loads((folder / COST).read_text(encoding="utf-8"))["rows"]
    seconds: dict[str, list[float]] = {row["system"]: row["seconds"] for row in rows}
    return {
        system: statistics.median(a / b for a, b in zip(spent, seconds[other]))
        for system, spent in seconds.items()
    }


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Processor seconds of a step, `rounds` a system."""
    from tqdm import tqdm

    from .evidence import plan, tuning_of
    from .experiment import trainer_of
    from .settings import GRIDS, METHOD_GRIDS

    stage = f"{COMPARISON}{LEVEL}"
    tuned = tuning_of(folder, "tuning", GRIDS, stage)
    tuned |= tuning_of(folder, f"{COMPARISON}tuning", METHOD_GRIDS, stage)
    runs = plan(stage, tuned, [SEED])
    with tempfile.TemporaryDirectory() as scratch:
        trainers = {run.system: trainer_of(run, folder, f"{scratch}/{at}") for at, run in enumerate(runs)}
        for trainer in trainers.values():
            trainer.begin()
        seconds: dict[str, list[float]] = {system: [] for system in COMPARED}
        for _ in tqdm(range(WARM + rounds), "rounds"):
            for system, trainer in trainers.items():
                start = time.process_time()
                trainer.step()
                seconds[system].append(round(time.process_time() - start, 5))
    return [{"system": system, "seconds": spent[WARM:]} for system, spent in seconds.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evidence"), help="folder of the stages' results"
    )
    parser.add_argument("--rounds", type=int, default=16, help="steps of each system (default: 16)")
    args = parser.parse_args(argv)
    return run_command(
        "cost",
        lambda: _main(args),
        interrupted="nothing was written",
        memory="close other programs",
        files="nothing was written",
        path="the results",
    )


def _main(args: argparse.Namespace) -> int:
    from benchmarks.measure import machine

    lines = ",\n".join(json.dumps(row) for row in measure(args.out, args.rounds))
    write_whole(
        RESULTS.parent / COST,
        f'{{"machine": {json.dumps(machine("cpu", rates=False))},\n"rows": [\n{lines}\n]}}\n',
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
