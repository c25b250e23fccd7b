"""The cost of G2RL in a training step, on paper: FLOPs, bytes, messages and seconds, from one GPU to 1024.

docs/scaling.md explains the equations and symbols; `g2rl bench scaling` prints its tables, and `python -m
benchmarks.scaling` puts them into it. Nothing is measured: a GPU is five numbers and three assumed
efficiencies (`GPU`), a model its shape (`MODELS`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

V = 151936  # Qwen3's vocabulary


@dataclass(frozen=True)
class Model:
    """The shape of a Qwen3."""

    name: str
    d: int  # hidden size
    layers: int
    heads: int  # of 128 each
    kv_heads: int
    f: int  # intermediate size, of one expert
    tied: bool
    experts: int = 1
    active: int = 1

    def layer_parameters(self, experts: int) -> int:
        """Parameters in the matrices of a layer that has, or uses, so many experts."""
        attention = 128 * self.d * (2 * self.heads + 2 * self.kv_heads)
        router = self.d * self.experts if self.experts > 1 else 0
        return attention + router + 3 * self.d * self.f * experts

    @property
    def parameters(self) -> int:
        """P: all parameters, which are stored and trained."""
        return self.layers * self.layer_parameters(self.experts) + V * self.d * (1 if self.tied else 2)

    @property
    def cache_bytes(self) -> int:
        """k: bytes of a token's keys and values, in 16 bits."""
        return 2 * 2 * 128 * self.kv_heads * self.layers

    def forward(self, context: float) -> float:
        """F: FLOPs of a token that sees `context` others, without the head."""
        attention = 4 * 128 * self.heads * self.layers * context
        return 2 * self.layers * self.layer_parameters(self.active) + attention

    @property
    def head(self) -> int:
        """2 V d: FLOPs of a token's logits, one pass over the head."""
        return 2 * V * self.d

    def weights_read(self, batch: float) -> float:
        """Bytes of weights that a decoding step of `batch` sequences reads; only experts that a sequence
        chose count."""
        used = self.experts * (1 - (1 - self.active / self.experts) ** batch) if self.experts > 1 else 1
        layers = self.layers * (self.layer_parameters(0) + 3 * self.d * self.f * used)
        return 2 * (layers + V * self.d)


MODELS = {
    model.name: model
    for model in (
        Model("1.7B", 2048, 28, 16, 8, 6144, True),
        Model("4B", 2560, 36, 32, 8, 9728, True),
        Model("8B", 4096, 36, 32, 8, 12288, False),
        Model("14B", 5120, 40, 40, 8, 17408, False),
        Model("32B", 5120, 64, 64, 8, 25600, False),
        Model("30B-A3B", 2048, 48, 32, 4, 768, False, 128, 8),
        Model("235B-A22B", 4096, 94, 64, 4, 1536, False, 128, 8),
    )
}


@dataclass(frozen=True)
class GPU:
    """An H100 SXM by its data sheet, and the shares of it that programs reach, which are assumed."""

    flops: float = 989e12  # bf16, dense, a second
    memory: float = 80e9  # bytes
    bandwidth: float = 3.35e12  # bytes a second, of memory
    network: float = 50e9  # bytes a second, between GPUs of different machines
    latency: float = 20e-6  # seconds, of one step of a collective
    training: float = 0.4  # share of flops in forward and backward passes
    head: float = 0.6  # share of flops in the head's products
    decoding: float = 0.6  # share of bandwidth when tokens are generated


@dataclass(frozen=True)
class Setting:
    """The sizes of a step; the defaults are the paper's for 1.7B (see `paper`)."""

    responses: int = 256  # S: 16 prompts, 16 rollouts each
    group: int = 16  # m
    micro: int = 2  # responses a forward pass
    prompt: int = 256  # tokens a prompt
    response: int = 8192  # L: tokens a response

    @property
    def tokens(self) -> int:
        """N: tokens of all responses."""
        return self.responses * self.response

    @property
    def context(self) -> float:
        """Tokens that a token sees, on average."""
        return self.prompt + self.response / 2


def paper(model: Model) -> Setting:
    """The paper's step: 8k tokens a response for 1.7B, 12k for larger models, as for its 4B."""
    return Setting(response=8192 if model.name == "1.7B" else 12288)


# --- one step: FLOPs ----------------------------------------------------------------------------------------


def forward_flops(model: Model, s: Setting) -> float:
    """A forward pass over prompts and responses, with the head on responses only."""
    prompt = s.responses * s.prompt * model.forward(s.prompt / 2)
    return s.tokens * (model.forward(s.context) + model.head) + prompt


def update_flops(model: Model, s: Setting) -> float:
    """Forward, the forward pass again for gradient checkpointing, and backward: 4 forward passes."""
    return 4 * forward_flops(model, s)


def second_pass_flops(model: Model, s: Setting) -> float:
    """The logits again, without known log-probs."""
    return s.tokens * model.head


def projection_flops(model: Model, s: Setting) -> float:
    """A W, with a row of A for each response, and the realised tokens' rows of W."""
    return s.responses * model.head + 2 * s.tokens * model.d


def geometry_flops(model: Model, s: Setting) -> float:
    """Cosines in each group."""
    return 2 * s.responses * s.group * model.d


# --- one step: seconds on G GPUs ----------------------------------------------------------------------------


def fits(model: Model, gpus: int, gpu: GPU) -> bool:
    """Whether 16 bytes a parameter (weights, gradients, AdamW in float32) fit in 80 % of all memory."""
    return 16 * model.parameters <= 0.8 * gpu.memory * gpus


def generator(model: Model, gpu: GPU) -> int:
    """GPUs of one copy of the generator: the least power of two that leaves 40 % of memory for caches."""
    return 2 ** max(0, math.ceil(math.log2(2 * model.parameters / (0.6 * gpu.memory))))


def generation_seconds(model: Model, s: Setting, gpus: int, gpu: GPU) -> float:
    """Decoding steps, each bound by the bytes of weights and caches that it reads, or by FLOPs.

    The sequences of a copy run together if their caches fit, else in waves.
    """
    t = min(generator(model, gpu), gpus)
    share = max(1.0, s.responses / (gpus // t))  # sequences of a copy; GPUs beyond whole copies are idle
    room = 0.9 * gpu.memory * t - 2 * model.parameters
    waves = max(1, math.ceil(share * (s.prompt + s.response) * model.cache_bytes / room))
    read = s.response * (waves * model.weights_read(share / waves) + share * s.context * model.cache_bytes)
    flops = share * s.response * (model.forward(s.context) + model.head)
    return max(read / (t * gpu.bandwidth * gpu.decoding), flops / (t * gpu.flops * gpu.training))


def collective_seconds(size: float, gpus: int, gpu: GPU) -> float:
    """All-gather of `size` bytes in total: each GPU receives the others' shares."""
    if gpus == 1:
        return 0.0
    return size * (gpus - 1) / gpus / gpu.network + math.ceil(math.log2(gpus)) * gpu.latency


def feature_seconds(model: Model, s: Setting, gpus: int, gpu: GPU, known: bool) -> float:
    """Seconds of the feature beyond the log-probs' pass over the head: the second pass (unless log-probs are
    known), A W, the geometry (the same on each GPU), and the features' all-gather.

    With more GPUs than responses, GPUs that share a response split the vocabulary.
    """
    second = 0.0 if known else second_pass_flops(model, s) / gpus
    flops = second + projection_flops(model, s) / gpus + geometry_flops(model, s)
    calls = math.ceil(s.responses / gpus / s.micro)
    shards = max(1, gpus // s.responses)
    passes = calls * (1 if known else 2)  # over W: for A W, and for the second pass
    reads = passes * 2 * V * model.d / shards + 2 * s.tokens * model.d / gpus
    local = max(flops / (gpu.flops * gpu.head), reads / gpu.bandwidth)
    return local + collective_seconds(feature_bytes(s.responses, model.d), gpus, gpu)


@dataclass(frozen=True)
class Step:
    """Seconds of the phases of a step."""

    generation: float
    forward: float  # old log-probs; the reference model takes as long
    update: float
    two_passes: float  # features without known_logprobs
    known: float  # features with known_logprobs

    @property
    def training(self) -> float:
        """GRPO after generation, with old log-probs and KL."""
        return 2 * self.forward + self.update


def step(model: Model, s: Setting, gpus: int, gpu: GPU) -> Step:
    rate = gpus * gpu.flops * gpu.training
    return Step(
        generation_seconds(model, s, gpus, gpu),
        forward_flops(model, s) / rate,
        update_flops(model, s) / rate,
        feature_seconds(model, s, gpus, gpu, known=False),
        feature_seconds(model, s, gpus, gpu, known=True),
    )


# --- the head's gradients: memory for time ------------------------------------------------------------------


def kept_bytes(tokens: int, memory: float) -> float:
    """Bytes of bf16 logits that `logits_memory` keeps: units of 256 entries, 2 bytes a logit and 4 for 32."""
    unit = tokens * 256 * (2 + 4 / 32)
    return min(math.ceil(V / 256), memory // unit) * unit


def gradient_seconds(tokens: int, d: int, memory: float, gpu: GPU) -> float:
    """Forward and backward of `linear_logprobs`: four products of N V d less those of kept logits, which are
    written once and read once. What other kernels do beside products is not in it."""
    kept = kept_bytes(tokens, memory)
    share = kept / kept_bytes(tokens, math.inf)
    product = 2 * tokens * V * d / (gpu.flops * gpu.head)
    return (4 - share) * product + 2 * kept / (gpu.bandwidth * gpu.decoding)


# --- one step: bytes over the network -----------------------------------------------------------------------


def feature_bytes(responses: int, d: int) -> int:
    """[responses, d] float32: gathered by all GPUs once a step; summed over the ranks of a vocabulary."""
    return 4 * responses * d


def statistics_bytes(tokens: int, ranks: int) -> int:
    """[ranks, 4, tokens] float32 that each rank of a vocabulary-parallel head holds after the gather."""
    return 4 * 4 * tokens * ranks


def gradient_bytes(tokens: int, d: int) -> int:
    """[tokens, d] float32, summed over ranks in the backward pass of a vocabulary-parallel head."""
    return 4 * tokens * d


# --- tables -------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return "< 0.001 %" if share < 1e-5 else f"{100 * share:.2g} %"


def seconds(value: float) -> str:
    return f"{1000 * value:.2g} ms" if value < 0.1 else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2g} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def flops_table(models: Sequence[Model]) -> str:
    """PFLOP of a step."""
    columns = ["model", "tokens N", "generation", "old log p", "reference", "update", "second pass", "A W"]
    columns += ["geometry", "**G2RL / GRPO**: two passes", "log p known"]
    rows = []
    for model in models:
        s = paper(model)
        forward = forward_flops(model, s)
        grpo = [forward, forward, forward, update_flops(model, s)]
        extra = [second_pass_flops(model, s), projection_flops(model, s), geometry_flops(model, s)]
        cells = [f"{flops / 1e15:.2g}" if flops < 1e17 else f"{flops / 1e15:.0f}" for flops in grpo + extra]
        shares = [percent(sum(added) / sum(grpo)) for added in (extra, extra[1:])]
        rows.append([model.name, f"{s.tokens / 1e6:.1f}M", *cells, *shares])
    return table(columns, rows)


def seconds_table(models: Sequence[Model], gpus: Sequence[int], response: int | None = None) -> str:
    """Seconds of the paper's step, or of one with responses of another length, for models that fit."""
    columns = ["model", "GPUs", "generation", "old log p", "update", "features: two passes", "log p known"]
    columns += ["**G2RL / GRPO**: two passes", "log p known", "two passes, generation elsewhere"]
    columns += ["old forward for G2RL alone"]
    gpu, rows = GPU(), []
    for model in models:
        s = paper(model) if response is None else Setting(response=response)
        for count in gpus:
            if not fits(model, count, gpu):
                continue
            t = step(model, s, count, gpu)
            shares = [t.two_passes / (t.generation + t.training), t.known / (t.generation + t.training)]
            shares += [t.two_passes / t.training]
            shares += [(t.forward + t.two_passes) / (t.generation + t.training - t.forward)]
            cells = map(seconds, (t.generation, t.forward, t.update, t.two_passes, t.known))
            rows.append([model.name, str(count), *cells, *map(percent, shares)])
    return table(columns, rows)


def dial_table(tokens: int = 16384, sizes: Sequence[int] = (2048, 4096)) -> str:
    """What `logits_memory` costs and saves, in the bare products' time."""
    columns = ["d", "`logits_memory`", "kept", "of all logits", "forward and backward", "/ bare products"]
    gpu, rows = GPU(), []
    for d in sizes:
        bare = 3 * 2 * tokens * V * d / (gpu.flops * gpu.head)
        for name, memory in (("0", 0), ("64 MiB", 1 << 26), ("1 GiB", 1 << 30), ("all", math.inf)):
            kept = kept_bytes(tokens, memory)
            took = gradient_seconds(tokens, d, memory, gpu)
            share = f"{100 * kept / kept_bytes(tokens, math.inf):.3g} %"
            rows.append([str(d), name, megabytes(kept), share, f"{1000 * took:.1f} ms", f"{took / bare:.3f}"])
    return table(columns, rows)


def network_table(models: Sequence[Model], ranks: int = 8, tokens: int = 16384) -> str:
    """Bytes of a step's features, and of a vocabulary-parallel head for `tokens` tokens."""
    columns = ["model", "features of a step", f"{tokens} tokens on {ranks} ranks: statistics", "features"]
    columns += ["hidden's gradient", "beside them: W"]
    rows = []
    for model in models:
        s = paper(model)
        sizes = [feature_bytes(s.responses, model.d), statistics_bytes(tokens, ranks)]
        sizes += [feature_bytes(math.ceil(tokens / s.response), model.d), gradient_bytes(tokens, model.d)]
        rows.append([model.name, *map(megabytes, [*sizes, 2 * V * model.d])])
    return table(columns, rows)


def measured_table(file: Path) -> str:
    """Time of 7 more rows of A W on a CPU, from a result of `g2rl bench head`."""
    columns = ["N x V x d, dtype", "time / logits product, 1 response", "8 responses", "7 rows more", "7 / N"]
    ratios: dict[str, dict[Any, float]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        if row["method"] in ("g2rl-kernels, 1 response", "g2rl-kernels, 8 responses"):
            case = f"{row['N']} x {row['V']} x {row['d']}, {row['dtype']}"
            ratios.setdefault(case, {"N": row["N"]})[row["responses"]] = row["ratio_20_50_80"][1]
    rows = [
        [case, f"{r[1]:.3f}", f"{r[8]:.3f}", f"{r[8] - r[1]:+.3f}", f"{7 / r['N']:.3f}"]
        for case, r in ratios.items()
    ]
    return table(columns, rows)


GPUS = (1, 8, 64, 256, 1024)
SHORT = 1024


def tables() -> dict[str, str]:
    """The tables of docs/scaling.md, by name."""
    models = [*MODELS.values()]
    return {
        "flops": flops_table(models),
        "seconds": seconds_table(models, GPUS),
        "short": seconds_table(models, (1, 8, 64), SHORT),
        "dial": dial_table(),
        "network": network_table(models),
        "measured": measured_table(RESULT),
    }


def report(models: Sequence[Model], gpus: Sequence[int], response: int | None) -> str:
    """The text of `g2rl bench scaling`; FLOPs are those of the paper's step."""
    return "\n\n".join(
        [
            "PFLOP of a step at the paper's lengths:",
            flops_table(models),
            "A step on GPUs, on paper; models that do not fit are left out:",
            seconds_table(models, gpus, response),
            "Memory for time in `linear_logprobs`, 16384 tokens:",
            dial_table(),
            "Bytes over the network:",
            network_table(models),
        ]
    )


ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu-epyc-zen5-2cores.json"
BLOCK = re.compile(r"(<!-- table: scaling (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(text: str) -> str:
    """The document with its tables replaced."""
    found = tables()
    return BLOCK.sub(lambda block: f"{block[1]}{found[block[2]]}\n{block[3]}", text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("python -m benchmarks.scaling writes docs/scaling.md; g2rl bench scaling --help has options")
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
