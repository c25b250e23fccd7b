"""Worker processes that ask judges, with limits for each response; worker.py is the other side.

Why not multiprocessing: its processes import the user's script again (or copy this process with its threads
and GPU), and its pools cannot end one request. A worker here is a plain Python without torch that starts in a
fraction of a second. It is ended, and another started, when a response exceeds a limit.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import pickle
import queue
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ..errors import ConfigError, TrainerError, one_line
from .base import Judge
from .processes import start
from .worker import LENGTH

T = TypeVar("T")
R = TypeVar("R")

STARTS = 5  # of a worker that something else ends while it starts
START_SECONDS = 120.0  # for a worker to start, or a judge to load its libraries and data


@dataclass(frozen=True)
class Limits:
    """Limits of verification in worker processes."""

    seconds: float = 5.0  # processor time for a response, up to 1 s more; four times as much on the clock
    memory_gb: float = 4.0  # address space of a worker
    workers: int = 0  # 0: one a core, shared by the processes of this machine, at most 16

    @property
    def wall_seconds(self) -> float:
        """Seconds on the clock for a response: a verifier may sleep, and the machine may be busy."""
        return 4 * self.seconds

    def count(self) -> int:
        """How many workers there are."""
        if self.workers:
            return self.workers
        there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return min(max(there // max(int(ranks) if ranks.isdigit() else 1, 1), 1), 16)

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot work."""
        if not 0 < self.seconds <= 86400:
            raise ConfigError(f"verify_seconds={self.seconds}: must be above 0 and at most 86400")
        if not 0.5 <= self.memory_gb <= 1e6:
            raise ConfigError(f"verify_memory_gb={self.memory_gb}: must be at least 0.5")
        if not 0 <= self.workers <= 1024:
            raise ConfigError(f"verify_workers={self.workers}: must be from 0, one a core, to 1024")


class Reply(NamedTuple):
    """A judge's answer to a request, or why there is none."""

    value: Any
    failure: str | None = None


class Packed(NamedTuple):
    """A judge as workers get it."""

    key: str
    pickled: bytes

    @classmethod
    def of(cls, judge: Judge) -> Packed:
        pickled = _pickled(judge)
        return cls(hashlib.sha256(pickled).hexdigest(), pickled)


class Worker:
    """A worker process, started by the first request."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()  # keys of the judges that the process has
        self.interrupted = False  # the request's result is of no use any more

    def ask(self, judge: Packed, method: str, *arguments: Any) -> Reply:
        """What `method` of worker.py says about the arguments; a failure if it raised or exceeded a limit.

        A process that something else ends is replaced, and asked once more.

        Raises:
            TrainerError: the worker cannot start, the judge cannot be loaded in it, or it was interrupted.
        """
        reply: dict[str, Any] = {}
        for _ in range(2):
            process = self._start()
            new = judge.key not in self._known
            request = _pickled((judge.key, judge.pickled if new else None, method, arguments))
            # The worker's own alarm comes first; it does not run while the judge is loaded
            seconds = self.limits.wall_seconds + (START_SECONDS if new else 2)
            try:
                reply = _exchange(process, request, seconds)
            except TimeoutError:
                self.close()
                if new:
                    raise TrainerError(
                        f"verify: a verifier was not loaded within {START_SECONDS:g} s in a worker process"
                    ) from None
                return Reply(None, f"TimeoutError: took more than {self.limits.wall_seconds:g} s")
            except (OSError, EOFError, ValueError):  # ValueError: no reply of worker.py
                code = self.close()
                if code == -signal.SIGXCPU:
                    what = f"{self.limits.seconds:g} s of processor time"
                    return Reply(None, f"TimeoutError: took more than {what}")
                if code == -signal.SIGALRM:
                    return Reply(None, f"TimeoutError: took more than {self.limits.wall_seconds:g} s")
                continue
            break
        else:
            return Reply(None, f"the verifier's process ended twice ({_ended(code)})")
        if "unusable" in reply:
            self.close()
            raise TrainerError(f"a worker process cannot verify: {reply['unusable']}")
        self._known.add(judge.key)
        if "raised" in reply:
            if reply["raised"].startswith(("MemoryError", "RecursionError")):
                self.close()  # what is left of it is not to be trusted
            return Reply(None, reply["raised"])
        return Reply(reply["value"])

    def interrupt(self) -> None:
        """Ends the process while another thread waits for it, and that thread's request with an error."""
        self.interrupted = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> int | None:
        """Ends the process; returns its exit code, which is negative for a signal."""
        process, self._process, self._known = self._process, None, set()
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            return process.wait(0.2)  # one that a limit has ended keeps its own signal
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        for attempt in range(1, STARTS + 1):
            if self.interrupted:
                raise TrainerError("verify: interrupted")
            with tempfile.TemporaryFile() as said:
                try:
                    return self._launch(said)
                except (OSError, EOFError, ValueError) as error:
                    killed = (self.close() or 0) < 0 and not isinstance(error, TimeoutError)
                    said.seek(0)
                    text = said.read().decode(errors="replace").strip()
                    reason = text.splitlines()[-1] if text else one_line(error)
            if not killed or attempt == STARTS:
                break
        raise TrainerError(f"verify: a worker process cannot start ({reason[:300]})")

    def _launch(self, said: Any) -> subprocess.Popen[bytes]:
        limits = self.limits
        numbers = (limits.seconds, limits.wall_seconds, int(limits.memory_gb * 2**30))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        # Without buffers, which a process forked in the middle of a request would write again, and not
        # stopped by Ctrl-Z, which would not stop its clock
        process = start("worker", *numbers, bufsize=0, start_new_session=True, **pipes)
        self._process = process
        if self.interrupted:
            raise EOFError("interrupted")
        _exchange(process, None, START_SECONDS)
        return process


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # objects raise what they like
        raise TrainerError(
            f"verify: what a worker process needs cannot be pickled ({type(error).__name__}: "
            f"{one_line(error, 200)}): keep plain values in the task's items"
        ) from None


def _exchange(process: subprocess.Popen[bytes], request: bytes | None, seconds: float) -> dict[str, Any]:
    """Sends a request, if there is one, and returns the next reply.

    Raises TimeoutError after `seconds`, OSError and EOFError where the process has ended, ValueError for what
    is no reply.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    end, got, wanted = time.monotonic() + seconds, bytearray(), LENGTH.size
    rest = memoryview(b"" if request is None else LENGTH.pack(len(request)) + request)
    ends = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(ends[0], False)
    waiting = select.poll()
    waiting.register(ends[1], select.POLLIN)
    if rest:
        waiting.register(ends[0], select.POLLOUT)
    while len(got) < wanted:
        ready = waiting.poll(max(end - time.monotonic(), 0) * 1000)
        if not ready:
            raise TimeoutError
        if ready[0][0] == ends[0] and len(ready) == 1:
            rest = rest[os.write(ends[0], rest[: 1 << 20]) :]
            if not rest:
                waiting.unregister(ends[0])
            continue
        part = os.read(ends[1], min(wanted - len(got), 1 << 20))
        if not part:
            raise EOFError("the process has ended")
        got += part
        if wanted == len(got) == LENGTH.size:
            wanted += LENGTH.unpack(got)[0]
    reply = json.loads(got[LENGTH.size :])
    if not isinstance(reply, dict) or reply.keys().isdisjoint(("value", "raised", "unusable")):
        raise ValueError("not a reply")
    return reply


def _ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Pool:
    """The workers of one `Limits`, shared by all threads of this process."""

    def __init__(self, limits: Limits):
        limits.check()
        self.size = limits.count()
        self._workers = [Worker(limits) for _ in range(self.size)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # the last one is warm
        for worker in self._workers:
            self._idle.put(worker)

    def map(self, work: Callable[[Worker, T], R], items: Sequence[T], done: Callable[[], Any]) -> list[R]:
        """work(a worker, item) for each item, in parallel; results in the items' order.

        done: called after each item, in this thread.
        """

        busy: set[Worker] = set()
        lock, stop = threading.Lock(), False

        def one(item: T) -> R:
            worker = self._idle.get()
            try:
                with lock:
                    worker.interrupted = stop
                    busy.add(worker)
                return work(worker, item)
            finally:
                with lock:
                    busy.discard(worker)
                    worker.interrupted = False
                self._idle.put(worker)

        threads = ThreadPoolExecutor(max(min(self.size, len(items)), 1), thread_name_prefix="verify")
        try:
            results = []
            for result in threads.map(one, items):
                results.append(result)
                done()
            return results
        except BaseException:  # Ctrl-C too: nothing is to wait for responses that nobody asks for any more
            with lock:
                stop = True
                for worker in busy:
                    worker.interrupt()
            raise
        finally:
            threads.shutdown(wait=not stop, cancel_futures=True)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


_pools: dict[Limits, Pool] = {}
_lock = threading.Lock()


def pool(limits: Limits) -> Pool:
    """The pool of these limits; its processes start when they are needed and end with this one."""
    with _lock:
        if limits not in _pools:
            _pools[limits] = Pool(limits)
        return _pools[limits]


@atexit.register
def close_all() -> None:
    """Ends all worker processes; later requests start new ones."""
    with _lock:
        while _pools:
            _pools.popitem()[1].close()


def _forget() -> None:
    """A forked process must not talk to its parent's workers."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
