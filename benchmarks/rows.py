"""The format of results: what `--out` writes, and what the tables, plots and README are made from.

`NotRequired` keys are missing where a method has nothing to say, or in results of earlier versions.
"""

from __future__ import annotations

from typing import Any, TypedDict

from typing_extensions import NotRequired  # torch brings it; in typing from Python 3.11


class LeftOut(TypedDict):
    """A measurement that was not made."""

    case: str
    method: str
    reason: str
    fault: bool  # it should have run


class Result(TypedDict):
    """One run of `g2rl bench`."""

    op: NotRequired[str]  # missing: head
    machine: dict[str, Any]  # measure.machine
    rows: list[Any]  # HeadRow, LogprobsRow, GroupRow or TrainRow, by op
    left_out: NotRequired[list[LeftOut]]


class Described(TypedDict):
    """A case and a method."""

    shape: str  # name in registry.SHAPES
    N: int
    V: int
    d: int
    softcap: NotRequired[float | None]
    dtype: str
    distribution: NotRequired[str]
    entropy: NotRequired[float]  # nats, mean over the tokens
    method: str


class Timing(TypedDict):
    """A method's time and that of the floor: the bare products of the same sizes."""

    ratio_20_50_80: list[float]  # method / floor within a round: quantiles
    milliseconds: float  # medians
    floor_milliseconds: float
    floor_tflops: NotRequired[float]
    floor_chunks: NotRequired[int]  # chunks of tokens: more than 1 where all logits do not fit
    rounds: int


class FirstCall(TypedDict):
    """What the first call shows; the method's time is measured later."""

    extra_bytes: float | None  # at the peak; None: unknown
    first_call_seconds: NotRequired[float]
    errors: NotRequired[dict[str, float]]  # against float64, by output or gradient


class HeadFirstCall(FirstCall):
    error: float | None  # of the first response's feature, relative
    skipped_tokens: NotRequired[float]  # share of all tokens
    skipped_mass: NotRequired[float]  # share of a response's residual mass, the largest


class MethodRow(Described, Timing):
    """What rows of `head` and of `logprobs` share, beside their first calls."""

    leaves_out: NotRequired[str]  # outputs that the method does not give


class HeadRow(MethodRow, HeadFirstCall):
    responses: int


class LogprobsRow(MethodRow, FirstCall):
    frozen: bool  # the weight has no gradient
    forward_milliseconds: float
    backward_milliseconds: float
    product_milliseconds: list[float]  # logits, dX and, unless frozen, dW


class GroupRow(TypedDict):
    groups: int
    m: int  # rows a group
    d: int
    implementation: str
    microseconds_20_50_80: list[float]  # of one call: quantiles
    graph_microseconds: float | None  # of one call in a CUDA graph: median
    error: float | None  # of the advantages, the largest
    rounds: int
    launches: int  # calls in a row that are timed together


class TrainRow(TypedDict):
    model: str
    parameters: int
    responses: int
    tokens: int
    V: int
    d: int
    rounds: int
    algorithm: str  # grpo or g2rl
    seconds: float  # of a step: median
    peak_bytes: float | None
    added_20_50_80: list[float] | None  # g2rl: share of GRPO's step, quantiles
    feature_seconds: float | None  # g2rl: features and geometry alone
