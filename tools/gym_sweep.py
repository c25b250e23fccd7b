"""Checks every data set of the installed reasoning-gym: python tools/gym_sweep.py [name ...]

Items are the same in another process, with another hash seed, order and size; the known answer scores 1.
Prints a line for each data set that is otherwise, or where a constant answer earns full reward; minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings

from g2rl_kernels.tasks.procedural import ReasoningGymTask
from g2rl_kernels.tasks.verify import verify

ITEMS, SIZE, OTHER_SIZE = 8, 120, 90


def digests(name: str, size: int, order: list[int]) -> dict[str, str]:
    """{index: digest of the item}, made in this order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = ReasoningGymTask(name, size=size, seed=3)
    return {str(index): hashlib.sha256(repr(task[index]).encode()).hexdigest() for index in order}


def there(names: list[str]) -> dict[str, dict[str, str]]:
    """The digests of another process, in another order and of a smaller data set."""
    command = [sys.executable, __file__, "--digests", *names]
    said = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": "5"}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, dict[str, str]] = json.loads(said.stdout)
    return found


def check(name: str, other: dict[str, str]) -> list[str]:
    """What is wrong with a data set."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = ReasoningGymTask(name, size=SIZE, seed=3)
        items = [task[index] for index in range(ITEMS)]
        answered = [item for item in items if isinstance(item["answer"], str)]
        verdicts = verify([(task, item, item["answer"]) for item in answered])
    said = [str(one.message).partition(f"reasoning-gym {name}: ")[2] for one in caught]
    changed = [
        index for index, digest in digests(name, SIZE, list(range(ITEMS))).items() if digest != other[index]
    ]
    if changed:
        said.append(f"items {', '.join(changed)} of {ITEMS} differ in another process, or with the size")
    wrong = [verdict for verdict in verdicts if verdict.score != 1]
    if wrong:
        said.append(f"{len(wrong)} of {len(answered)} known answers do not score 1: {wrong[0]}")
    return said


def main(names: list[str]) -> None:
    from reasoning_gym.factory import DATASETS

    if names[:1] == ["--digests"]:
        order = list(range(ITEMS))[::-1]
        print(json.dumps({name: digests(name, OTHER_SIZE, order) for name in names[1:]}))
        return
    names = names or sorted(set(DATASETS) - {"composite"})
    other = there(names)
    for name in names:
        for fault in check(name, other[name]):
            print(f"{name}: {fault}", flush=True)
    print(f"{len(names)} data sets, {ITEMS} items each")


if __name__ == "__main__":
    main(sys.argv[1:])
