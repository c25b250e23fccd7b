"""Time to verify 512 responses to mathematical problems: math-verify in this process, and worker processes.

    python -m benchmarks.verify                       # --rounds 5 --responses 512

Problems have numbers, fractions, roots, intervals and pairs as answers; a third of the responses are wrong.
Rounds are interleaved, each with other problems; medians. `math-verify` parses known answer and response and
compares them, one after the other, as trainers usually do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from g2rl_kernels.tasks.answers import AnswerTask
from g2rl_kernels.tasks.pool import Limits
from g2rl_kernels.tasks.verify import verify

STEP = (
    "Let $x$ be the unknown. Then $x^2 - {a}x + {b} = 0$, so that "
    "$x = \\frac{{{a} \\pm \\sqrt{{{d}}}}}{{2}}$. "
    "We check: ${a} + {b} = {s}$, and since ${a} < {s}$ the sign is right.\n\n"
)


def problems(count: int, seed: int) -> list[tuple[str, str]]:
    """(known answer, a wrong answer), of five kinds in turn."""
    draw, found = random.Random(seed), []
    for number in range(count):
        a, b, c = draw.randint(2, 999), draw.randint(2, 999), draw.choice([2, 3, 5, 7])
        kinds = [
            (str(a * b), str(a * b + 1)),
            (f"\\frac{{{a}}}{{{2 * a + 1}}}", f"\\frac{{{a}}}{{{2 * a + 3}}}"),
            (f"{a}\\sqrt{{{c}}}", f"{a + 1}\\sqrt{{{c}}}"),
            (f"[{a}, {a + b})", f"({a}, {a + b})"),
            (f"\\left({a}, \\frac{{{b}}}{{7}}\\right)", f"\\left({b}, \\frac{{{a}}}{{7}}\\right)"),
        ]
        found.append(kinds[number % len(kinds)])
    return found


def responses(count: int, seed: int) -> list[tuple[str, str]]:
    """(known answer, completion): eight responses to each problem, of about a thousand characters."""
    draw, found = random.Random(seed), []
    for right, wrong in problems(-(-count // 8), seed):
        for _ in range(8):
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            steps = "".join(STEP.format(a=a + i, b=b, d=a * a - 4 * b, s=a + b + i) for i in range(5))
            answer = wrong if draw.random() < 1 / 3 else right
            found.append((right, f"{steps}Therefore the answer is $\\boxed{{{answer}}}$."))
    return found[:count]


def in_process(rows: Sequence[tuple[str, str]]) -> list[float]:
    from math_verify import parse
    from math_verify import verify as compare

    return [float(compare(parse(f"\\boxed{{{gold}}}"), parse(text))) for gold, text in rows]


def in_workers(rows: Sequence[tuple[str, str]], workers: int, answers: bool) -> list[float]:
    task: Any = AnswerTask([{"question": "?", "answer": gold} for gold, _ in rows], "benchmark")
    asked = [(task, task[at], text) for at, (_, text) in enumerate(rows)]
    return [one.score for one in verify(asked, answers=answers, limits=Limits(workers=workers))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--responses", type=int, default=512)
    args = parser.parse_args(argv)
    Way = Callable[[list[tuple[str, str]]], list[float]]
    ways: dict[str, Way] = {
        "math-verify, this process": in_process,
        "1 worker": lambda rows: in_workers(rows, 1, False),
        "2 workers": lambda rows: in_workers(rows, 2, False),
        "2 workers, with answers for votes": lambda rows: in_workers(rows, 2, True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    differ = 0
    for number in range(args.rounds + 1):  # the first one loads libraries
        found = []
        for at, (name, way) in enumerate(ways.items()):
            rows = responses(args.responses, 10 * number + at)  # a worker remembers what it has read
            start = time.perf_counter()
            way(rows)
            times[name].append(time.perf_counter() - start)
            found.append(rows)
        differ += sum(a != b for a, b in zip(in_process(found[1]), in_workers(found[1], 2, False)))
    base = statistics.median(times["math-verify, this process"][1:])
    for name, taken in times.items():
        median = statistics.median(taken[1:])
        print(f"{name:36} {median:7.3f} s   {median / base:5.2f}")
    print(f"{differ} of {args.responses * (args.rounds + 1)} verdicts differ from math-verify's")
    print(json.dumps({name: [round(t, 4) for t in taken] for name, taken in times.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
