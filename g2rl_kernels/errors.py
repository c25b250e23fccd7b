"""Errors with a one-line message: what is wrong and what to do. Commands print only that line."""

from __future__ import annotations

import importlib.util


class CommandError(RuntimeError):
    """A command cannot start or continue."""


class TrainerError(CommandError):
    """A run cannot start or continue."""


class ConfigError(TrainerError, ValueError):
    """A wrong configuration value; raised before any work."""


class RewardError(TrainerError):
    """A task's score failed or was not a finite number; raised before the update that needs it."""


PACKAGES = ("transformers", "safetensors", "yaml", "tqdm", "matplotlib")  # tasks and models may need more


# A build of them fits one build of torch. vLLM brings them, and transformers imports them with its models.
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def check_packages() -> None:
    """Raises TrainerError for a missing package, even one that a run imports only at its end."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise need(package, ImportError("not installed"))


def need(package: str, error: ImportError, extra: str = "train") -> TrainerError:
    """The error for a missing dependency; names the extra of this package that installs it."""
    return TrainerError(f"{package} is not usable here ({error}): pip install 'g2rl-kernels[{extra}]'")


def import_failure(error: BaseException) -> str | None:
    """What to say of an error that began with a failed import, and what to do; None for another error.

    Libraries that import late hide the first error behind others; it names the package at fault.
    """
    chain = [error]
    while True:
        last = chain[-1]
        before = last.__cause__
        if before is None and isinstance(last, ImportError) and not last.__suppress_context__:
            before = last.__context__  # other errors may come after an import that was given up on purpose
        if before is None:
            break
        chain.append(before)
    if not any(isinstance(one, ImportError) for one in chain):
        return None
    what = f"{type(last).__name__}: {one_line(last, 160)}"
    if isinstance(last, ModuleNotFoundError) and last.name:
        return f"an import failed ({what}): pip install {last.name.partition('.')[0]}"
    packages, trace = [""], last.__traceback__
    while trace is not None:
        packages.append(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    # The innermost frame is that of the package at fault, but an extension for another torch fails in torch.
    package = next((name for name in reversed(packages) if name not in ("", "importlib", "torch")), "torch")
    remedy = f"install a {package} that fits the other packages, or uninstall it if nothing needs it"
    if package in BUILT_FOR_TORCH:
        remedy = (
            f"install a {package} that fits this torch, or, as models of text need none: "
            f"pip uninstall {' '.join(BUILT_FOR_TORCH)}"
        )
    return f"an import failed in {package} ({what}): {remedy}"


def one_line(error: BaseException, limit: int = 240) -> str:
    """The error's message on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def short(value: object, limit: int = 200) -> str:
    """The value as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def out_of_memory(error: RuntimeError) -> bool:
    """True for torch's out-of-memory errors, on GPUs and CPUs."""
    said = str(error).lower()
    return "out of memory" in said or "can't allocate memory" in said


def text_fault(text: str) -> str | None:
    """What keeps a text from being tokenized, to follow its name; None if nothing does."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1} is {text[error.start]!r}"
        return f": {where}, half of a surrogate pair: write the whole character"
    return None
