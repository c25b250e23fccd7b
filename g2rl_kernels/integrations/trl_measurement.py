"""What one generation batch of `G2RLTrainer` leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .trl_support import KeptRow


@dataclass
class Measurement:
    """What `_generate_and_score_completions` leaves behind for one batch: S responses on R ranks."""

    tool_mask: list[list[int]] | None = None  # S / R lists: 1 for the model's own token, 0 for a tool's
    known_logprobs: list[list[float | None]] | None = None  # S / R lists, as the sampler reported them
    known_fit: bool = (
        False  # whether those of the responses measured last are near enough to save time on a CPU
    )
    completion_columns: int = 0  # how many of the padded ids' last columns hold completions
    states: list[Tensor] = field(default_factory=list)  # hidden states [S / R, d] that sampled each token
    due: bool = False  # the next forward is the one under the policy that sampled
    num_iterations: int | None = None  # the trainer's own, if another made TRL run the forward it would skip
    kept: list[KeptRow] = field(default_factory=list)  # of this rank's responses, if asked for
    recomputed: bool = True  # `kept` is not the sampler's own
    features: list[Tensor] = field(default_factory=list)  # of this rank's responses, one [.., d] a forward
    keys: list[Tensor] = field(default_factory=list)  # the same, `response_keys`
    has_tokens: list[Tensor] = field(default_factory=list)  # the same, bool
    entropies: list[Tensor] = field(default_factory=list)  # of this rank's tokens
    seconds: float = 0.0  # for features, on this rank
    rewards: Tensor | None = None  # [S, reward functions], raw
    texts: list[str] = field(default_factory=list)  # S / R completions
    alignment: dict[str, Tensor] = field(default_factory=dict)  # of `BatchInputs`, of all ranks
