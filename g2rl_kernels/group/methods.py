"""Other methods that shape rewards or advantages within a group, each a short function on padded groups.

Notation: B groups of at most M responses; `present` [B, M] is False at empty places. All tensors are of one
float dtype. `rewards` r [B, M] are +1 for right and -1 for wrong, or graded between; sources that write 0 and
1 mean s = (r + 1) / 2, and functions convert back. `similarity` [B, M, M] are cosines: of G2RL's gradient
features, or of sentence embeddings. Values at empty places are 0 on entry and without meaning on return.

`shape_groups` runs a method: it hands over what `METHODS` says that the method needs, keeps NaN in its own
group, and leaves uniform groups alone where `uniform_groups` says so. docs/methods.md has sources in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import MethodOptions, ShapingOptions
from .reference import FLAT_SPREAD, is_uniform, masked_mean, min_max
from .reference import exploration_score as exploration

ROUNDING = 1e-6  # rewards that a method moves by amounts this close are moved by the same


def _spread(values: Tensor, present: Tensor) -> Tensor:
    """max - min of each group's present values, [B, M] -> [B, 1]; below 0 where none is present."""
    high = values.masked_fill(~present, -torch.inf).amax(1, keepdim=True)
    return high - values.masked_fill(~present, torch.inf).amin(1, keepdim=True)


def _others(present: Tensor) -> Tensor:
    """[B, M, M] bool: both places are filled, and they differ."""
    pair = present[:, :, None] & present[:, None, :]
    return pair & ~torch.eye(present.shape[1], dtype=torch.bool, device=present.device)


def repexp(rewards: Tensor, present: Tensor, similarity: Tensor, *, strength: float, ridge: float) -> Tensor:
    """RepExp (arXiv 2510.11686): an elliptical bonus on the score, in groups with a right answer. [B, M].

        x_i = Phi^_i - mean Phi^                                  Phi^: unit features, the mean is the group's
        b_i = x_i^T (ridge I + sum_j x_j x_j^T)^-1 x_i = [K (K + ridge I)^-1]_ii,  K_ij = <x_i, x_j>
        s'_i = s_i + strength b_i    if any s of the group is above 1/2, else s_i

    b is from 0 to 1 - 1/n in a group of n. The form is that of the authors' training script (verl's
    recipe/rep_exp, `reward_type=leverage`, no bonus where no answer is right), which centres as well. They
    take mean hidden states of the starting model through a random projection; features here have norm 1.
    """
    n = present.sum(1).clamp(min=1)[:, None, None]
    mean = similarity.sum(2, keepdim=True) / n
    K = similarity - mean - mean.mT + mean.sum(1, keepdim=True) / n
    K = K.masked_fill(~(present[:, :, None] & present[:, None, :]), 0.0)
    eye = torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    bonus = 1 - ridge * torch.linalg.inv(K + ridge * eye).diagonal(dim1=1, dim2=2)
    any_right = ((rewards > 0) & present).any(1, keepdim=True)
    return torch.where(any_right, rewards + 2 * strength * bonus, rewards)


def dqo(rewards: Tensor, present: Tensor, similarity: Tensor, *, strength: float) -> Tensor:
    """DQO (arXiv 2509.04784): what a response adds to the group's log-determinant. [B, M].

        s'_i = s_i + strength log(det(L + I) / det(L_-i + I))     L: similarity, L_-i: without response i
             = s_i - strength log [(L + I)^-1]_ii

    The term is log((n + 1) / n) for each of n equal responses and log 2 for one unlike all others. With it
    the sum over responses has the gradient of sum s + strength log det(L + I), whose optimum the paper writes
    as the determinant of a kernel scaled by quality. The identity keeps it finite where responses are equal.
    Objective and estimator are those of a reader's notes on the paper.
    """
    eye = torch.eye(similarity.shape[1], dtype=similarity.dtype, device=similarity.device)
    inverse = torch.linalg.inv(similarity + eye).diagonal(dim1=1, dim2=2)
    return rewards - 2 * strength * inverse.clamp(min=torch.finfo(inverse.dtype).tiny).log()


def setpo(
    rewards: Tensor, present: Tensor, similarity: Tensor, advantages: Tensor, *, strength: float
) -> Tensor:
    """SetPO (arXiv 2602.01062): the leave-one-out change of a set's diversity, added to advantages. [B, M].

        D(Y) = mean_{i in Y} g(mean_{j in Y} k_ij), g(x) = -log(1 + x), k_ij = max(similarity_ij, 0), k_ii = 1
        A'_i = A_i + strength (D(Y) - D(Y without i))

    A are the plain advantages of the group's scores, eq. 2 of G2RL. Form and g are those of readers' notes on
    the paper; the kernel, and means that include i, are ours. A response unlike the others has a positive
    change, one that repeats them 0 or a negative one. A group of one keeps its advantage.
    """
    M, others = present.shape[1], _others(present)
    n = present.sum(1)[:, None].to(similarity.dtype)
    eye = torch.eye(M, dtype=similarity.dtype, device=similarity.device)
    k = torch.where(others, similarity.clamp(0, 1), eye * present[:, :, None])
    total = k.sum(2)  # of each i
    whole = -masked_mean(torch.log1p(total / n.clamp(min=1)), present, 1)
    left = (n - 1).clamp(min=1)
    means = (total[:, None, :] - k) / left[:, :, None]  # [B, left out, i]
    without = -(torch.log1p(means) * others).sum(2) / left
    return advantages + torch.where(n > 1, strength * (whole - without), 0.0)


def dra(rewards: Tensor, present: Tensor, similarity: Tensor, *, strength: float) -> Tensor:
    """DRA-GRPO (arXiv 2505.09655): a score is divided by how much the rest of the group repeats it. [B, M].

        s'_i = s_i / (1 + strength sum_{j != i} max(similarity_ij, 0))

    The paper's graph-cut form over a prompt's responses. The authors' code divides by sum_j similarity_ij +
    1e-6 over all responses of a process, whatever their prompts. Negative cosines, which embeddings of texts
    hardly have, count as 0, so that the divisor is never below 1.
    """
    total = (similarity.clamp(min=0) * _others(present)).sum(2)
    return (rewards + 1) / (1 + strength * total) - 1


def passk(rewards: Tensor, present: Tensor, *, pass_k: int, eps: float) -> Tensor:
    """Pass@k training (arXiv 2508.10751): advantages of the best of k responses. [B, M].

        R = 1 - C(n - c, k) / C(n, k),  sigma = sqrt(R (1 - R))   n responses, c of them right
        A = (1 - R) / (sigma + eps)                               right
        A = (1 - R - C(n - c - 1, k - 1) / C(n - 1, k - 1)) / (sigma + eps)    wrong

    The mean, over all sets of k responses that contain this one, of the set's normalised reward. k = 1 is
    GRPO. It is 0 where n - c < k: every set has a right answer. As in the authors' code (RUCAIBox/
    Passk_Training). verl's `grpo_passk` is another estimator (arXiv 2503.19595): it gives the best
    response its distance to the second best, and 0 to all others. Groups smaller than k take k = n.
    """
    right = (rewards > 0) & present
    n = present.sum(1, keepdim=True).to(rewards.dtype)
    wrong = n - right.sum(1, keepdim=True)
    none_right = torch.ones_like(n)  # the chance that k responses are wrong
    alone = torch.ones_like(n)  # the chance that the k - 1 others in a set of a wrong response are
    for i in range(min(pass_k, rewards.shape[1])):
        factor = torch.where(n > i, ((wrong - i) / (n - i).clamp(min=1)).clamp(min=0), 1.0)
        none_right = none_right * factor
        alone = alone * factor if i else alone
    sigma = (none_right * (1 - none_right)).clamp(min=0).sqrt()
    return torch.where(right, none_right, none_right - alone) / (sigma + eps)


def dirl(
    rewards: Tensor,
    present: Tensor,
    similarity: Tensor,
    alignment: Tensor,
    *,
    strength: float,
    clip: float,
    exploration_score: str,
    eps: float,
) -> Tensor:
    """DiRL (arXiv 2606.10346): novelty against the responses that reason, as a direction tells. [B, M].

        aligned_i = alignment_i > 0                         alignment: mean_t h_t . k of the response
        nu_i    = max(1 - sum_j w_ij similarity_ij^2, 0)    j: the aligned responses other than i
        nubar_i = nu scaled to [0, 1] among the aligned, and among the rest; 0 where flat
        r'_i    = r_i (1 + strength r_i nubar_i)   aligned,    r_i (1 - strength r_i nubar_i)   the rest

    w as in eq. 10 of G2RL over these j, nu's square root for exploration_score="sqrt", r' clipped to +-clip.
    `similarity` must be that of features with token weights sigmoid(h_t . k). The signs are the paper's: an
    unaligned response far from the aligned ones loses, right or wrong. The authors' code (jiangnanx129/DiRL)
    uses the first form for both and the square root; nubar is 0 there too where a part is flat or a single
    response.
    """
    aligned = present & (alignment > 0)
    nubar = torch.zeros_like(rewards)
    others = _others(present) & aligned[:, None, :]
    weights = rewards.exp()[:, None, :] * others
    weights = weights / (weights.sum(2, keepdim=True) + eps)
    nu = exploration(similarity, weights, exploration_score)
    for part in (aligned, present & ~aligned):
        compared = part & others.any(2)
        scaled = min_max(nu, compared)
        nubar = torch.where(compared & (_spread(nu, compared) > FLAT_SPREAD), scaled, nubar)
    sign = torch.where(aligned, 1.0, -1.0)
    return (rewards * (1 + sign * strength * rewards * nubar)).clamp(-clip, clip)


def gar(rewards: Tensor, present: Tensor, alignment: Tensor, *, strength: float) -> Tensor:
    """GAR (arXiv 2609.03342): right responses whose gradient is like an expert solution's gain. [B, M].

        v    = mean_t (dL/dh_t * h_t), L the mean cross-entropy, through the LM head alone
        b_i  = cos(v_i, v of the item's solution)                            alignment
        s'_i = s_i + strength max(0, b_i - mean_j b_j)   right,    s_i   wrong         j: the right responses

    As in the paper: where one response of a group is right, the mean is its own b, and it gains nothing. The
    authors' code (LQgdwind/GAR) takes 0 for the mean there, which GRPO's normalisation of a group undoes.
    Their penalties of format and length are left out.
    """
    right = (rewards > 0) & present
    above = (alignment - masked_mean(alignment, right, 1)).clamp(min=0)
    return rewards + 2 * strength * above * right


@dataclass(frozen=True)
class Method:
    """A method: its function, what that needs, and what it gives."""

    function: Callable[..., Tensor]
    gives: str  # "rewards", from which a trainer computes advantages, or "advantages"
    needs: tuple[str, ...]  # arguments beside rewards and present: similarity, advantages, alignment
    options: tuple[str, ...]  # of MethodOptions and ShapingOptions
    strength: float | None = None  # default of the option `strength`; None: it has none
    texts: bool = False  # whether `similarity` may be that of texts
    binary: bool = False  # whether rewards must be right or wrong
    source: str = ""


METHODS = {
    "repexp": Method(
        repexp,
        "rewards",
        ("similarity",),
        ("strength", "ridge"),
        strength=0.01,
        texts=True,
        source="arXiv 2510.11686",
    ),
    "dqo": Method(
        dqo, "rewards", ("similarity",), ("strength",), strength=1.0, texts=True, source="arXiv 2509.04784"
    ),
    "setpo": Method(
        setpo,
        "advantages",
        ("similarity", "advantages"),
        ("strength",),
        strength=1.0,
        texts=True,
        source="arXiv 2602.01062",
    ),
    "dra": Method(
        dra, "rewards", ("similarity",), ("strength",), strength=1.0, texts=True, source="arXiv 2505.09655"
    ),
    "passk": Method(passk, "advantages", (), ("pass_k", "eps"), binary=True, source="arXiv 2508.10751"),
    "dirl": Method(
        dirl,
        "rewards",
        ("similarity", "alignment"),
        ("strength", "clip", "exploration_score", "eps"),
        strength=0.5,
        source="arXiv 2606.10346",
    ),
    "gar": Method(
        gar, "rewards", ("alignment",), ("strength",), strength=0.5, binary=True, source="arXiv 2609.03342"
    ),
}


def shape_groups(
    name: str,
    rewards: Tensor,
    members: Tensor,
    *,
    similarity: Tensor,
    advantages: Tensor,
    alignment: Tensor | None,
    options: ShapingOptions,
    method_options: MethodOptions,
) -> Tensor:
    """The rewards or advantages of a method, in float64 within: [S] float32, 0 in rows without a group.

    Args:
        name: a key of METHODS.
        rewards: [S] float32; NaN only in rows without a group.
        members: [B, M] int64, rows of each group, -1 at empty places.
        similarity: [B, M, M]; advantages: [S], plain; alignment: [S], where the method needs it; all float32.
        options, method_options: the method takes those of `Method.options`.

    NaN or infinity in what a method needs makes its own group NaN.

    Raises ValueError where alignment is needed and None.
    """
    method = METHODS[name]
    if "alignment" in method.needs and alignment is None:
        raise ValueError(f"alignment: got None, {name} needs [S], one for each response")
    if members.numel() == 0:
        return torch.zeros_like(rewards, dtype=torch.float32)
    present = members >= 0
    rows = members.clamp(min=0)
    given: dict[str, Tensor] = {"rewards": rewards}
    given |= {"advantages": advantages} if "advantages" in method.needs else {}
    if alignment is not None and "alignment" in method.needs:
        given["alignment"] = alignment
    padded = {key: one.double()[rows].masked_fill(~present, 0.0) for key, one in given.items()}
    lost = torch.zeros_like(present[:, :1])
    for one in padded.values():
        lost = lost | ~one.isfinite().all(1, keepdim=True)
    if "similarity" in method.needs:
        pair = present[:, :, None] & present[:, None, :]
        padded["similarity"] = similarity.double().masked_fill(~pair, 0.0)
        lost = lost | ~padded["similarity"].isfinite().all(2).all(1, keepdim=True)
    padded = {key: one.masked_fill(lost.view(-1, *[1] * (one.dim() - 1)), 0.0) for key, one in padded.items()}
    settings = {**vars(options), **vars(method_options), "strength": strength_of(name, method_options)}
    found = method.function(present=present, **padded, **{key: settings[key] for key in method.options})
    if method.gives == "rewards":  # rounding between equal responses must not rank them
        added = (found - padded["rewards"]).masked_fill(~present, torch.inf)
        flat = _spread(added, present) <= ROUNDING
        found = torch.where(flat, padded["rewards"] + added.amin(1, keepdim=True), found)
    if options.uniform_groups == "skip":
        raw = padded.get("advantages", torch.zeros_like(found))  # a uniform group's are 0
        plain = padded["rewards"] if method.gives == "rewards" else raw
        found = torch.where(is_uniform(padded["rewards"], present), plain, found)
    found = found.masked_fill(lost, torch.nan)
    out = rewards.new_zeros(len(rewards) + 1, dtype=torch.float32)
    target = torch.where(present, members, len(rewards)).flatten()  # empty places: a last row, dropped
    return out.index_copy(0, target, found.float().flatten())[:-1]


def strength_of(name: str, method_options: MethodOptions) -> float | None:
    """The strength that a method has: as given, or its own default."""
    return METHODS[name].strength if method_options.strength is None else method_options.strength


def text_similarity(embeddings: Tensor, members: Tensor) -> Tensor:
    """Cosines [B, M, M] float32 of embeddings [S, e] (floats, rows of unit norm) in groups [B, M] int64."""
    groups = embeddings.float()[members.clamp(min=0)].masked_fill((members < 0)[:, :, None], 0.0)
    return groups @ groups.mT
