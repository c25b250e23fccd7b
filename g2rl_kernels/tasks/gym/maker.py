"""What runs in the process that makes reasoning-gym's items; process.py is the other side.

Six data sets depend on PYTHONHASHSEED, which is fixed there, and two draw from the global generator of
`random` as well, which is seeded for each item. So an item depends on its data set and index alone, in
whatever order items are made; acre's depend on the size, too.
"""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from .judge import GymJudge, GymSpec, make_data, seed_globally

# Answers that a lazy model may give to everything; the commonest right answers are tried, too.
PROBES = (
    "",
    "0",
    "1",
    "2",
    "-1",
    "yes",
    "no",
    "Yes",
    "No",
    "True",
    "False",
    "true",
    "false",
    "none",
    "[]",
    "{}",
)
ITEMS, FEWEST_ITEMS = 100, 20  # items to try constant answers on, and how few say anything
SECONDS, MOST_SECONDS = 0.5, 8.0  # of processor time, to make and to score more than those few, and those


class Probed(NamedTuple):
    """How many of the first items give full credit to a constant answer."""

    items: int
    credits: dict[str, int]  # by answer


class Maker:
    """Makes data sets and their items on request."""

    def __init__(self) -> None:
        self._data: dict[bytes, Any] = {}

    def reply(self, what: str, spec: GymSpec, index: int) -> Any:
        """open: (number of items, Probed); item: the pickled item."""
        key = pickle.dumps(spec)
        if what == "open":
            data = self._data[key] = make_data(spec)
            judge = GymJudge(spec, data=data)
            count = min(len(data), ITEMS)
            return len(data), probe(judge, (self._item(data, spec, index) for index in range(count)))
        if key not in self._data:  # this process replaces one that was ended
            self._data[key] = make_data(spec)
        return pickle.dumps(self._item(self._data[key], spec, index))

    def _item(self, data: Any, spec: GymSpec, index: int) -> Any:
        seed_globally(spec.seed, index)
        return data[index]


def probe(judge: GymJudge, items: Iterator[Any]) -> Probed:
    """Gives constant answers to the items, in order, until it has taken long enough."""
    start, made = time.process_time(), []
    with suppress(Exception):  # an item that cannot be made: whoever asks for it is told
        for item in items:
            made.append(item)
            if _enough(start, len(made)):
                break
    right = Counter(item["answer"] for item in made if isinstance(item["answer"], str))
    probes = dict.fromkeys((*PROBES, *(answer for answer, _ in right.most_common(3))))
    credits, count, start = Counter[str](), 0, time.process_time()
    for item in made:
        full = []
        for answer in probes:
            if time.process_time() - start > MOST_SECONDS:  # without this item
                return Probed(count, dict(credits))
            if _is_full(judge, answer, item):
                full.append(answer)
        credits.update(full)
        count += 1
        if _enough(start, count):
            break
    return Probed(count, dict(credits))


def _enough(start: float, count: int) -> bool:
    """Whether `count` items since `start` took too long to go on."""
    spent = time.process_time() - start
    return spent > SECONDS and (count >= FEWEST_ITEMS or spent / count * FEWEST_ITEMS > MOST_SECONDS)


def _is_full(judge: GymJudge, answer: str, item: Any) -> bool:
    try:
        return judge.score(answer, item) == 1
    except Exception:
        return False


def main(descriptor: int) -> None:
    """Serves (what, spec, index) until the other side closes the connection, even while an item is made.

    A reply is ("value", value), or (the exception's class, its text).
    """
    folder = tempfile.mkdtemp(prefix="g2rl-items-")
    os.chdir(folder)  # codeio's programs write files
    connection = Connection(descriptor)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                requests.put(connection.recv())
            except (EOFError, OSError):
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    maker = Maker()
    while True:
        request = requests.get()
        try:
            reply: Any = ("value", maker.reply(*request))
        except BaseException as error:
            reply = (type(error).__name__, str(error)[:2000])
        connection.send(reply)
