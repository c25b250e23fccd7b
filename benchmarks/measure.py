"""Time, memory, the machine and tables: what the benchmarks of all ops share."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import g2rl_kernels as g2
from g2rl_kernels import _C
from g2rl_kernels.errors import PACKAGES, out_of_memory
from g2rl_kernels.versions import installed

from .methods import Unavailable
from .registry import DTYPES
from .rows import LeftOut

T = TypeVar("T")

ROUNDS_A_PLACEMENT = 5
LEAST_ROUNDS = 3
M_MMAP_THRESHOLD = -3  # malloc.h
FLUSH_BYTES = 256 << 20  # several times any GPU's L2


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


STARTED = time.perf_counter()


def progress(text: str, often: bool = False) -> None:
    """Writes one line on stderr, over the last one; "" ends it. Lines that come `often` are left out of log
    files."""
    line = f"{time.perf_counter() - STARTED:5.0f} s  {text}" if text else ""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="" if text else "\n", file=sys.stderr, flush=True)
    elif text and not often:
        print(line, file=sys.stderr, flush=True)


# --- time ---------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Turns:
    """Times calls in turns, round by round, so that a machine which slows down slows all of them.

    On a GPU each call stands between two CUDA events, after a write of 256 MB that empties the L2; the host
    waits for the device only at the end of a round. On a CPU it is wall time.
    """

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if device == "cuda" else None

    def round(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Seconds of one call of each."""
        if self.flush is None:
            return {name: seconds(call) for name, call in calls.items()}
        events = {}
        for name, call in calls.items():
            events[name] = start, stop = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return {name: start.elapsed_time(stop) / 1e3 for name, (start, stop) in events.items()}


def in_turns(
    device: str,
    label: str,
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    budget: float = float("inf"),
    moved: Callable[[], Mapping[str, Callable[[], Any]]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in every round, after one round to warm up. Fewer rounds, at least 3, where they
    would take more than `budget` seconds.

    On a CPU the placement of tensors in memory changes torch's product by up to 15 %: every few rounds
    `moved` gives the same calls on tensors placed elsewhere.
    """
    turns, times = Turns(device), {name: list[float]() for name in calls}
    turns.round(calls)
    started = time.perf_counter()
    for round_ in range(rounds):
        spent = time.perf_counter() - started
        if round_ >= LEAST_ROUNDS and spent + spent / round_ > budget:
            break
        progress(f"{label}: round {round_ + 1}/{rounds}", often=True)
        if moved and device == "cpu" and round_ and round_ % ROUNDS_A_PLACEMENT == 0:
            calls = moved()
            turns.round(calls)
        for name, value in turns.round(calls).items():
            times[name].append(value)
    progress("")
    return times


def quantiles(values: list[float]) -> list[float]:
    """20, 50 and 80 %."""
    ordered = sorted(values)
    return [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)]


def settle_clocks(device: str, a_while: float = 0.5) -> dict[str, Any]:
    """Keeps a GPU busy until its clocks are those of a long run; returns what nvidia-smi says under load."""
    if device != "cuda":
        return {}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.perf_counter() + a_while
    while time.perf_counter() < until:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
    for _ in range(1000):  # about a second of work, on which nvidia-smi looks
        a @ a
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit")
    found = _nvidia_smi(fields)
    torch.cuda.synchronize()
    return found


PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


def ceilings(device: str) -> dict[str, Any]:
    """The highest rates measured on this machine: a large product of random numbers, in TFLOP/s by dtype, and
    a large copy, in GB/s read and written. Medians of five."""
    n, size, generator = PRODUCT_SIZE[device], COPY_BYTES[device], torch.Generator(device).manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("bf16", "fp32"):
        a, b = (torch.randn(n, n, device=device, generator=generator).to(DTYPES[name]) for _ in range(2))
        calls[name] = partial(torch.mm, a, b.T, out=torch.empty_like(a))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    calls["copy"] = partial(source.clone().copy_, source)
    turns = Turns(device)
    rounds = [turns.round(calls) for _ in range(6)][1:]
    found = {name: statistics.median(one[name] for one in rounds) for name in calls}
    rates = {name: 2e-12 * n**3 / found[name] for name in ("bf16", "fp32")}
    return {
        "product_size": n,
        "product_tflops": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
        "copy_gb_s": float(f"{2e-9 * size / found['copy']:.4g}"),
    }


def least_seconds(machine: Mapping[str, Any], dtype: str, flops: float, bytes_: float) -> float | None:
    """Seconds that so much work takes at the machine's ceilings, the slower of compute and memory. fp16
    counts as bf16. None for results of versions that did not measure ceilings."""
    measured = machine.get("ceilings")
    if not measured:
        return None
    rate = measured["product_tflops"]["fp32" if dtype == "fp32" else "bf16"]
    return float(max(flops / (rate * 1e12), bytes_ / (measured["copy_gb_s"] * 1e9)))


def _nvidia_smi(fields: tuple[str, ...]) -> dict[str, Any]:
    if not shutil.which("nvidia-smi"):
        return {}
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")] if done.stdout else []
    return dict(zip(fields, values)) if done.returncode == 0 else {}


# --- memory -------------------------------------------------------------------------------------------------


def extra_memory(
    device: str, call: Callable[[], T], warm: Callable[[], Any] = lambda: None
) -> tuple[float | None, T]:
    """Bytes held at the call's peak beyond those held before it (its outputs included), and the outputs.

    On a GPU: memory of torch's allocator. On a CPU: resident memory, in a new thread: the op
    keeps its workspace for the thread's next call, and a new thread has no workspace yet. `warm` runs before
    the call, so that the thread's own start-up is not counted. None where unknown.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before), out
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: (warm(), _resident_growth(call))[1]).result()


def _resident_growth(call: Callable[[], T]) -> tuple[float | None, T]:
    status = Path("/proc/self/status")

    def read(key: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)  # so that buffers do not reuse memory of earlier calls
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = read("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None, call()
    out = call()
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaptation ends
    return float(max(read("VmHWM") - before, 0)), out


# --- what cannot be measured --------------------------------------------------------------------------------


def attempts(
    device: str, label: str, calls: Mapping[str, Callable[[], T]]
) -> tuple[dict[str, T], list[LeftOut]]:
    """The results of the calls by name, and the reasons of those that raised."""
    found: dict[str, T] = {}
    left_out: list[LeftOut] = []
    for name, call in calls.items():
        progress(f"{label}: {name}, first call")
        with released(device):
            try:
                found[name] = call()
            except Exception as error:
                left_out.append(why_not(label, name, error))
    return found, left_out


def why_not(case: str, method: str, error: Exception) -> LeftOut:
    """The reason in one line. Missing packages and out-of-memory are not counted as faults."""
    reason, fault = _reason(error)
    return {"case": case, "method": method, "reason": reason, "fault": fault}


def _reason(error: Exception) -> tuple[str, bool]:
    """The reason in one line, and whether it is a fault."""
    text = re.sub(r"(/[\w.+-]+)+/", "", " ".join(str(error).split()))[:240]  # no paths of this machine
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("g2rl"):
        remedy = ": pip install 'g2rl-kernels[train]'" if error.name in PACKAGES else ""
        return text + remedy, False
    if isinstance(error, (Unavailable, NotImplementedError)):
        return text, False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory", False
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return "out of memory", False
    return f"{type(error).__name__}: {text}", True


@contextmanager
def released(device: str) -> Iterator[None]:
    """Frees, for the next block, the memory that this one no longer uses."""
    try:
        yield
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


# --- where the time goes ------------------------------------------------------------------------------------


def profile(device: str, title: str, calls: Mapping[str, Callable[[], Any]], path: Path) -> None:
    """Writes the time of one call by kernel, as torch.profiler measures it, for every call that runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    parts = [f"{title}: one call of each method\n"]
    for name, call in calls.items():
        progress(f"profile: {name}")
        with released(device):
            try:
                call()
                synchronize(device)
                with record(activities=kinds) as recorded:
                    call()
                    synchronize(device)
                text = recorded.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)
            except Exception as error:
                text = _reason(error)[0]
        parts.append(f"== {name}\n{text}\n")
    progress("")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


# --- tables -------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows of cells by column; columns that are empty in all rows are left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows])


def spread(values: list[float], form: str, unit: str = "") -> str:
    """Median and quantiles, as `quantiles` gives them, in a cell."""
    low, mid, high = (format(value, form) for value in values)
    return f"**{mid}{unit}** ({low} to {high})"


def span(values: Iterable[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


# --- the machine --------------------------------------------------------------------------------------------


def machine(device: str, rates: bool = True) -> dict[str, Any]:
    """The machine and versions that a figure depends on: the header of every result.

    rates: with the `ceilings`, which take seconds on a slow CPU.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line]
        values = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines)}
        family, model = values.get("cpu family"), values.get("model")
        cpu = f"{values.get('model name', cpu)} (family {family}, model {model})"
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _C.chosen_isa(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "g2rl_kernels": g2.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "fp32_products": torch.backends.cuda.matmul.fp32_precision,
            "packages": {
                n: v for n in ("cut-cross-entropy", "liger-kernel", "quack-kernels") if (v := installed(n))
            },
            **settle_clocks(device),
        }
    if not rates:
        return found
    with released(device):
        return found | {"ceilings": ceilings(device)}


def ceilings_line(machine: Mapping[str, Any]) -> str:
    """The ceilings in a sentence; "" for results of versions that did not measure them."""
    measured = machine.get("ceilings")
    if not measured:
        return ""
    products = " and ".join(f"{rate:.3g} ({name})" for name, rate in measured["product_tflops"].items())
    return (
        f"Ceilings in this run: products of {measured['product_size']} cubed at {products} TFLOP/s, "
        f"a copy at {measured['copy_gb_s']:.4g} GB/s, read and written."
    )


def header(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    if "gpu" not in machine:
        return "{cpu}, {threads} threads, {isa}, torch {torch}, {date}".format(**machine)
    clock = (
        f"{machine['clocks.sm']} of {machine['clocks.max.sm']}" if "clocks.sm" in machine else "clock unknown"
    )
    driver = machine.get("driver_version", "unknown")
    return (
        f"{machine['gpu']}, {clock} under load, driver {driver}, torch {machine['torch']}, "
        f"triton {machine['triton']}, {machine['date']}"
    )
