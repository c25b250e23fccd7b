"""`g2rl tune`: times tiles for one head on this machine's GPU (head/triton/tune.py), stores the fastest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch

from ..errors import CommandError
from ..head.triton import tuning
from ..head.triton.tune import Measure, Measured, Size, measure, winner
from ..head.triton.tuning import KINDS, Config
from .common import as_options, run_command

# --dtype -> the tensors' dtype, and the precision of float32 products.
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32x3": (torch.float32, "tf32"),
}

ROUNDS = 9

DESCRIPTION = """\
Find the fastest tiles for a model's LM head on this machine's GPU, and keep them for later runs.

The three large kernels come with tiles that were chosen for each generation of GPUs. This command times
others beside them, for one vocabulary, hidden size and dtype, and stores the fastest in a file that
head_features, linear_logprobs and the trainer read. It takes a minute or two. Without such a file the shipped
tiles are used; results are the same up to rounding."""

EPILOG = """\
examples:
  g2rl tune --model Qwen/Qwen3-1.7B                 sizes from its configuration; no weights are read
  g2rl tune --vocab 151936 --hidden 2048            the same, by hand
  g2rl tune --vocab 49152 --hidden 576 --dtype fp16 --tokens 4096
  g2rl tune --show                                  stored tiles, and their file
  g2rl tune --clear                                 back to the shipped tiles
  g2rl tune vocab=49152 hidden=576                  options as key=value
  G2RL_CACHE=/shared/g2rl g2rl tune --model ...     another folder for the file, here and in training

kinds that are timed:
  stats       log-probabilities, logsumexp and entropy: the first of two passes
  residual    the second pass, to the features
  seeded      one pass with known_logprobs, in place of both
  listed      the second pass over half of the tokens, as when confident ones are left out
  gradient    linear_logprobs' gradient of hidden, torch's product included"""


class TuneError(CommandError):
    """No head, no GPU or no package to tune for."""


def words(config: Config) -> str:
    tiles = f"{config.BM} x {config.BN} x {config.BK}, {config.num_warps} warps, {config.num_stages} stages"
    return tiles + (f", {config.programs_per_sm} programs" if config.programs_per_sm > 1 else "")


def table(measured: Measured, won: Mapping[str, Config], before: Mapping[str, Config | None]) -> str:
    """A line for each configuration of each kind."""
    rows = [("kind", "tiles (tokens x vocabulary x hidden)", "ms", "/ torch.mm", "")]
    for kind, (timed, product) in measured.items():
        for number, row in enumerate(timed):
            said = (
                (number == 0, "shipped"),
                (row.config == before[kind], "stored before"),
                (row.config == won.get(kind), "stored"),
                (bool(row.obstacle), row.obstacle),
            )
            times = ("", "") if row.obstacle else (f"{1e3 * row.seconds:.3f}", f"{row.seconds / product:.3f}")
            rows.append((kind, words(row.config), *times, ", ".join(note for true, note in said if true)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
        for a, b, c, d, e in rows
    )


def gpu() -> torch.device:
    """The current GPU; TuneError without a GPU or Triton."""
    nothing_lost = "nothing is lost: on GPUs head_features uses the shipped tiles"
    if not torch.cuda.is_available():
        hopper = words(tuning.candidates(9, "plain")[0])
        raise TuneError(f"torch sees no GPU here; {nothing_lost} (on Hopper in 16 bits {hopper})")
    device = torch.device("cuda", torch.cuda.current_device())
    if find_spec("triton") is None:
        raise TuneError(f"triton is not installed, and the tiles are its kernels'; {nothing_lost} once it is")
    return device


def model_size(name: str, dtype: torch.dtype) -> Size:
    """The size in a transformers configuration: a folder with config.json, or a name on the hub."""
    if find_spec("transformers") is None:
        raise TuneError(
            "--model needs transformers (pip install 'g2rl-kernels[train]'); or --vocab and --hidden"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TuneError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    text = config.get_text_config()
    try:
        return Size(text.vocab_size, text.hidden_size, dtype, getattr(text, "final_logit_softcapping", None))
    except AttributeError as error:
        raise TuneError(f"--model {name}: {error}; give --vocab and --hidden") from error


def show() -> str:
    path = tuning.cache_file()
    stored = tuning.tuned(path)
    if not stored:
        return f"nothing is stored in {path}: the shipped tiles are used"
    return "\n".join([f"{path}:", *(f"  {name}: {words(config)}" for name, config in stored.items())])


def clear() -> str:
    path = tuning.cache_file()
    there = path.exists()
    path.unlink(missing_ok=True)
    tuning.forget()
    return f"removed {path}" if there else f"there was no {path}"


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser("g2rl tune", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    found.add_argument(
        "--model", metavar="PATH_OR_NAME", help="read sizes and softcap from this model's configuration"
    )
    found.add_argument("--vocab", type=positive, metavar="V", help="rows of the head's weight")
    found.add_argument("--hidden", type=positive, metavar="d", help="columns of the head's weight")
    found.add_argument("--softcap", type=float, metavar="c", help="softcap of the logits (Gemma 2: 30)")
    found.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="bf16 (default); fp32 is IEEE, tf32x3 is what torch."
        "set_float32_matmul_precision('high') asks for",
    )  # fmt: skip
    found.add_argument("--tokens", type=positive, default=16384, help="tokens in a call (default: 16384)")
    found.add_argument(
        "--rounds",
        type=positive,
        default=ROUNDS,
        help=f"timed calls; the median counts (default: {ROUNDS})",
    )
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="list what would be timed (on sm_90 without a GPU), time nothing",
    )
    found.add_argument("--show", action="store_true", help="list stored tiles, and the file")
    found.add_argument("--clear", action="store_true", help="remove the file")
    return found


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def run(args: argparse.Namespace, measure: Measure) -> None:
    if args.show or args.clear:
        print(clear() if args.clear else show())
        return
    dtype, products = DTYPES[args.dtype]
    if (args.model is None) == (args.vocab is None and args.hidden is None):
        raise TuneError("which head? --model PATH_OR_NAME, or --vocab V and --hidden d")
    if args.model is None and (args.vocab is None or args.hidden is None):
        raise TuneError("--vocab and --hidden go together")
    device = None if args.dry_run and not torch.cuda.is_available() else gpu()
    matmul = torch.backends.cuda.matmul
    usual, matmul.fp32_precision = matmul.fp32_precision, products
    try:
        tune(args, dtype, device, measure)
    finally:
        matmul.fp32_precision = usual


def tune(args: argparse.Namespace, dtype: torch.dtype, device: torch.device | None, measure: Measure) -> None:
    size = Size(args.vocab, args.hidden, dtype) if args.model is None else model_size(args.model, dtype)
    if args.softcap is not None:
        size = size._replace(softcap=args.softcap)
    name = "no GPU here; on sm_90" if device is None else torch.cuda.get_device_name(device)
    print(f"{name}, {args.dtype}, V={size.V}, d={size.D}, {size.form}, {args.tokens} tokens")
    if device is None or args.dry_run:
        configs = (
            tuning.candidates(9, size.form) if device is None else tuning.candidates_on(device, size.form)
        )
        for kind in KINDS:
            for config in configs:
                print(f"  {kind}: {words(config)}")
        return
    keys = {kind: tuning.key(name, kind, dtype, size.V, size.D, size.form) for kind in KINDS}
    stored = tuning.tuned(tuning.cache_file())  # fails early if the file is damaged
    before = {kind: stored.get(key) for kind, key in keys.items()}
    measured = measure(size, args.tokens, args.rounds, device)
    won = {kind: best for kind, (timed, _) in measured.items() if (best := winner(timed))}
    print(table(measured, won, before))
    if won:
        path = tuning.store({keys[kind]: config for kind, config in won.items()})
        print(f"stored in {path}; head_features takes them from there for this GPU and these sizes")


def main(argv: Sequence[str], measure: Measure = measure) -> int:
    """Runs `g2rl tune`; returns the exit code: 0, 2 after a one-line error, 130 when interrupted."""
    options = parser()
    args = options.parse_args(as_options(argv, options))

    def work() -> int:
        run(args, measure)
        return 0

    return run_command(
        "g2rl tune",
        work,
        interrupted="nothing was stored",
        memory="lower --tokens, or free the GPU",
        path=str(tuning.cache_file()),
    )
