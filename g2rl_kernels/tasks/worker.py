"""What runs in a worker process: reads requests from a pipe, asks a judge, writes replies.

    request    pickle: (judge's key, the pickled judge or None if it is known, method, arguments)
    reply      JSON: {"value": ...} | {"raised": text} | {"unusable": text}

Each is preceded by its length, 4 bytes, little-endian. Requests come from this package alone; replies are
JSON, since a verifier may have been fooled by the text that it read. pool.py is the other side.

A response's processor time is limited by the kernel, which ends this process: code that holds Python's lock,
such as the power of a large number, cannot delay that. So is the time on the clock, should the other side be
gone. Memory is limited for the whole process. Reading requests and loading judges has no limits.

Some scorers of libraries evaluate a response as Python. While a judge works, Python's audit hook refuses to
write files, start or signal processes and use the network: the response then scores 0. That stops accidents
and simple abuse; it is no sandbox against an attacker, for whom a container is the place.
"""

from __future__ import annotations

import ctypes  # noqa: F401 (now, since the guard refuses what its import does)
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

LENGTH = struct.Struct("<I")


def main(seconds: float, wall_seconds: float, memory_bytes: int) -> None:
    """Serves until the other side closes the pipe. The pipe's ends are file descriptors 0 and 1."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # a library that prints must not write into the replies
        os.dup2(nothing, descriptor)
    _write(replies, {"value": "ready"})
    os.dup2(nothing, 2)
    guard = Guard()
    sys.addaudithook(guard)
    judges: dict[str, Any] = {}
    while (request := read_frame(requests)) is not None:
        try:
            key, pickled, method, arguments = pickle.loads(request)
            if pickled is not None:
                judges[key] = _load(pickled)
        except BaseException as error:
            _write(replies, {"unusable": f"{type(error).__name__}: {error}"[:2000]})
            continue
        _limit(resource.RLIMIT_AS, memory_bytes)
        _limit(resource.RLIMIT_CPU, int(time.process_time() + seconds) + 1)  # the kernel counts whole seconds
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        random.seed(0)
        try:
            guard.active = True
            reply = {"value": _METHODS[method](judges[key], *arguments)}
        except BaseException as error:  # SystemExit too: a scorer may call exit()
            reply = {"raised": f"{type(error).__name__}: {error}"[:2000]}
        guard.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
            _limit(which, None)
        _write(replies, reply)


class Guard:
    """An audit hook that, while `active`, refuses what a judge has no need for."""

    # Python's names of audit events: whole ones, and first parts.
    WHOLE = frozenset(
        (
            *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"),
            *("os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr"),
            *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn"),
            *("os.kill", "os.killpg", "signal.pthread_kill", "os.putenv", "os.unsetenv"),
        )
    )
    PARTS = frozenset(("ctypes", "shutil", "socket", "subprocess", "tempfile", "urllib"))
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self.active = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            if path == os.devnull or not (set(mode or "") & set("wax+") or (flags or 0) & self.WRITING):
                return
        elif event not in self.WHOLE and event.partition(".")[0] not in self.PARTS:
            return
        raise PermissionError(f"a verifier may not do this with a response: {event}")


def _load(pickled: bytes) -> Any:
    """Unpickles a judge, and lets it load what it needs, without limits."""
    judge = pickle.loads(pickled)
    if hasattr(judge, "prepare"):
        judge.prepare()
    return judge


def _verdict(judge: Any, completion: str, known: Any, with_answer: bool) -> tuple[float, str | None]:
    score = float(judge.score(completion, known))
    return score, judge.answer(completion, known) if with_answer else None


def _answer(judge: Any, completion: str) -> str | None:
    found: str | None = judge.answer(completion, None)
    return found


def _first_same(judge: Any, text: str, others: list[str]) -> int | None:
    """The index of the first of the other answers that is the same as this one."""
    return next((index for index, other in enumerate(others) if judge.same(other, text)), None)


_METHODS: dict[str, Callable[..., Any]] = {"verdict": _verdict, "answer": _answer, "first_same": _first_same}


def _limit(which: int, value: int | None) -> None:
    """Sets the soft limit of a resource, at most to the hard one; None: to the hard one."""
    hard = resource.getrlimit(which)[1]
    soft = hard if value is None else value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(OSError, ValueError):  # macOS cannot limit memory
        resource.setrlimit(which, (soft, hard))


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None at the end of the stream, also in the middle of a frame."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def _write(stream: BinaryIO, reply: dict[str, Any]) -> None:
    try:
        body = json.dumps(reply).encode()
    except (TypeError, ValueError) as error:  # not a value that a judge may return
        body = json.dumps({"raised": f"{type(error).__name__}: {error}"}).encode()
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()
