"""What all commands share: one ladder of errors, and one way to override a key (`key=value`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..errors import CommandError, ConfigError, one_line, out_of_memory

FAILED, INTERRUPTED = 2, 130  # exit codes


def run_command(
    program: str, work: Callable[[], int], *, interrupted: str, memory: str, files: str = "", path: str = ""
) -> int:
    """Runs `work`; returns its exit code, FAILED after a one-line error, INTERRUPTED after Ctrl-C.

    Args:
        program: the command's name, before each message.
        work: raises CommandError for what the user can mend. What it raises else is a fault and shows its
            traceback.
        interrupted: what becomes of the work on Ctrl-C.
        memory: which settings need less memory.
        files: what becomes of the work where a file cannot be written or read.
        path: what an OSError without a file name is about.
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


def split_override(text: str) -> tuple[str, str]:
    """key and value of `key=value`; ConfigError where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected key=value, e.g. lr=2e-6")
    return key, value


def as_options(words: Sequence[str]) -> list[str]:
    """`key=value` words as `--key=value` options, for commands whose keys are their options."""
    return [
        f"--{word.partition('=')[0].replace('_', '-')}={word.partition('=')[2]}"
        if "=" in word and not word.startswith("-")
        else word
        for word in words
    ]
