"""Atomic writes: a file or directory is replaced whole, or not at all.

A kill between two renames leaves the old directory under a temporary name; `remove_temporary` brings it back.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TrainerError

OLD = ".old"  # ends the name of a directory that is being replaced
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")  # `temporary_name`


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8) in one step."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Replaces a PNG file by a matplotlib figure in one step."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields a temporary file name; the file written there replaces `target` once it is on the disk."""
    temporary = temporary_name(target)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory, which replaces `target` once all of its files are on the disk.

    Raises TrainerError if something cannot be written; `target` is then as it was.
    """
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():  # safetensors makes files that only their owner may read
                path.chmod(temporary.stat().st_mode & 0o666)
            flush(path)
        old = temporary_name(target.with_name(target.name + OLD))
        if target.exists():  # os.rename cannot replace a directory that holds files
            os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, TrainerError):
            raise
        remedy = "free some disk space and " if "space" in str(error) else ""
        raise TrainerError(
            f"cannot write {target} ({error}): {remedy}start the same command again; "
            "the previous checkpoint is intact"
        ) from error


def remove_temporary(folder: Path) -> None:
    """Deletes what killed processes left in `folder` under temporary names.

    A directory that was about to be replaced comes back.
    """
    for left in sorted(folder.glob(".*.tmp")):
        found = TEMPORARY.fullmatch(left.name)
        if found is None:
            continue
        target = folder / found["name"].removesuffix(OLD)
        if found["name"].endswith(OLD) and not target.exists():
            os.rename(left, target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def home(path: str) -> str:
    """A user's path, in which ~ stands for the home directory; a name that begins with ~ is a name."""
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def temporary_name(path: Path) -> Path:
    """Name of this process's temporary file or directory beside `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def flush(path: Path) -> None:
    """Returns when the file or directory is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
