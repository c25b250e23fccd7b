"""What all commands share: one error ladder, and one way to override a key (`key=value`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..errors import CommandError, one_line, out_of_memory
from ..trainer.config import split_override

__all__ = ["FAILED", "INTERRUPTED", "as_options", "run_command", "split_override"]

FAILED, INTERRUPTED = 2, 130  # exit codes


def run_command(
    program: str, work: Callable[[], int], *, interrupted: str, memory: str, files: str = "", path: str = ""
) -> int:
    """Runs `work`; returns its exit code, FAILED after a one-line error, INTERRUPTED after Ctrl-C.

    Args:
        program: the command's name; starts each message.
        work: raises CommandError for problems that the user can solve. Other exceptions are bugs and keep
            their traceback.
        interrupted: message after Ctrl-C: what is kept, how to continue.
        memory: message when memory runs out: which settings to lower.
        files: end of the message when a file cannot be read or written: what is kept, how to continue.
        path: named in that message if the OSError names no file.
    """
    try:
        return work()
    except CommandError as error:
        message = one_line(error, 4000)
    except OSError as error:
        message = f"{error.filename or path}: {error.strerror or error}" + (f"; {files}" if files else "")
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        message = f"out of memory: {memory}"
    print(f"{program}: error: {message}", file=sys.stderr)
    return FAILED


def as_options(words: Sequence[str]) -> list[str]:
    """`key=value` words as `--key=value`, for commands whose keys are options; other words unchanged."""
    options = []
    for word in words:
        if "=" in word and not word.startswith("-"):
            key, value = split_override(word)
            word = f"--{key.replace('_', '-')}={value}"
        options.append(word)
    return options
