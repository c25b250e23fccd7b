"""Reruns every experiment behind docs/evidence.md, and writes the document's tables and figures.

    make evidence                      all of it: hours on two cores; continues where it was stopped
    make evidence ARGS=--quick         a small version, minutes; its report is in runs/evidence-quick
    make evidence ARGS='--only fluent --systems GRPO EVOL-RL'
    make evidence ARGS='--only smollm2-gcd --committed'   what the committed results lack of a stage
    make evidence ARGS=--document      runs nothing: tables and figures from the committed results

The smollm2 stages multiply in bfloat16: 3 to 26 minutes a run on CPUs that have such products, and on others,
which round operands and multiply in float32 (bf16.py), 13 to 21.
Each finished run is written to OUT/<stage>.json at once, and is not run again. A complete stage replaces the
committed file in benchmarks/results/learning/, from which the document is made, unless that has more seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.learning import comparison, document, sampling  # noqa: E402
from benchmarks.learning.experiment import Row, Run, run  # noqa: E402
from benchmarks.learning.settings import (  # noqa: E402
    COMPARED,
    COMPARISON,
    DEFAULT,
    GRIDS,
    LEVELS,
    METHOD_GRIDS,
    METHODS,
    MORE,
    MORE_SEEDS,
    SAMPLED,
    SAMPLED_ON,
    SAMPLING,
    SEEDS,
    SETTINGS,
    TUNING_SEEDS,
    systems,
)
from g2rl_kernels._files import write_whole  # noqa: E402
from g2rl_kernels.cli.common import run_command  # noqa: E402
from g2rl_kernels.errors import CommandError  # noqa: E402

STAGES: tuple[str, ...] = ("tuning", *LEVELS, "smollm2-chain-sum", "smollm2-gcd")
STAGES += (MORE, SAMPLING, f"{COMPARISON}tuning", *(f"{COMPARISON}{level}" for level in LEVELS))
TUNED_ON = "fluent"
TUNED = (*LEVELS, MORE, SAMPLING, *STAGES[-len(LEVELS) :])  # stages that need what tuning chose


def plan(stage: str, tuned: dict[str, dict[str, Any]], seeds: Iterable[int] = SEEDS) -> list[Run]:
    """The runs of a stage: for each system all seeds, GRPO first.

    tuned: for each algorithm, and each method of another paper, the keys that tuning chose; a system's own
    keys override them. The real model is not tuned: its setting has a learning rate.
    """
    if stage == "tuning":
        return [
            Run(TUNED_ON, f"{algorithm} {number}", seed, (("algorithm", algorithm), *keys.items(), *SHAPE))
            for algorithm, grid in GRIDS.items()
            for number, keys in enumerate(grid)
            for seed in TUNING_SEEDS
        ]
    if stage == f"{COMPARISON}tuning":
        return [
            Run(TUNED_ON, f"{name} {number}", seed, tuple((METHODS[name] | keys).items()))
            for name, grid in METHOD_GRIDS.items()
            for number, keys in enumerate(grid)
            for seed in TUNING_SEEDS
        ]
    runs, setting = [], stage.removeprefix(COMPARISON)
    compared = systems(stage) if setting == stage else COMPARED
    if stage == MORE:
        more = MORE_SEEDS[: len([*seeds])]
        setting, compared, seeds = LEVELS[-1], {DEFAULT: SAMPLED[DEFAULT]}, more
    if stage == SAMPLING:
        setting, compared = SAMPLED_ON, SAMPLED
    for system, keys in compared.items():
        chosen = tuned.get(system, tuned.get(keys["algorithm"], {}))
        if stage.startswith("smollm2"):
            chosen = {}
        runs += [Run(setting, system, seed, tuple((chosen | keys).items())) for seed in seeds]
    return runs


SHAPE = (("shaping", "intent"), ("uniform_groups", "shape"))  # read by g2rl alone; once the default


def _setting_of(stage: str) -> str:
    return {SAMPLING: SAMPLED_ON, MORE: LEVELS[-1]}.get(stage, stage.removeprefix(COMPARISON))


class Stage:
    """The rows of one stage, in a file that is replaced whole after every run."""

    def __init__(self, path: Path):
        self.path = path
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        self.rows: list[Row] = stored["rows"]

    def has(self, this: Run) -> bool:
        return any(_identity(row) == this.identity for row in self.rows)

    def keep(self, runs: Sequence[Run]) -> None:
        """Drops the rows of other runs: after another tuning, those with the old keys would count as
        seeds."""
        identities = [this.identity for this in runs]
        kept = [row for row in self.rows if _identity(row) in identities]
        if len(kept) < len(self.rows):
            self.rows = kept
            self.save()

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self.rows.sort(key=lambda row: (row["system"], row["seed"]))
        self.save()

    def adopt(self, runs: Sequence[Run], other: Stage) -> None:
        """Takes over what another stage of the same machine has of these runs, with the cost of a step."""
        identities = [this.identity for this in runs if not self.has(this)]
        found = [row for row in other.rows if _identity(row) in identities and "step_cpu_seconds" in row]
        if found:
            self.add(*found)

    def save(self) -> None:
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        head = json.dumps(_machine())
        write_whole(self.path, f'{{"machine": {head},\n"rows": [\n{lines}\n]}}\n')


@functools.cache
def _machine() -> dict[str, Any]:
    """What the runs are on, without the rates that benchmarks measure: these runs keep the machine busy."""
    from benchmarks.measure import machine

    return machine("cpu", rates=False)


def _identity(row: Row) -> dict[str, Any]:
    """A row's part of `Run.identity`."""
    return {"setting": row["setting"], "system": row["system"], "seed": row["seed"], "keys": row["keys"]}


def run_all(runs: Sequence[Run], stage: Stage, folder: Path, jobs: int) -> None:
    """Runs what the stage lacks: small models in parallel, one thread each; others one at a time."""
    from tqdm import tqdm

    left = [this for this in runs if not stage.has(this)]
    jobs = jobs if left and SETTINGS[left[0].setting].threads else 1
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), desc=stage.path.stem, smoothing=0.1)
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(jobs, context, initializer=_quiet) as pool:
        pending = {pool.submit(run, this, folder) for this in left}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    stage.add(future.result())
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _quiet() -> None:
    """Silences a worker's own bars and notices: they would mix with the parent's."""
    import logging

    os.environ["TQDM_DISABLE"] = "1"
    import transformers

    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)


def warm_starts(runs: Sequence[Run], folder: Path, jobs: int) -> None:
    """Warms up the models to start from, each once, before several runs need the same one."""
    needed = sorted({(this.setting, this.seed) for this in runs})
    missing = [(setting, seed) for setting, seed in needed if not SETTINGS[setting].is_warm(folder, seed)]
    if not missing:
        return
    from tqdm import tqdm

    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        for _ in tqdm(pool.map(_warm_up, missing, [folder] * len(missing)), "warm-up", len(missing)):
            pass


def _warm_up(pair: tuple[str, int], folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    SETTINGS[pair[0]].model(folder, pair[1])


def tuning_of(out: Path, stage: str, grids: document.Grids, needed_by: str) -> dict[str, dict[str, Any]]:
    """What a tuning stage chose. Raises CommandError if it is not complete."""
    tuning = Stage(out / f"{stage}.json")
    if not all(tuning.has(this) for this in plan(stage, {}) if this.system.rsplit(" ", 1)[0] in grids):
        raise CommandError(f"{needed_by} needs the whole tuning in {tuning.path}: run --only {stage} first")
    return document.best(tuning.rows, grids)


def _the_rest(out: Path) -> None:
    """What the document shows beside the stages: the cost of a step, and one seed, in OUT/follow."""
    from . import cost, follow

    cost.main(["--out", str(out)])
    follow.main(["smollm2-gcd", "--warm", str(out), "--out", str(out / "follow")])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.learning.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, a few steps: checks that it works")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        choices=STAGES,
        help=f"only these stages; {', '.join(TUNED)} need tuning",
    )
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="only these systems of each stage")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: one a core)")
    parser.add_argument("--out", type=Path, help="folder of results (default: runs/evidence or -quick)")
    parser.add_argument(
        "--committed",
        action="store_true",
        help="begin with the committed results where OUT has none: only what they lack is run",
    )
    parser.add_argument("--document", action="store_true", help="run nothing: write tables and figures")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run_command(
        "evidence",
        lambda: _main(args),
        interrupted="the same command goes on; finished runs are kept",
        memory="run fewer at once (--jobs)",
        files="finished runs are kept",
        path="the results",
    )


def _main(args: argparse.Namespace) -> int:
    if args.document:
        document.write()
        comparison.write()
        sampling.write()
        return 0
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    # The workers import this package by it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    out = args.out or ROOT / "runs" / ("evidence-quick" if args.quick else "evidence")
    out.mkdir(parents=True, exist_ok=True)
    if args.committed:
        for path in document.RESULTS.glob("*.json"):
            if not (out / path.name).exists():
                shutil.copyfile(path, out / path.name)
    stages = ("quick",) if args.quick else args.only or STAGES
    known = dict.fromkeys(this.system for name in stages for this in plan(name, {}))
    unknown = [system for system in args.systems or () if system not in known]
    if unknown:
        raise CommandError(f"--systems {unknown[0]!r}: choose from {', '.join(map(repr, known))}")
    tuned: dict[str, dict[str, Any]] = {}
    for name in stages:
        if name in TUNED:
            tuned = tuning_of(out, "tuning", GRIDS, name)
            if name.startswith(COMPARISON):
                grids = {k: v for k, v in METHOD_GRIDS.items() if not args.systems or k in args.systems}
                tuned |= tuning_of(out, f"{COMPARISON}tuning", grids, name)
        seeds = range(2) if args.quick else SEEDS[: args.seeds]
        runs = plan(name, tuned, seeds)
        if args.systems:
            runs = [this for this in runs if this.system in args.systems]
        stage = Stage(out / f"{name}.json")
        if not args.systems:  # of others, tuning may not be known
            stage.keep(plan(name, tuned))
        for other in STAGES:  # the same run may be part of several
            if other != name and {this.setting for this in runs} == {_setting_of(other)}:
                stage.adopt(runs, Stage(out / f"{other}.json"))
        warm_starts(runs, out, args.jobs)
        run_all(runs, stage, out, args.jobs)
        if not args.quick and not args.systems and all(stage.has(this) for this in plan(name, tuned, seeds)):
            committed = document.RESULTS / stage.path.name
            if len(Stage(committed).rows) <= len(stage.rows):  # never replaced by fewer seeds
                committed.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(stage.path, committed)
    if not (args.quick or args.only or args.systems) and args.seeds >= len(SEEDS):
        _the_rest(out)
    print(f"tables and figures of these results: {document.write_report(out)}")
    if not args.quick:
        document.write()
        comparison.write()
        sampling.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
