"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TrainerError


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to write in, which becomes `target` only once all of it is on the disk."""
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():  # safetensors leaves files that nobody else may read
                path.chmod(temporary.stat().st_mode & 0o666)
            flush(path)
        if target.exists():  # rename replaces no directory with files; the new one is on the disk by now
            shutil.rmtree(target)
        os.rename(temporary, target)
        flush(target.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, TrainerError):
            raise
        remedy = "free some disk space and " if "space" in str(error) else ""
        raise TrainerError(
            f"cannot write {target} ({error}): {remedy}start the same command again; "
            "the checkpoint before it is whole"
        ) from error


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Replaces a PNG file by a matplotlib figure in one step."""
    temporary = temporary_name(path)
    figure.savefig(temporary, dpi=dpi, format="png")
    flush(temporary)
    os.replace(temporary, path)


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file in one go."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def flush(path: Path) -> None:
    """Returns when the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
