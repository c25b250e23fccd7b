"""Processor time of the steps of an experiment, beside those of another checkout of this project.

    python -m benchmarks.learning.steps --setting fluent --against ../old

Both checkouts train from the same start, with the same seed and one thread, a step each in turns. The time
is that of the process, so that others on the machine count little. Below it stands how far the metrics of the
two runs are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("sample", "verify", "measure", "update", "step")
SHOWN = ("accuracy", "entropy", "loss", "grad_norm", "cos_mean")


def serve(setting: str, model: str, keys: dict[str, Any], threads: int) -> None:
    """Trains one step for each line of the standard input; prints its seconds and metrics as JSON."""
    import torch

    from benchmarks.learning.settings import SETTINGS
    from g2rl_kernels.trainer import Trainer, TrainerConfig, load_model, load_tasks

    torch.set_num_threads(threads)
    chosen = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**chosen.base, "model": model, "tasks": [chosen.train], "output_dir": scratch, **keys}
        config = TrainerConfig.from_dict(settings)
        trainer = Trainer(*load_model(config), load_tasks(config.tasks), config)
        trainer.begin()
        seconds: dict[str, float] = {}

        def timed(name: str, call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = time.process_time()
                try:
                    return call(*args, **kwargs)
                finally:
                    seconds[name] = time.process_time() - start

            return run

        trainer.sampler.sample = timed("sample", trainer.sampler.sample)
        for name in PARTS[1:]:
            setattr(trainer, name, timed(name, getattr(trainer, name)))
        print("ready", flush=True)
        for _ in sys.stdin:
            metrics = trainer.step()
            print(json.dumps({**{key: metrics[key] for key in SHOWN}, "seconds": seconds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--setting", default="fluent")
    parser.add_argument("--against", help="another checkout, with its extension built")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skipped", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm", default="runs/evidence", help="where warmed-up models are kept")
    parser.add_argument("--keys", type=json.loads, default={}, help='of the trainer, as JSON: {"lr": 6e-5}')
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.setting, args.serve, args.keys, args.threads)
        return
    from benchmarks.learning.settings import SETTINGS

    model = SETTINGS[args.setting].model(Path(args.warm).resolve(), 0)
    trees = {"here": ROOT, **({"there": Path(args.against).resolve()} if args.against else {})}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    running = {name: _start(tree, args, model) for name, tree in trees.items()}
    try:
        for _ in range(args.steps):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                found[name].append(json.loads(_answer(process)))
    finally:
        for process in running.values():
            process.stdin.close()
            process.wait()
    report(found, args.skipped)


def _start(tree: Path, args: argparse.Namespace, model: str) -> Any:
    given = ["--serve", model, "--setting", args.setting, "--keys", json.dumps(args.keys)]
    # The script is that of this checkout; what it imports is that of `tree`.
    command = [sys.executable, str(Path(__file__).resolve()), *given, "--threads", str(args.threads)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tree, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    while _answer(process) != "ready":
        pass
    return process


def _answer(process: Any) -> str:
    line: str = process.stdout.readline()
    if not line:
        raise SystemExit("a checkout's process ended: its error is above")
    return line.strip()


def report(found: dict[str, list[dict[str, Any]]], skipped: int) -> None:
    """Medians of the processor seconds; their ratio is the median of the steps' ratios."""
    for part in PARTS:
        times = {name: [step["seconds"][part] for step in steps[skipped:]] for name, steps in found.items()}
        text = "  ".join(f"{name} {statistics.median(values):.4f} s" for name, values in times.items())
        if "there" in times:
            total = sum(times["here"]) / max(sum(times["there"]), 1e-9)
            ratios = [a / max(b, 1e-9) for a, b in zip(times["here"], times["there"], strict=True)]
            text += f"  ratio {statistics.median(ratios):.2f}, of the sums {total:.2f}"
        print(f"{part:<8} {text}")
    if "there" in found:
        for key in SHOWN:
            apart = [abs(a[key] - b[key]) for a, b in zip(*found.values(), strict=True)]
            print(f"{key:<10} differs by {apart[0]:.1e} at the first step, {max(apart):.1e} at most")


if __name__ == "__main__":
    main()
