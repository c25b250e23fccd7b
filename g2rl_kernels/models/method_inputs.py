"""What dirl and gar need beside features (group/methods.py), from hidden states: a direction, and vectors.

`MethodInputs` collects it; trainers derive theirs from it. All works on packed rows as `head_features` takes
them: hidden [N, d], cu_seqlens [S + 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, TrainerError, text_fault
from ..head.logprobs import linear_logprobs
from .lm_head import LMHead, evaluation_mode
from .responses import response_hidden

# Two small sets for dirl's direction: prompts that take steps to answer, and prompts that take a known fact.
# A user's own are `direction_prompts`, under these names.
REASONING_PROMPTS = (
    "A train leaves at 9:40 and arrives at 13:15 with a stop of 25 minutes. How long does it move?",
    "If 3 machines make 18 parts in 2 hours, how many parts do 5 machines make in 4 hours?",
    "Tom is twice as old as Ann. In 6 years they are 42 together. How old is Ann now?",
    "A number is tripled, then 7 is subtracted, and the result is 29. What is the number?",
    "All glims are torps, and no torp is a wick. Can a glim be a wick? Explain.",
    "Which is larger, 5/8 or 7/11? Show the steps.",
    "Five people shake hands with each other once. How many handshakes are there?",
    "Prices rise by 20 percent and then fall by 20 percent. By how much did they change?",
    "Write 84 as a product of primes, then count its divisors.",
    "A rectangle has a perimeter of 34 and an area of 60. Find its sides.",
    "Today is Wednesday. What day of the week is it in 100 days?",
    "Two dice are thrown. What is the chance that their sum is at least 10?",
)
MEMORY_PROMPTS = (
    "What is the capital of Australia?",
    "Who wrote the novel Don Quixote?",
    "In which year did the Berlin Wall fall?",
    "What is the chemical symbol of potassium?",
    "Which planet is the largest in the solar system?",
    "Who painted the Mona Lisa?",
    "What is the longest river in South America?",
    "Which language is spoken in Brazil?",
    "What is the currency of Japan?",
    "Who was the first person to walk on the Moon?",
    "Which ocean lies between Africa and Australia?",
    "What is the name of the largest desert in Africa?",
)


class MethodInputs:
    """Token weights and alignments of a batch's responses: for each forward `token_weights` and `add`.

    For other algorithms than dirl and gar everything here is empty. counts: [N], 0 for tokens that the model
    did not write, else 1; None: all count.
    """

    direction: Tensor  # dirl's, [d]: of the model before training, and before a checkpoint is loaded

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.found: list[Tensor] = []

    def token_weights(self, hidden: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """[N] for `head_features`; hidden: [N, d]."""
        if self.algorithm != "dirl":
            return counts
        weights = direction_weights(hidden, self.direction)
        return weights if counts is None else weights * counts

    def add(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        cu_seqlens: Tensor,
        counts: Tensor | None = None,
        **options: Any,
    ) -> None:
        """Measures the next responses; options: of `linear_logprobs`."""
        if self.algorithm == "dirl":
            self.found.append(direction_alignment(hidden, cu_seqlens, self.direction, counts))
        elif self.algorithm == "gar":
            self.found.append(activation_gradients(hidden, weight, tokens, cu_seqlens, counts, **options))

    def aligned(self, anchors: Callable[[], Tensor]) -> Tensor | None:
        """The alignment [S] of the responses in `found`; None for other algorithms.

        anchors: gar's vectors of the solutions, [S, d].
        """
        if not self.found:
            return None
        found = torch.cat(self.found)
        return cosine_to(found, anchors()) if self.algorithm == "gar" else found


def check_direction_prompts(given: Any, name: str) -> None:
    """Raises ConfigError, which begins with `name`, unless `given` is empty or has texts for both sets."""
    if not given:
        return
    sets = {"reasoning", "memory"}
    if not isinstance(given, Mapping) or given.keys() != sets:
        found = f"the keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else repr(given)
        raise ConfigError(f"{name}: got {found}, needs {{reasoning: [prompts], memory: [prompts]}}")
    for key in sorted(sets):
        texts = given[key]
        right = isinstance(texts, (list, tuple)) and len(texts) > 0
        if not right or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"{name}.{key}: got {texts!r}, needs a list of texts, none of them empty")
        for place, text in enumerate(texts):
            if fault := text_fault(text):
                raise ConfigError(f"{name}.{key}[{place}]{fault}")


@torch.no_grad()
def reasoning_direction(
    head: LMHead,
    encode: Callable[[str], Sequence[int]],
    prompts: Mapping[str, Sequence[str]] | None = None,
    name: str = "direction_prompts",
) -> Tensor:
    """dirl's k [d], float32 of norm 1: mean hidden states of reasoning prompts less those of memory prompts.

    The hidden state is the LM head's input at a prompt's last token. encode: a prompt's token ids. prompts:
    two sets, "reasoning" and "memory"; without them, those above.

    Raises ConfigError, which begins with `name`, for one of `prompts` that exceeds the model's positions.
    """

    def last_hidden(text: str) -> Tensor:
        tokens = encode(text)
        if prompts:  # one more token follows
            check_positions(head, len(tokens) + 1, f"{name}: {text[:40]!r} has {len(tokens)} tokens")
        ids = torch.tensor([[*tokens, 0]], device=head.output.weight.device)
        mask = torch.ones_like(ids[:, -1:], dtype=torch.bool)
        hidden, _, _ = response_hidden(head, ids, torch.ones_like(ids), mask)
        return hidden[0].float()

    sets = prompts or {"reasoning": REASONING_PROMPTS, "memory": MEMORY_PROMPTS}
    with evaluation_mode(head.backbone):  # no dropout: a resumed run finds the same direction
        reasoning, memory = (
            torch.stack([last_hidden(text) for text in sets[key]]).mean(0) for key in ("reasoning", "memory")
        )
    direction = reasoning - memory
    if not direction.norm() > 0:
        raise TrainerError("dirl: reasoning and memory prompts have the same hidden states, so no direction")
    return direction / direction.norm()


def positions(head: LMHead) -> int | None:
    """How many tokens a sequence may have; None where the model sets no limit."""
    return getattr(getattr(head.backbone, "config", None), "max_position_embeddings", None)


def check_positions(head: LMHead, tokens: int, said: str) -> None:
    """Raises ConfigError, which begins with `said`, for more tokens than the model has positions."""
    limit = positions(head)
    if limit and tokens > limit:
        raise ConfigError(f"{said}, but the model has {limit} positions: shorten it")


def direction_weights(hidden: Tensor, direction: Tensor) -> Tensor:
    """dirl's token weights sigmoid(h_t . k), [N]."""
    return torch.sigmoid(hidden.float() @ direction)


def direction_alignment(
    hidden: Tensor, cu_seqlens: Tensor, direction: Tensor, counts: Tensor | None = None
) -> Tensor:
    """dirl's alignment [S]: the mean of h_t . k over a response's tokens; 0 without tokens.

    counts: as in `MethodInputs`.
    """
    return response_means(hidden.float() @ direction, cu_seqlens, counts)


def response_means(values: Tensor, cu_seqlens: Tensor, counts: Tensor | None = None) -> Tensor:
    """Means of each response's rows that count: [N] or [N, d] -> [S] or [S, d]; 0 where none does."""
    weights = values.new_ones(len(values)) if counts is None else counts.to(values.dtype)
    shape, lengths = (-1, *[1] * (values.dim() - 1)), cu_seqlens.diff().long()

    def sums(rows: Tensor) -> Tensor:
        return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0)

    return sums(values * weights.view(shape)) / sums(weights).clamp(min=1).view(shape)


def activation_gradients(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """gar's vectors v [S, d], float32: mean_t (dL/dh_t * h_t), up to a factor of each response.

    L is the sum of -log p(tokens[t]); its gradient comes from the backward pass of `linear_logprobs` with a
    frozen head, without logits. counts: as in `MethodInputs`; options: of `linear_logprobs`.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        logprobs = linear_logprobs(leaf, weight.detach(), tokens, **options).logprobs
        (gradient,) = torch.autograd.grad(-logprobs.sum(), leaf)
    return response_means(gradient.float() * hidden.detach().float(), cu_seqlens, counts)


@torch.no_grad()
def solution_vector(
    head: LMHead, prompt: Sequence[int], solution: Sequence[int], dtype: torch.dtype, temperature: float
) -> Tensor:
    """gar's v [d] of an expert solution, given as token ids after those of its prompt."""
    check_solution_length(head, len(prompt), len(solution))
    ids = torch.tensor([[*prompt, *solution]], device=head.output.weight.device)
    mask = torch.ones(1, len(solution), dtype=torch.bool, device=ids.device)
    with evaluation_mode(head.backbone):
        hidden, tokens, cu_seqlens = response_hidden(head, ids, torch.ones_like(ids), mask)
    arguments = head.arguments(temperature, dtype)
    return activation_gradients(hidden.to(dtype), tokens=tokens, cu_seqlens=cu_seqlens, **arguments)[0]


def check_solution_length(head: LMHead, prompt: int, solution: int, where: str = "") -> None:
    """Raises ConfigError, which begins with `where`, if the model has fewer positions than both tokens."""
    said = f"{where}{': ' if where else ''}solution: it has {solution} tokens after a prompt of {prompt}"
    check_positions(head, prompt + solution, said)


def cosine_to(vectors: Tensor, anchors: Tensor) -> Tensor:
    """gar's alignment [S]: cosines of [S, d] and [S, d]; 0 where a vector is 0."""
    return torch.nn.functional.cosine_similarity(vectors, anchors, dim=-1, eps=1e-12)


def solution_of(item: Any, where: str) -> str:
    """The text of an item's `solution`; raises ConfigError, which begins with `where`, without one."""
    found = item.get("solution") if isinstance(item, dict) else None
    if isinstance(found, str) and (fault := text_fault(found)):
        raise ConfigError(f"{where}: solution{fault}")
    if not isinstance(found, str) or not found.strip():
        raise ConfigError(
            f"{where} has no text 'solution', with which gar compares right answers: add it, or choose "
            "another algorithm"
        )
    return found
