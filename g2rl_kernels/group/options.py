"""Options of `group_geometry` and of other methods: defaults, choices and checks for every trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..arguments import check_choice, check_positive

# The operators' schema takes each choice as its place in these tuples.
SHAPINGS = ("none", "intent", "equation", "right")
EXPLORATION_SCORES = ("linear", "sqrt")
SCALES = ("none", "group", "batch")
UNIFORM_GROUPS = ("shape", "skip")
SIMILARITIES = ("gradient", "text")
LEAST_RIDGE = 1e-4  # float32 cosines of m responses have eigenvalues down to about -m * 1e-7 in place of 0
SCORE_GATE = 0.999999  # the least score of a right response: 1, less what a sum of parts loses to rounding


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help and choices, as TrlParser reads them."""
    return field(default=default, metadata={"help": help, **({"choices": list(choices)} if choices else {})})


@dataclass(frozen=True)
class ShapingOptions:
    """How exploration scores shape rewards, and how rewards become advantages, as in `group_geometry`.

    A trainer's own configuration takes defaults, help and choices from here, by `option_field`.
    """

    lam: float = option(0.5, "Exploration strength, 0 or more; 0 leaves every reward as it is.")
    clip: float = option(3.0, "Bound of the shaped reward, where right is +1 and wrong is -1.")
    shaping: str = option(
        "right",
        "'right': a novel right answer gains and a redundant one loses, wrong ones stay as they are; "
        "'equation': eq. 12 of the paper as printed, where a novel answer gains, right or wrong; "
        "'intent': as the paper's text says, where a novel right answer gains and a novel wrong one loses; "
        "'none': rewards stay as they are.",
        SHAPINGS,
    )
    exploration_score: str = option(
        "linear", "The exploration score nu: 'linear', or its 'sqrt'.", EXPLORATION_SCORES
    )
    scale: str = option(
        "group", "Advantages are divided by the deviation of the 'group', the 'batch', or by 'none'.", SCALES
    )
    uniform_groups: str = option(
        "shape",
        "Groups of all right or all wrong answers: 'shape' treats them like all others, 'skip' leaves their "
        "rewards as they are.",
        UNIFORM_GROUPS,
    )
    eps: float = option(1e-6, "Added to norms, sums of weights and variances.")

    @classmethod
    def of(cls, settings: Any, prefix: str = "") -> ShapingOptions:
        """The options in a trainer's settings (an object or a mapping), which calls them `prefix` + name.

        An option that the settings lack has its default.
        """
        return cls(**_found(cls, settings, prefix))

    def check(self, prefix: str = "") -> None:
        """Raises ValueError or TypeError for the first wrong option; the message calls it `prefix` + name."""
        for name in ("clip", "eps"):
            check_positive(prefix + name, getattr(self, name))
        if self.lam != 0:
            check_positive(f"{prefix}lam", self.lam, ", or 0")
        _check_choices(self, prefix)

    def flat(self) -> tuple[float, float, int, int, int, bool, float]:
        """The options in the order of the operators' schema; choices as numbers, lam=0 as shaping "none"."""
        return (
            float(self.lam),
            float(self.clip),
            SHAPINGS.index(self.shaping if self.lam != 0 else "none"),
            EXPLORATION_SCORES.index(self.exploration_score),
            SCALES.index(self.scale),
            self.uniform_groups == "skip",
            float(self.eps),
        )

    @classmethod
    def from_flat(
        cls, lam: float, clip: float, shaping: int, score: int, scale: int, skip_uniform: bool, eps: float
    ) -> ShapingOptions:
        """The inverse of `flat`."""
        names = SHAPINGS[shaping], EXPLORATION_SCORES[score], SCALES[scale], UNIFORM_GROUPS[skip_uniform]
        return cls(lam, clip, *names, eps)


@dataclass(frozen=True)
class MethodOptions:
    """Options of the methods beside g2rl (methods.py, docs/methods.md), each used where a method names it."""

    strength: float | None = option(
        None,
        "Strength of repexp, dqo, setpo, dra, dirl and gar, 0 or more; unset: the method's own.",
    )
    similarity: str = option(
        "gradient",
        "What repexp, dqo, setpo and dra compare: 'gradient', G2RL's features, or 'text', the encoder's "
        "embeddings of the responses.",
        SIMILARITIES,
    )
    ridge: float = option(0.01, "repexp: added to the covariance of features of norm 1; at least 0.0001.")
    pass_k: int = option(4, "passk: k, at least 1 and fewer than the responses of a prompt.")

    @classmethod
    def of(cls, settings: Any, prefix: str = "") -> MethodOptions:
        """As `ShapingOptions.of`."""
        return cls(**_found(cls, settings, prefix))

    def check(self, prefix: str = "") -> None:
        """As `ShapingOptions.check`."""
        if self.strength is not None and self.strength != 0:
            check_positive(f"{prefix}strength", self.strength, ", 0, or None for the method's own")
        check_positive(f"{prefix}ridge", self.ridge)
        if self.ridge < LEAST_RIDGE:
            raise ValueError(
                f"{prefix}ridge: got {self.ridge:g}, needs at least {LEAST_RIDGE:g}: below it the bonus is "
                "rounding of the similarities"
            )
        if not isinstance(self.pass_k, int) or isinstance(self.pass_k, bool) or self.pass_k < 1:
            raise ValueError(f"{prefix}pass_k: got {self.pass_k!r}, needs a whole number, at least 1")
        _check_choices(self, prefix)


def _found(cls: Any, settings: Any, prefix: str) -> dict[str, Any]:
    """Values of a dataclass's fields in a trainer's settings."""
    values = settings if isinstance(settings, Mapping) else vars(settings)
    names = [one.name for one in fields(cls)]
    return {name: values[prefix + name] for name in names if prefix + name in values}


def _check_choices(options: Any, prefix: str) -> None:
    for one in fields(options):
        if "choices" in one.metadata:
            check_choice(prefix + one.name, getattr(options, one.name), one.metadata["choices"])


def option_field(name: str, **changes: Any) -> Any:
    """A field for a trainer's own dataclass with the default, help and choices of the option `name`.

    changes: metadata to replace.
    """
    known = (*fields(ShapingOptions), *fields(MethodOptions))
    one = next(one for one in known if one.name == name)
    return field(default=one.default, metadata={**one.metadata, **changes})
