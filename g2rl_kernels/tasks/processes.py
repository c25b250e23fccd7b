"""Starts the processes that verify, and that make items: a Python without torch, with a fixed hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Imports a module of tasks/ without g2rl_kernels/__init__.py, which imports torch. Ctrl-C is for the parent.
_BOOT = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)
import importlib, json, sys, types
module, package, sys.path[:], numbers = json.loads(sys.argv[1])
tree = sys.modules["g2rl_kernels"] = types.ModuleType("g2rl_kernels"); tree.__path__ = [package]
importlib.import_module("g2rl_kernels.tasks." + module).main(*numbers)
"""


def start(module: str, *numbers: float, **options: Any) -> subprocess.Popen[bytes]:
    """Runs main(*numbers) of a module of tasks/ in a new process; options are Popen's. Raises OSError."""
    package = str(Path(__file__).resolve().parent.parent)
    here = ""
    with suppress(FileNotFoundError):  # the current directory may be gone
        here = os.getcwd()
    paths = [path or here for path in sys.path if isinstance(path, str) and (path or here)]
    alone = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    call = json.dumps([module, package, paths, numbers])
    if not sys.executable:
        raise OSError("sys.executable is empty: set it to a Python interpreter")
    return subprocess.Popen([sys.executable, "-c", _BOOT, call], env={**os.environ, **alone}, **options)
