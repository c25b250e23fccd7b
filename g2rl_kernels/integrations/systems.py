"""Algorithms in other packages' trainers: settings, and what is read from the texts of responses."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..group.alarm import CollapseAlarm, remedy
from ..group.evol import compared_text
from ..group.methods import METHODS
from ..group.options import SCORE_GATE, MethodOptions, ShapingOptions
from ..group.shaping import (
    ENTROPY_COEF,
    EVOL_CLIP_HIGH,
    ShapedScores,
    check_gap,
    check_group_size,
    check_options,
    check_threshold,
    compares_texts,
    shape_scores,
)
from ..models.encoder import DEFAULT_ENCODER, SentenceEncoder
from ..tasks.mathematics import MathJudge
from ..tasks.verify import answers_of, unify


@dataclass
class ShapingSettings:
    """What scores mean and how they are shaped, by the names of `g2.group_geometry` and `shape_scores`."""

    prefix: ClassVar[str] = "algorithm.g2rl."  # of their names in messages

    lam: float = ShapingOptions.lam  # exploration strength, 0 or more; 0: the trainer's GRPO, to the bit
    clip: float = ShapingOptions.clip  # bound of the shaped reward, in units of right +1 and wrong -1
    shaping: str = ShapingOptions.shaping  # intent | equation | right | none
    exploration_score: str = ShapingOptions.exploration_score  # linear | sqrt
    uniform_groups: str = ShapingOptions.uniform_groups  # of all right or all wrong answers: shape | skip
    rewards: str = "binary"  # scores say right or wrong, or, graded, how good an answer is
    correctness_threshold: float = SCORE_GATE  # answers whose score is at least this are right
    correctness_gap: float = 1.0  # distance between right and wrong scores: 1 for 0 and 1, 2 for -1 and +1

    def check(self, group_size: int, option: str) -> None:
        """Raises ValueError or TypeError, naming it, for a setting that cannot work; warns of small groups.

        group_size: responses a prompt; option: what the trainer calls their number.
        """
        check_options(vars(self), self.prefix)
        check_group_size(group_size, option, vars(self), self.prefix)

    @property
    def by_threshold(self) -> bool:
        """Whether the threshold decides which answers are right."""
        return self.rewards == "binary"

    @property
    def by_gap(self) -> bool:
        """Whether shaping changes the given scores in units of their gap."""
        return self.rewards == "binary" and self.lam > 0 and self.shaping != "none"

    def alarm(self) -> CollapseAlarm:
        """Watches the metrics of a run with these settings, and names them in its remedy."""
        return CollapseAlarm(remedy(ShapingOptions.of(self), getattr(self, "algorithm", "g2rl"), self.prefix))

    def shape(
        self, features: Tensor, scores: Tensor, name: str = "scores", scale: str = "group", **rows: Any
    ) -> ShapedScores:
        """`shape_scores` by these settings, after warnings about scores in units that the settings are not.

        features [S, d], scores [S] with NaN in rows that take no part; name: what warnings call the scores;
        scale: how the trainer scales advantages, for methods that give them; rows: group_size or group_ids,
        keys, has_tokens, and what a `TextReader` found.
        """
        graded = self.rewards == "graded"
        if self.by_gap:
            check_gap(scores, self.correctness_gap, name, f"{self.prefix}correctness_gap")
        if self.by_threshold:
            option, remedy = f"{self.prefix}correctness_threshold", f"{self.prefix}rewards='graded'"
            check_threshold(scores, self.correctness_threshold, name, option, remedy)
        return shape_scores(
            features,
            scores,
            replace(ShapingOptions.of(self), scale=scale),
            threshold=self.correctness_threshold,
            gap=self.correctness_gap,
            graded=graded,
            **rows,
        )


@dataclass
class SystemSettings(ShapingSettings):
    """Settings of algorithms, by their names in docs/baselines.md and docs/methods.md."""

    aligns: ClassVar[bool] = False  # whether the trainer finds what dirl and gar need

    # g2rl, what the paper compares it with: grpo | entropy_bonus | evol_rl, or a name of METHODS
    algorithm: str = "g2rl"
    similarity: str = MethodOptions.similarity  # that methods compare responses by: gradient | text
    strength: float | None = MethodOptions.strength  # of methods but g2rl; None: the method's own
    ridge: float = MethodOptions.ridge  # repexp
    pass_k: int = MethodOptions.pass_k  # passk: fewer than the responses of a prompt
    labels: str = "truth"  # which answers are right: by score, or the group's most frequent one: majority
    answer_func: str | None = None  # dotted path: text -> answer or None; None: as `MathJudge` reads it
    encoder: str = DEFAULT_ENCODER  # evol_rl and similarity=text: embeds responses
    entropy_coef: float | None = None  # None: the trainer's own, or the algorithm's where that is unset
    ratio_clip_high: float | None = None  # the same, of the upper clip of the ratio

    def check(self, group_size: int, option: str) -> None:
        super().check(group_size, option)
        if not self.aligns and self.algorithm in METHODS and "alignment" in METHODS[self.algorithm].needs:
            raise ValueError(
                f"{self.prefix}algorithm: got {self.algorithm!r}, whose inputs this trainer does not "
                "compute: use `g2rl train` or TRL for it, or another algorithm"
            )
        for name in ("entropy_coef", "ratio_clip_high"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{self.prefix}{name}: got {value}, needs a finite number, 0 or more")

    @property
    def by_threshold(self) -> bool:
        shapes = self.algorithm not in ("grpo", "entropy_bonus")
        return super().by_threshold and self.labels == "truth" and shapes

    @property
    def by_gap(self) -> bool:
        if self.labels != "truth":  # scores are replaced by some that have the gap
            return False
        if self.algorithm == "g2rl":
            return super().by_gap
        plain = self.algorithm in ("grpo", "entropy_bonus") or self.gives_advantages
        return self.rewards == "binary" and not plain

    def shape(
        self, features: Tensor, scores: Tensor, name: str = "scores", scale: str = "group", **rows: Any
    ) -> ShapedScores:
        system = {"algorithm": self.algorithm, "method_options": MethodOptions.of(self)}
        return super().shape(features, scores, name, scale, **system, **rows)

    @property
    def gives_advantages(self) -> bool:
        """Whether the algorithm gives advantages, which replace those that the trainer computes."""
        return self.algorithm in METHODS and METHODS[self.algorithm].gives == "advantages"

    @property
    def reads_answers(self) -> bool:
        """Whether answers are found in texts."""
        return self.algorithm == "evol_rl" or self.labels == "majority"

    @property
    def embeds_texts(self) -> bool:
        """Whether texts are embedded."""
        return compares_texts(self.algorithm, self.similarity)

    @property
    def reads_texts(self) -> bool:
        """Whether `TextReader` is needed."""
        return self.reads_answers or self.embeds_texts

    def entropy(self, theirs: float, name: str) -> float:
        """The coefficient of the entropy bonus. theirs: the trainer's option `name`; 0 counts as unset.

        Raises ValueError where grpo would have a bonus, or entropy_bonus would have none.
        """
        coef = self.entropy_coef
        if coef is None:
            coef = theirs or ENTROPY_COEF[self.algorithm]
        if (self.algorithm == "grpo" and coef) or (self.algorithm == "entropy_bonus" and not coef):
            raise ValueError(
                f"{name}: got {coef} with {self.prefix}algorithm={self.algorithm}: grpo has no entropy "
                f"bonus, and entropy_bonus has one; leave it and {self.prefix}entropy_coef unset for the "
                "algorithm's own"
            )
        return coef

    def clip_high(self, theirs: float | None, default: float | None) -> float | None:
        """The upper clip of the ratio. theirs: the trainer's option; its `default` counts as unset."""
        if self.ratio_clip_high is not None:
            return self.ratio_clip_high
        return EVOL_CLIP_HIGH if self.algorithm == "evol_rl" and theirs in (None, default) else theirs


class TextReader:
    """Finds what evol_rl, majority labels and similarity=text need to know of responses: answers, embeddings.

    Args:
        settings: of the trainer.
        device: of the encoder.

    Raises:
        ValueError: `answer_func` cannot be imported, or is unset without math-verify.
        ConfigError, TrainerError: of `SentenceEncoder`.
    """

    def __init__(self, settings: SystemSettings, device: str | torch.device = "cpu") -> None:
        self.settings = settings
        self.answer: Callable[[str], str | None] | None = None
        if settings.reads_answers:
            self.answer = answer_function(settings.answer_func, f"{settings.prefix}answer_func")
        if settings.embeds_texts:
            self.encoder = SentenceEncoder(settings.encoder, device)

    def __call__(self, texts: Sequence[str], group_ids: Tensor) -> dict[str, Any]:
        """Reads responses; see `arguments`.

        texts: S responses; those without a group (group_ids [S] negative) are not read.
        """
        rows = [row for row, group in enumerate(group_ids.tolist()) if group >= 0]
        found, vectors = self.read([texts[row] for row in rows])
        answers: list[str | None] = [None] * len(texts)
        for row, answer in zip(rows, found):
            answers[row] = answer
        embeddings = None
        if vectors is not None:
            embeddings = vectors.new_zeros(len(texts), vectors.shape[1])
            embeddings[rows] = vectors
        return self.arguments(answers, embeddings, group_ids)

    def read(self, texts: Sequence[str]) -> tuple[list[str | None], Tensor | None]:
        """The answer in each of S texts or None, and their embeddings [S, e], each where it is needed."""
        answers: list[str | None] = [None] * len(texts)
        if self.settings.reads_answers:
            if self.answer is None:
                answers = answers_of(MathJudge(), texts)
            else:
                answers = [self._own_answer(text) for text in texts]
        if not self.settings.embeds_texts:
            return answers, None
        compared = [compared_text(text) for text in texts]
        return answers, self.encoder(compared) if compared else torch.zeros(0, 1)

    def _own_answer(self, text: str) -> str | None:
        """By the user's function; raises TypeError where it gives neither a text nor None."""
        answer = None if self.answer is None else self.answer(text)
        if answer is not None and not isinstance(answer, str):
            option = f"{self.settings.prefix}answer_func"
            raise TypeError(f"{option}: {self.settings.answer_func} gave {answer!r}, needs a text or None")
        return (answer or "").strip() or None

    def arguments(
        self, answers: list[str | None], embeddings: Tensor | None, group_ids: Tensor
    ) -> dict[str, Any]:
        """Arguments of `shape_scores`: votes, answered [S], embeddings [S, e].

        answers, embeddings: of all ranks' responses, as `read` gives them; group_ids: [S], negative for a
        response without a group.
        """
        members: dict[int, list[int]] = {}
        for row, group in enumerate(group_ids.tolist()):
            if group >= 0:
                members.setdefault(group, []).append(row)
        if members and self.settings.reads_answers and not any(answers):
            warnings.warn(
                f"no response of the batch has an answer: {self.settings.prefix}answer_func names the "
                "function that finds it",
                stacklevel=2,
            )
        found: dict[str, Any] = {}
        if self.settings.labels == "majority":
            judge = MathJudge() if self.answer is None else None
            unified = unify([(judge, [answers[row] for row in rows]) for rows in members.values()])
            votes: list[str | None] = [None] * len(answers)
            for rows, same in zip(members.values(), unified):
                for row, answer in zip(rows, same):
                    votes[row] = answer
            found["votes"] = votes
        if embeddings is not None and self.settings.algorithm == "evol_rl":
            answered = [answer is not None for answer in answers]
            found["answered"] = torch.tensor(answered, dtype=torch.bool, device=group_ids.device)
        if embeddings is not None:
            found["embeddings"] = embeddings.to(group_ids.device)
        return found


def answer_function(path: str | None, option: str) -> Callable[[str], str | None] | None:
    """The function at a dotted path; None for None, where `MathJudge` reads and compares answers.

    option: its name in messages.
    """
    if path is None:
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise ValueError(f"{option}: name a function, or pip install math-verify") from None
        return None
    module, _, name = path.rpartition(".")
    try:
        function: Callable[[str], str | None] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}: cannot import {path!r} ({error})") from None
    if not callable(function):
        raise ValueError(f"{option}: {path!r} is {function!r}, needs a function from a text to its answer")
    return function
