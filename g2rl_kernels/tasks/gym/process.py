"""The process that makes reasoning-gym's items for this one; maker.py is what runs there.

It is a plain Python with PYTHONHASHSEED=0, so that every process of a run, and one that resumes it, has the
same items. It leaves this process's random state alone.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import tempfile
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ...errors import ConfigError, TrainerError, need
from ..processes import start
from .judge import GymSpec

REQUEST_SECONDS = 600.0  # for one item: a configuration may allow no puzzle at all


class GymProcess:
    """Asks the process, which the first request starts and the end of this process ends. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._said: Any = None  # a file with what it wrote to stderr

    def ask(self, what: str, spec: GymSpec, index: int = -1) -> Any:
        """What `Maker.reply` returns.

        Raises:
            ConfigError: reasoning-gym refuses the configuration, an item cannot be made, or takes too long.
            TrainerError: reasoning-gym is not usable, or the process ended twice.
        """
        about = f"task: reasoning-gym {spec.name}: cfg {spec.cfg}" + f", item {index}" * (index >= 0)
        with self._lock:
            try:
                kind, value = self._exchange((what, spec, index), about)
            except BaseException:
                self.close()  # a late reply must not answer the next request
                raise
        if kind == "value":
            return value
        if kind in ("ImportError", "ModuleNotFoundError"):
            raise need("reasoning-gym", ImportError(value))
        plain = kind in ("TypeError", "ValueError", "AssertionError", "LookupError") and value
        raise ConfigError(f"{about}: {value if plain else f'{kind}: {value}'}")

    def _exchange(self, request: Any, about: str) -> Any:
        for _ in range(2):
            try:
                connection = self._connect()
                connection.send(request)
                if not connection.poll(REQUEST_SECONDS):
                    raise ConfigError(f"{about}: took more than {REQUEST_SECONDS:g} s to make: change cfg")
                return connection.recv()
            except (EOFError, OSError):
                ended = self.close()
        raise TrainerError(f"{about}: the process that makes it ended twice ({ended})")

    def _connect(self) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()
        self._connection, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = start(
                "gym.maker",
                theirs.fileno(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # codeio's programs print
                stderr=self._said,
                pass_fds=[theirs.fileno()],
            )
        return self._connection

    def close(self) -> str:
        """Ends the process. Returns how it ended, for a message."""
        process, connection, said = self._process, self._connection, self._said
        self._process = self._connection = self._said = None
        text = ""
        if connection is not None:
            connection.close()
        if process is not None:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                process.kill()
            text = f"exit code {process.wait()}"
        if said is not None:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            said.close()
            text += "".join(f": {line[:200]}" for line in [line for line in lines if line.strip()][-1:])
        return text


process = GymProcess()


@atexit.register
def close() -> None:
    """Ends the process; a later request starts a new one."""
    process.close()


def _forget() -> None:
    """A forked process must not talk to its parent's."""
    global process
    process = GymProcess()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
