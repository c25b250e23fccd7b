"""Judges that misbehave on demand, for the tests of worker processes, which import them from here."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Obedient:
    """Right is what equals the known answer; some completions are orders."""

    def score(self, completion: str, known: Any) -> float:
        order, _, rest = completion.partition(":")
        if order == "sleep":
            time.sleep(1000)
        elif order == "spin":
            while True:
                pass
        elif order == "power":  # one operation that holds Python's lock
            return float(7 ** (10**9) % 3)
        elif order == "memory":
            return float(len([0] * 10**11))
        elif order == "recurse":
            return self.score(completion, known)
        elif order == "raise":
            raise ValueError(f"cannot read {rest!r}")
        elif order == "exit":
            raise SystemExit(3)
        elif order == "vanish":
            os._exit(3)
        elif order == "nan":
            return float("nan")
        elif order == "print":
            print("x" * 100_000, flush=True)
            os.write(1, b"y" * 100)
            completion = rest
        elif order == "wait":
            time.sleep(0.3)
            completion = rest
        elif order == "garbage":  # code in a response may write into any of the process's files
            for descriptor in range(3, 20):
                with suppress(OSError):
                    os.write(descriptor, b"\3\0\0\0{}]")
        elif order == "write":
            Path(rest).write_text("x")
        elif order == "run":
            subprocess.run(["true"], check=True)
        elif order == "signal":
            os.kill(os.getppid(), 0)
        elif order == "connect":
            socket.create_connection(("localhost", 9), timeout=1)
        elif order == "read":
            completion = Path(__file__).read_text()[:3] and "yes"
        elif order == "import":
            import no_such_package  # noqa: F401
        return float(completion == known)

    def answer(self, completion: str, known: Any) -> str | None:
        return completion.rpartition(":")[2] or None

    def same(self, first: str, second: str) -> bool:
        if ("spin" in first and "spin" in second) or "poison" in first + second:
            self.score("spin", None)
        return first.lower() == second.lower()


@dataclass(frozen=True)
class DiesOnce(Obedient):
    """Its first process ends at its first response."""

    folder: str = ""  # where it leaves a note

    def prepare(self) -> None:
        global dies
        note = Path(self.folder) / "started"
        dies = not note.exists()
        note.touch()

    def score(self, completion: str, known: Any) -> float:
        if dies:
            os._exit(137)
        return super().score(completion, known)


class Unloadable(Obedient):
    def prepare(self) -> None:
        raise OSError("no such data")


class Loaded(Obedient):
    """Judges by what `prepare` has loaded; says what else the process has."""

    def prepare(self) -> None:
        import random
        import sys

        global seen
        seen = {
            "torch": "torch" in sys.modules,
            "hash": hash("g2rl"),
            "random": lambda: random.random(),
        }

    def answer(self, completion: str, known: Any) -> str | None:
        value = seen[completion]
        return str(value() if callable(value) else value)


class Heavy(Obedient):
    """Needs more processor time and memory to be loaded than a response may have."""

    def prepare(self) -> None:
        end = time.process_time() + 3
        kept = bytearray(1 << 30)
        while time.process_time() < end:
            pass
        del kept


@dataclass(frozen=True)
class Fussy:
    """Right is what has an "a"; a "1" cannot be judged. Two answers with an "a", or without, are the same."""

    def score(self, completion: str, known: Any) -> float:
        if "1" in completion:
            raise ValueError("a digit")
        return float("a" in completion)

    def answer(self, completion: str, known: Any) -> str | None:
        return completion or None

    def same(self, first: str, second: str) -> bool:
        return ("a" in first) == ("a" in second)


class JudgedTask:
    """A task with a judge; the right answer to every question is "yes"."""

    def __init__(self, judge: Any):
        self.judge = judge

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"question {index}", "gold": "yes"}

    def known(self, item: dict[str, Any]) -> str:
        gold: str = item["gold"]
        return gold

    def score(self, completion: str, item: dict[str, Any]) -> float:
        raise AssertionError("the judge is asked instead")
