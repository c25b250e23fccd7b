"""The time that G2RL adds to a training step: the trainer's own step, with and without G2RL, in turns.

The model has the shape of a Qwen3 and random weights; prompts and responses are random tokens. A step here
starts after generation and verification: old log-probs, features and advantages from one forward pass, then
the policy update. Generation is not measured: it is the same for both, and would make the share smaller.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels.group import reference
from g2rl_kernels.head.spec import HeadSpec
from g2rl_kernels.head.tiled import slices
from g2rl_kernels.models.lm_head import find_head
from g2rl_kernels.trainer import TrainerConfig
from g2rl_kernels.trainer.method_inputs import RolloutInputs
from g2rl_kernels.trainer.sampling import Rollout
from g2rl_kernels.trainer.trainer import MeasuredRollout, Trainer, Verified, _padded

from .measure import Turns, markdown, progress, quantiles, spread, synchronize
from .rows import TrainRow

# hidden, intermediate, layers, heads, key-value heads, size of a head, vocabulary, tied embeddings
MODELS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "tiny": (64, 128, 2, 2, 1, 32, 2048, True),
}


@dataclass(frozen=True)
class Batch:
    """The sizes of a step."""

    responses: int
    group: int  # responses a prompt
    prompt: int  # tokens, the longest
    response: int  # tokens, the longest
    micro: int  # responses a forward pass


BATCHES = {"cuda": Batch(16, 16, 256, 1024, 8), "cpu": Batch(8, 4, 16, 48, 4)}


def make_model(name: str, device: str) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, layers, heads, kv, size, V, tied = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=V,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                head_dim=size,
                tie_word_embeddings=tied,
                max_position_embeddings=4096,
            )
        )


def make_rollout(batch: Batch, V: int, device: str) -> tuple[Rollout, Tensor]:
    """Random tokens, responses of half the longest length or more, and scores of 0 and 1."""
    g = torch.Generator().manual_seed(0)
    S, L = batch.responses, batch.response
    ids = torch.randint(V, (S, batch.prompt + L), generator=g)
    lengths = torch.randint(L // 2, L + 1, (S, 1), generator=g)
    mask = torch.arange(L) < lengths
    attention = torch.cat([torch.ones(S, batch.prompt, dtype=torch.int64), mask.long()], 1)
    scores = torch.randint(2, (S,), generator=g).float()
    truncated = torch.zeros(S, dtype=torch.bool)
    tensors = [tensor.to(device) for tensor in (ids, attention, mask, truncated)]
    return Rollout(tensors[0], tensors[1], tensors[2], tensors[3], [], []), scores.to(device)


class Step(Trainer):
    """A trainer without tasks, tokenizer and files; the rollout is given."""

    def __init__(self, model: Any, config: TrainerConfig):
        config.check()
        config = config.resolved()
        self.model, self.config, self.reference, self.step_number = model, config, None, 0
        self.device = next(model.parameters()).device
        self.head = find_head(model)
        self.ops_dtype = torch.bfloat16 if config.autocast == "bfloat16" else torch.float32
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        nothing: Any = None
        self.inputs = RolloutInputs(config, self.head, nothing, nothing, self.ops_dtype)
        self.trained = [*model.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, fused=True)
        self.feature_seconds: list[float] = []

    def g2rl(self, rollout: Rollout, scores: Tensor) -> None:
        measured = self.measure(rollout, Verified(scores))
        self.feature_seconds.append(measured.feature_seconds)
        self.update(rollout, measured)

    def grpo(self, rollout: Rollout, scores: Tensor) -> None:
        self.update(rollout, self.measure_grpo(rollout, scores))

    @torch.no_grad()
    def measure_grpo(self, rollout: Rollout, scores: Tensor) -> MeasuredRollout:
        """`measure` without features: old log-probs, and eq. 2 on raw rewards."""
        self.model.eval()
        logprobs = torch.zeros(rollout.mask.shape, device=self.device)
        weight, bias = self.head.weights(self.ops_dtype)
        for rows in slices(0, len(scores), self.config.micro_batch_size):
            hidden, tokens, _, mask = self._response_hidden(self.head, rollout, rows)
            packed = logprobs_alone(hidden, weight, tokens, bias, self.head.options(self.config.temperature))
            logprobs[rows, : mask.shape[1]] = _padded(packed, mask)
        rewards = torch.where(scores >= self.config.score_gate, 1.0, -1.0)
        grouped = rewards.view(-1, self.config.group_size)
        everyone = torch.ones_like(grouped, dtype=torch.bool)
        advantages = reference.group_advantages(grouped, everyone, "group", 1e-6)
        geometry: Any = SimpleNamespace(advantages=advantages.flatten())
        return MeasuredRollout(scores, rewards, logprobs, None, 0.0, geometry, 0.0)


def logprobs_alone(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """[N] log-probs, the fastest way without features."""
    if hidden.is_cuda:
        try:
            from g2rl_kernels.head.triton import driver

            head = HeadSpec(weight, bias, **options | {"logit_softcap": options["logit_softcap"] or 0.0})
            return driver.token_statistics(hidden, tokens, head)[0]
        except ImportError:
            pass
    return g2.linear_logprobs(hidden, weight, tokens, bias=bias, **options).logprobs


def measure(name: str, device: str, batch: Batch, rounds: int) -> list[TrainRow]:
    """Rows for one model: the step of GRPO, and that of G2RL with the time it adds."""
    gpu = device == "cuda"
    progress(f"train {name}: model")
    model = make_model(name, device)
    config = TrainerConfig.from_dict(
        {
            "batch_size": batch.responses,
            "group_size": batch.group,
            "micro_batch_size": batch.micro,
            "gradient_checkpointing": gpu,
            "autocast": "bfloat16" if gpu else "none",
        }
    )
    step = Step(model, config)
    rollout, scores = make_rollout(batch, MODELS[name][6], device)
    calls = {"grpo": lambda: step.grpo(rollout, scores), "g2rl": lambda: step.g2rl(rollout, scores)}
    peaks = {}
    for algorithm, call in calls.items():  # warms up, and measures memory
        progress(f"train {name}: {algorithm}, first step")
        if gpu:
            call()
            torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(device)
        peaks[algorithm] = float(torch.cuda.max_memory_allocated()) if gpu else None
    step.feature_seconds.clear()
    turns = Turns(device)
    times: dict[str, list[float]] = {algorithm: [] for algorithm in calls}
    for round_ in range(rounds):
        progress(f"train {name}: round {round_ + 1}/{rounds}", often=True)
        order = calls if round_ % 2 else dict(reversed(calls.items()))  # neither is always first
        for algorithm, value in turns.round(order).items():
            times[algorithm].append(value)
    progress("")
    added = [b / a - 1 for a, b in zip(times["grpo"], times["g2rl"], strict=True)]
    features = statistics.median(step.feature_seconds)
    return [
        {
            "model": name,
            "parameters": sum(p.numel() for p in step.trained),
            "responses": batch.responses,
            "tokens": int(rollout.mask.sum()),
            "V": MODELS[name][6],
            "d": MODELS[name][0],
            "rounds": rounds,
            "algorithm": algorithm,
            "seconds": round(statistics.median(values), 5),
            "peak_bytes": peaks[algorithm],
            "added_20_50_80": [round(q, 5) for q in quantiles(added)] if algorithm == "g2rl" else None,
            "feature_seconds": round(features, 6) if algorithm == "g2rl" else None,
        }
        for algorithm, values in times.items()
    ]


def table(rows: list[TrainRow]) -> str:
    cells = []
    for row in rows:
        added, alone = "", ""
        if row["added_20_50_80"] is not None and row["feature_seconds"] is not None:
            added = spread([100 * share for share in row["added_20_50_80"]], "+.1f", " %")
            alone = f"{100 * row['feature_seconds'] / row['seconds']:.1f} % of the step"
        cells.append(
            {
                "model, responses, tokens": f"{row['model']}, {row['responses']}, {row['tokens']}",
                "step": row["algorithm"],
                "seconds": f"{row['seconds']:.3f}",
                "more than GRPO (20 to 80 %)": added,
                "features and geometry alone": alone,
                "peak memory": "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB",
            }
        )
    return markdown(cells)


def notes(rows: list[TrainRow], machine: Mapping[str, Any]) -> str:
    return (
        "A step without generation and verification; linear_logprobs gives the update's log-probs in both. "
        "Features and geometry alone: head_features, which yields the old log-probs too, and group_geometry."
    )
