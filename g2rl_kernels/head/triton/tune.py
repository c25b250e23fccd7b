"""What `g2rl tune` does: times the configurations of tuning.py on this machine's GPU, and stores the fastest.

They are timed through the functions that head.py and logprobs.py call. A configuration may win only if its
results are those of the shipped one up to rounding, and the same bits when it is run again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .tuning import KINDS, Config

if TYPE_CHECKING:
    from .finish import Statistics

# --dtype -> the tensors' dtype, and what float32 products are to be.
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32x3": (torch.float32, "tf32"),
}

ROUNDS = 9
TOLERANCE = 1e-3  # of the largest number: far above rounding in another order, far below a wrong tile
WORTHWHILE = 0.99  # of the shipped choice's time: what is less than 1 % faster may be so by chance
FLUSH_BYTES = 256 << 20  # several times any L2
LOGITS_BYTES = 1 << 30  # of torch.mm, which goes over the tokens in steps for no more than this

DESCRIPTION = """\
Find the fastest tiles for a model's LM head on this machine's GPU, and keep them for later runs.

The three large kernels come with tiles that were chosen for each generation of GPUs. This command times some
others beside them, for one vocabulary, hidden size and dtype, and stores the fastest in a file that
head_features, linear_logprobs and the trainer look into. It takes a minute or two. Nothing else ever
measures: without such a file the shipped tiles are used, everything works, and results are the same up to
rounding."""

EPILOG = """\
examples:
  g2rl tune --model Qwen/Qwen3-1.7B                 sizes from its configuration; no weights are read
  g2rl tune --vocab 151936 --hidden 2048            the same, by hand
  g2rl tune --vocab 49152 --hidden 576 --dtype fp16 --tokens 4096
  g2rl tune --show                                  what is stored, and where
  g2rl tune --clear                                 back to the shipped tiles
  G2RL_CACHE=/shared/g2rl g2rl tune --model ...     another folder for the file, here and in training

kinds that are timed:
  stats       log-probabilities, logsumexp and entropy: the first of two passes
  residual    the second pass, to the features
  seeded      one pass with known_logprobs, in place of both
  listed      the second pass over half of the tokens, as when confident ones are left out
  gradient    linear_logprobs' gradient of hidden, torch's product included"""


class TuneError(Exception):
    """What the user can do something about, in one line."""


class Size(NamedTuple):
    """Of an LM head; a tuned configuration holds for one of these."""

    V: int
    D: int
    dtype: torch.dtype
    softcap: float | None = None

    @property
    def form(self) -> str:
        """As tuning.form has it for tensors of this size, contiguous as a model's are."""
        rows = torch.empty(1, self.D, dtype=self.dtype)
        return tuning.form(rows, rows, self.softcap is not None)


class Timed(NamedTuple):
    """One configuration of one kind."""

    config: Config
    seconds: float  # NaN if it was not timed
    obstacle: str  # why it may not be stored; "" if it may


# --- timing -------------------------------------------------------------------------------------------------


def gpu_seconds(call: Callable[[], object], flush: Tensor) -> float:
    """One call between two events, behind a write that leaves nothing of the last one in the L2."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> dict[str, float]:
    """Median time of each. They take turns, so that a GPU whose clock falls slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def obstacle(call: Callable[[], Sequence[Tensor]], shipped: Sequence[Tensor]) -> str:
    """Why what `call` returns keeps it from being stored: "" if it is repeatable, and right."""
    try:
        once, again = call(), call()
    except Exception as error:  # too large for this GPU, or beyond this version of Triton
        lines = str(error).strip().splitlines() or [""]
        return f"fails: {type(error).__name__}: {lines[-1]}"[:100]
    if not all(torch.equal(a, b) for a, b in zip(once, again)):
        return "other bits when run again"
    for found, wanted in zip(once, shipped):
        off = (found - wanted).abs().max() / wanted.abs().max()
        if not off <= TOLERANCE:
            return f"off by {off.item():.1e}"
    return ""


def time_kind(
    calls: Mapping[Config, Callable[[], Sequence[Tensor]]],
    product: Callable[[], object],
    rounds: int,
    seconds: Callable[[Callable[[], object]], float],
) -> tuple[list[Timed], float]:
    """All configurations of a kind, of which the first is the shipped one, and the time of `product`."""
    first, *_ = calls
    shipped = calls[first]()
    obstacles = {config: obstacle(call, shipped) for config, call in calls.items()}
    turns: dict[str, Callable[[], object]] = {"product": product}
    turns |= {str(config): call for config, call in calls.items() if not obstacles[config]}
    found = medians(turns, rounds, seconds)
    nan = float("nan")
    return [Timed(c, found.get(str(c), nan), why) for c, why in obstacles.items()], found["product"]


def winner(rows: Sequence[Timed]) -> Config | None:
    """The fastest that may be stored; the shipped one, first of `rows`, unless another is clearly faster."""
    able = [row for row in rows if not row.obstacle]
    if not able:
        return None
    best = min(able, key=lambda row: row.seconds)
    shipped = rows[0]
    return best.config if shipped.obstacle or best.seconds < WORTHWHILE * shipped.seconds else shipped.config


# --- what is timed ------------------------------------------------------------------------------------------


class Bench:
    """Tensors of one head, and the calls that head.py would make on them."""

    def __init__(self, size: Size, n_tokens: int, device: torch.device):
        from . import driver as ops
        from . import gradients as logprobs
        from .tile import Head

        self.size, self.device, self.ops, self.sweep = size, device, ops, logprobs.sweep
        N = self.N = min(n_tokens, ops.CHUNK)  # longer batches go through the kernels in such chunks
        S = self.S = max(1, N // 1024)
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.empty(N, size.D, device=device, dtype=size.dtype)
        self.hidden.normal_(generator=generator)
        weight = torch.empty(size.V, size.D, device=device, dtype=size.dtype)
        weight.normal_(0.0, 2.0 / size.D**0.5, generator=generator)  # logits spread as a model's do, by 2
        self.weight, self.head = weight, Head(weight, None, 1.0, 1.0, size.softcap)
        tokens = torch.randint(size.V, (N,), device=device, generator=generator)
        cu_seqlens = torch.tensor([N * s // S for s in range(S + 1)], device=device)
        response = torch.searchsorted(cu_seqlens[1:], torch.arange(N, device=device), right=True).int()
        self.chunk = ops.Chunk(self.hidden, tokens, None, response, cu_seqlens)
        n = min(N, ops.SEEDED_CHUNK)
        self.seeded = ops.Chunk(self.hidden[:n], tokens[:n], None, response[:n], cu_seqlens.clamp(max=n))
        self.half = ops._pick(torch.rand(N, device=device, generator=generator) < 0.5, cu_seqlens)
        self.target, _ = ops.head_target(self.hidden, self.head, tokens)
        self.found = self.statistics(tuning.candidates_on(device, size.form)[0])
        most = max(1024, LOGITS_BYTES // (size.V * weight.element_size()))
        self.logits = torch.empty(min(N, most), size.V, device=device, dtype=size.dtype)

    def statistics(self, config: Config) -> Statistics:
        partial = self.ops.head_stats(self.hidden, self.head, self.chunk.tokens, config, tuning.precision())
        return self.ops.head_finish(partial, self.target)

    def call(self, kind: str, config: Config) -> Sequence[Tensor]:
        """One kind's work with one configuration, as head.py or logprobs.py does it."""
        if kind == "stats":
            return self.statistics(config)
        if kind == "gradient":
            return (self.gradient(config),)
        chunk = self.seeded if kind == "seeded" else self.chunk
        n = chunk.hidden.shape[0]
        totals = torch.zeros(2, n, device=self.device) if kind == "seeded" else None
        features = torch.zeros(self.S, self.size.D, device=self.device)
        listed = self.half if kind == "listed" else None
        with tuning.trial(config):
            shift = self.found.lse2[:n]
            self.ops._accumulate(chunk, self.head, features, shift, totals=totals, listed=listed)
        return (features,) if totals is None else (features, totals)

    def gradient(self, config: Config) -> Tensor:
        """[N, d], of the sum of the log-probabilities."""
        found, nothing = self.found, torch.zeros_like(self.found.rest)
        total = torch.zeros(self.N, self.size.D, device=self.device)
        with tuning.trial(config):
            self.sweep(
                self.hidden, self.weight, self.chunk.tokens, None, torch.stack([found.logsumexp, nothing]),
                torch.stack([nothing + 1, nothing, found.rest]), 1.0, 1.0, self.size.softcap or 0.0,
                0, self.size.V, total, None, None,
            )  # fmt: skip
        return total

    def product(self, kind: str) -> None:
        """torch.mm of the logits that this kind looks at."""
        n = {"listed": self.N // 2, "seeded": self.seeded.hidden.shape[0]}.get(kind, self.N)
        for start in range(0, n, len(self.logits)):
            rows = self.hidden[start : min(n, start + len(self.logits))]
            torch.mm(rows, self.weight.T, out=self.logits[: len(rows)])


# Kind -> the times of its configurations, and that of torch.mm of the same logits.
Measured = dict[str, tuple[list[Timed], float]]
Measure = Callable[[Size, int, int, torch.device], Measured]


def measure(size: Size, n_tokens: int, rounds: int, device: torch.device) -> Measured:
    bench = Bench(size, n_tokens, device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    found: Measured = {}
    for kind in KINDS:
        configs = tuning.candidates_on(device, size.form)
        print(f"{kind}: {len(configs)} configurations", file=sys.stderr, flush=True)
        calls = {config: partial(bench.call, kind, config) for config in configs}
        seconds = partial(gpu_seconds, flush=flush)
        found[kind] = time_kind(calls, partial(bench.product, kind), rounds, seconds)
    return found


# --- the command --------------------------------------------------------------------------------------------


def words(config: Config) -> str:
    tiles = f"{config.BM} x {config.BN} x {config.BK}, {config.num_warps} warps, {config.num_stages} stages"
    return tiles + (f", {config.programs_per_sm} programs" if config.programs_per_sm > 1 else "")


def table(measured: Measured, won: Mapping[str, Config], before: Mapping[str, Config | None]) -> str:
    """One row for each configuration of each kind."""
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
    """The device that is tuned for."""
    nothing_lost = "nothing is lost: on GPUs head_features uses the shipped tiles"
    if not torch.cuda.is_available():
        hopper = words(tuning.candidates(9, "plain")[0])
        raise TuneError(f"torch sees no GPU here; {nothing_lost} (on Hopper in 16 bits {hopper})")
    device = torch.device("cuda", torch.cuda.current_device())
    if find_spec("triton") is None:
        raise TuneError(f"triton is not installed, and the tiles are its kernels'; {nothing_lost} once it is")
    return device


def model_size(name: str, dtype: torch.dtype) -> Size:
    """From a transformers configuration: a folder with config.json, or a name on the hub."""
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
        "--model", metavar="PATH_OR_NAME", help="take sizes and softcap from its configuration"
    )
    found.add_argument("--vocab", type=positive, metavar="V", help="rows of the head's weight")
    found.add_argument("--hidden", type=positive, metavar="d", help="columns of the head's weight")
    found.add_argument(
        "--softcap", type=float, metavar="c", help="the head has one on its logits (Gemma 2: 30)"
    )
    found.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="bf16 (default); fp32 is IEEE, tf32x3 is what torch."
        "set_float32_matmul_precision('high') asks for",
    )  # fmt: skip
    found.add_argument("--tokens", type=positive, default=16384, help="of a batch (default: 16384)")
    found.add_argument(
        "--rounds", type=positive, default=ROUNDS, help=f"medians of these (default: {ROUNDS})"
    )
    found.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be timed, without a GPU on sm_90; time nothing",
    )
    found.add_argument("--show", action="store_true", help="what is stored, and where")
    found.add_argument("--clear", action="store_true", help="remove what is stored")
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
    stored = tuning.tuned(tuning.cache_file())  # before minutes are spent: it may be damaged
    before = {kind: stored.get(key) for kind, key in keys.items()}
    measured = measure(size, args.tokens, args.rounds, device)
    won = {kind: best for kind, (timed, _) in measured.items() if (best := winner(timed))}
    print(table(measured, won, before))
    if won:
        path = tuning.store({keys[kind]: config for kind, config in won.items()})
        print(f"stored in {path}; head_features takes them from there for this GPU and these sizes")


def main(argv: Sequence[str] | None = None, measure: Measure = measure) -> int:
    """`g2rl tune`; returns the exit status: 0, or 2 after a one-line error."""
    args = parser().parse_args(argv)
    try:
        run(args, measure)
    except (TuneError, ValueError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or tuning.cache_file()}: {error.strerror or error}"
    except torch.OutOfMemoryError:
        message = "out of GPU memory: lower --tokens, or free the GPU"
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was stored", file=sys.stderr)
        return 130
    else:
        return 0
    print(f"g2rl tune: error: {message}", file=sys.stderr)
    return 2
