"""`group_geometry`: similarity, exploration score, shaped rewards and advantages in groups of responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import GROUP_DEVICES, HAS_CPU, ops, qualified
from ..arguments import HAS_TRITON, check_shape, check_tensor, sizes
from . import reference
from .options import ShapingOptions


class GroupGeometry(NamedTuple):
    """What `group_geometry` returns, for B groups of at most M rows each; float32, members int64."""

    similarity: Tensor  # [B, M, M], cosines
    members: Tensor  # [B, M], row of the inputs, -1 at empty places
    exploration_score: Tensor  # [S], nu
    shaped_rewards: Tensor  # [S]
    advantages: Tensor  # [S]


def group_geometry(
    features: Tensor,
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    lam: float = ShapingOptions.lam,
    clip: float = ShapingOptions.clip,
    shaping: str = ShapingOptions.shaping,
    exploration_score: str = ShapingOptions.exploration_score,
    scale: str = ShapingOptions.scale,
    uniform_groups: str = ShapingOptions.uniform_groups,
    eps: float = ShapingOptions.eps,
) -> GroupGeometry:
    """Equations 9-13 and 2 of the paper on every group of responses to one prompt, in one call.

        Phi^_i = Phi_i / (||Phi_i|| + eps),  S_ij = <Phi^_i, Phi^_j>                              (9)
        w_ij   = exp(r_j) / (sum_{k != i} exp(r_k) + eps),  j != i                                (10)
        nu_i   = max(1 - sum_{j != i} w_ij S_ij^2, 0)                                             (11)
        r~_i   = r_i (1 + lam (2 nubar_i - 1)) where r_i > 0, else r_i; clipped to [-clip, clip]  (12-13)
        A_i    = (r~_i - mean r~) / sqrt(mean (r~ - mean r~)^2 + eps)                             (2)

    Phi are the features, r the rewards, nu the exploration score: how little a response resembles its group.
    nubar is nu scaled to [0, 1] between the group's extremes, and 0.5 where these differ by 1e-5 or less.
    The paper's eq. 12 as printed contradicts the text around it: `shaping` offers both, a form that leaves
    wrong answers as they are, and "none". Shaped rewards with lam = 0.5:

        reward  nubar           "right"  "equation"  "intent"
          +1      0  (alike)      0.5        1.0        0.5
          +1      1  (novel)      1.5        1.5        1.5
          -1      0  (alike)     -1.0       -1.0       -0.5
          -1      1  (novel)     -1.0       -0.5       -1.5

    Args:
        features: [S, d], of `head_features`, any float dtype; converted to float32.
        rewards: [S], any float dtype; the paper's are +1 and -1.
        group_size: m, where each m consecutive rows are a group. Give either group_size or group_ids.
        group_ids: [S] int64, the group of each row; groups may differ in size and be interleaved. Negative
            ids are padding rows. Ids on a GPU make the call wait for the device.
        lam: exploration strength, >= 0 (0.5). 0 leaves every reward as it is, unclipped.
        clip: bound of the shaped rewards, positive (3).
        shaping: how nubar moves rewards ("right").
            "right": as above, with nubar between the extremes of rewards above 0 alone; other rewards are
            only clipped.
            "equation": r (1 + lam r nubar), eq. 12 as printed; a novel wrong answer is punished less.
            "intent": r (1 + lam (2 nubar - 1)), as the paper's text says; a novel right answer gains, a novel
            wrong one loses. It collapsed where almost all answers are wrong (docs/evidence.md).
            "none": rewards as they are, unclipped.
        exploration_score: "linear" (default): nu as above; "sqrt": its square root.
        scale: the divisor of advantages; the group's mean is always subtracted. "group" (default): the
            group's deviation, as above; "batch": the deviation of all rewards about their common mean;
            "none": 1.
        uniform_groups: groups in which all rewards are equal. "shape" (default): treated like all others;
            "skip": their rewards stay as they are.
        eps: positive (1e-6), in the equations above. Features about as short as eps get smaller cosines.

    Returns:
        `GroupGeometry`: similarity [B, M, M], members [B, M] int64 (rows of the inputs; -1: empty place),
        exploration_score, shaped_rewards and advantages [S], float32, without gradients, for B groups of at
        most M rows. Groups are in order of first appearance, and the rows of a group in order.

        - Padding rows get zeros and change nothing for other rows.
        - A group of one has exploration score 1.
        - A response without tokens (feature zero) has exploration score 1: give it a negative id to leave it
          out.
        - Equal responses should have one feature: rounding between them would rank them (`response_keys`).
        - NaN in a feature or a reward makes those exploration scores, shaped rewards and advantages of its
          own group NaN that depend on it: "right" leaves the shaped rewards of wrong answers as they are, and
          "skip" all of a uniform group. Other groups do not change, except that with scale="batch" all
          advantages are NaN.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, option or number is wrong, or group_size does not divide S.
    """
    check_tensor("features", features, None)
    if features.dim() != 2:
        raise ValueError(f"features: got shape {sizes(features)}, needs [S, d]")
    check_tensor("rewards", rewards, None, features.device)
    check_shape("rewards", rewards, (features.shape[0],), "[S], one for each row of features")
    options = ShapingOptions(lam, clip, shaping, exploration_score, scale, uniform_groups, eps)
    options.check()
    features, rewards = features.detach().float().contiguous(), rewards.detach().float().contiguous()
    members = _members(features, group_size, group_ids)
    operator = IMPLEMENTATIONS[_implementation(features.device.type)]
    similarity, nu, shaped, advantages = operator(features, rewards, members, *options.flat())
    return GroupGeometry(similarity, members, nu, shaped, advantages)


def check_grouping(count: int, device: torch.device, group_size: Any, group_ids: Any) -> None:
    """Raises TypeError or ValueError unless exactly one is given: a divisor of `count`, or ids [count]."""
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(f"group_size, group_ids: got {given}, needs exactly one of them")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, (torch.int64,), device)
        check_shape("group_ids", group_ids, (count,), "[S], an id for each row")
    elif not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size: got {type(group_size).__name__}, needs an int")
    elif group_size < 1 or count % group_size:
        raise ValueError(f"group_size: got {group_size}, needs a positive number that divides S = {count}")


def row_groups(
    count: int, device: torch.device, group_size: int | None = None, group_ids: Tensor | None = None
) -> Tensor:
    """[count] int64, the group of each row, from either argument; checked by `check_grouping`."""
    check_grouping(count, device, group_size, group_ids)
    if group_ids is not None:
        return group_ids
    assert group_size is not None
    return torch.arange(count, device=device) // group_size


def _members(features: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    check_grouping(len(features), features.device, group_size, group_ids)
    if group_size is not None:
        return torch.arange(len(features), device=features.device).view(-1, group_size)
    assert group_ids is not None
    if HAS_CPU and features.device.type == "cpu":
        return ops.group_members(group_ids.contiguous())
    return reference.group_members(group_ids)


# --- operators ----------------------------------------------------------------------------------------------
# Each takes contiguous features [S, d] and rewards [S] in float32, members [B, M], and ShapingOptions.flat().


def _implementation(device: str) -> str:
    """The key in IMPLEMENTATIONS for a type of device."""
    # On a GPU too: it has not been measured against Triton there. torch calls AMD's "cuda" as well.
    if device in GROUP_DEVICES and not (device == "cuda" and torch.version.hip):
        return "compiled"
    return "triton" if device == "cuda" and HAS_TRITON else "reference"


def _by_reference(features: Tensor, rewards: Tensor, members: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    with torch.autocast(features.device.type, enabled=False):
        return reference.group_geometry(features, rewards, members, ShapingOptions.from_flat(*flat))


_schema = str(ops.group_geometry.default._schema)
torch.library.define(qualified("group_geometry_triton"), _schema[_schema.index("(") :])


@torch.library.impl(
    qualified("group_geometry_triton"), ("cpu", "cuda")
)  # on the CPU for Triton's interpreter
def _(features: Tensor, rewards: Tensor, members: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    from . import triton as kernel

    if not kernel.takes(members.shape[1]):
        return _by_reference(features, rewards, members, *flat)
    with torch.cuda.device_of(features):  # Triton launches on the current device
        return kernel.launch(features, rewards, members, *flat)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "compiled": ops.group_geometry,  # csrc/
    "triton": ops.group_geometry_triton,  # triton.py; the reference for larger groups
    "reference": _by_reference,
}


@torch.library.register_fake(qualified("group_geometry"))
@torch.library.register_fake(qualified("group_geometry_triton"))
def _(features: Tensor, rewards: Tensor, members: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    S, (B, M) = features.shape[0], members.shape
    rows = (features.new_empty(S, dtype=torch.float32) for _ in range(3))
    return features.new_empty((B, M, M), dtype=torch.float32), *rows


@torch.library.register_fake(qualified("group_members"))
def _(ids: Tensor) -> Tensor:
    ctx = torch.library.get_ctx()
    return ids.new_empty((ctx.new_dynamic_size(), ctx.new_dynamic_size()))
