"""What all commands share: one error ladder, and one way to override a key (`key=value`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ..errors import CommandError, one_line, out_of_memory

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


def as_options(words: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`key=value` words as `--key=value` where the parser has that option; other words unchanged.

    A flag takes key=true and key=false.
    """
    actions, options = _options(parser), []
    for word in words:
        key, equals, value = word.partition("=")
        option = next((o for o in (f"--{key}", f"--{key.replace('_', '-')}") if o in actions), None)
        if not equals or option is None:
            options.append(word)
        elif actions[option].nargs == 0 and value in ("true", "false"):
            options += [option] if value == "true" else []
        else:
            options.append(f"{option}={value}")
    return options


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options of a parser and of its subcommands, by name."""
    found = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _options(command)
    return found
