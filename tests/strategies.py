"""Hypothesis strategies: every shape, dtype, option, segmentation and stride that the contract allows."""

from __future__ import annotations

import torch
from examples import st
from oracle import Case, make_case
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Around the sizes of vectors and blocks, and odd ones.
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 96, 97, 127, 128, 129, 200)


def restride(tensor: Tensor, layout: str) -> Tensor:
    """The same matrix in other memory."""
    rows, columns = tensor.shape
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "rows":  # every second row of a taller one, which holds NaN elsewhere
        base = torch.full((2 * rows + 1, columns), torch.nan, dtype=tensor.dtype)
        base[1::2] = tensor
        return base[1::2]
    if layout == "columns":
        base = torch.full((rows, 3 * columns + 2), torch.nan, dtype=tensor.dtype)
        base[:, 2::3] = tensor
        return base[:, 2::3]
    if layout == "offset":  # a slice that starts at an odd address and has padded rows
        base = torch.full((rows, columns + 3), torch.nan, dtype=tensor.dtype)
        base[:, 1:-2] = tensor
        return base[:, 1:-2]
    return tensor


LAYOUTS = ("contiguous", "transposed", "rows", "columns", "offset")


def low_rank(
    case: Case, r: int, dtype: torch.dtype | None = None, seed: int = 0, scaling: float = 0.5
) -> tuple[Tensor, Tensor, float]:
    """lora of random numbers, for logits of about unit size."""
    (V, d), dtype = case.weight.shape, dtype or case.hidden.dtype
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, d, generator=g) / d**0.5, torch.randn(V, r, generator=g) * 2 / r**0.5
    return A.to(dtype), B.to(dtype), scaling


def random_support(case: Case, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lists of those lengths [N] in no order, the realised token at any place; entries of bias -inf too."""
    V, lists = len(case.weight), []
    for token, length in zip(case.tokens.tolist(), lengths.tolist()):
        others = torch.randperm(V, generator=generator)
        others = others[others != token][: length - 1]
        ids = torch.cat([others, torch.tensor([token])])
        lists.append(ids[torch.randperm(len(ids), generator=generator)])
    ids = torch.cat(lists) if lists else torch.empty(0, dtype=torch.int64)
    return ids, torch.tensor([0, *map(len, lists)]).cumsum(0)


def restricted(case: Case, seed: int = 0, most: int | None = None) -> Case:
    """With lists of every length from 1 to `most` (V)."""
    g = torch.Generator().manual_seed(seed)
    V, N = len(case.weight), len(case.tokens)
    lengths = torch.randint(1, (most or V) + 1, (N,), generator=g).clamp_(max=V)
    lengths[: N // 8] = 1
    return case.replace(support=random_support(case, lengths, g))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    V = draw(st.sampled_from(SIZES) | st.integers(1, 700))
    d = draw(st.sampled_from(SIZES) | st.integers(1, 150))
    lengths = draw(st.lists(st.sampled_from((0, 1, 2, 5, 63, 64, 65)) | st.integers(0, 40), max_size=6))
    N = sum(lengths)
    seed = draw(st.integers(0, 99))
    case = make_case(lengths, V, d, draw(st.sampled_from(DTYPES)), seed)
    g = torch.Generator().manual_seed(seed)
    case.hidden = restride(case.hidden, draw(st.sampled_from(LAYOUTS)))
    case.weight = restride(case.weight, draw(st.sampled_from(LAYOUTS)))
    case.cu_seqlens = case.cu_seqlens.to(draw(st.sampled_from((torch.int32, torch.int64))))
    if draw(st.booleans()):
        dtype = draw(st.sampled_from((torch.float32, case.hidden.dtype)))
        masked = torch.rand(V, generator=g) < draw(st.sampled_from((0.0, 0.3)))
        masked[case.tokens] = False
        masked[0] &= N > 0  # some entry stays
        bias = torch.randn(V, generator=g).masked_fill(masked, -torch.inf).to(dtype)
        case.bias = bias.repeat_interleave(2)[::2] if draw(st.booleans()) else bias
    if draw(st.booleans()):
        case.token_weights = torch.rand(N, generator=g) * (torch.rand(N, generator=g) < 0.7)
    case.temperature = draw(st.sampled_from((1.0, 0.3, 1.7, 0.3 + 1.4 * torch.rand(N, generator=g))))
    case.logit_scale = draw(st.sampled_from((1.0, 0.25, 2.0)))
    case.logit_softcap = draw(st.sampled_from((None, 1.5, 30.0)))
    if draw(st.booleans()):
        r, dtype = (
            draw(st.sampled_from((1, 2, 5, 16, 17, 33, 70))),
            draw(st.sampled_from(DTYPES[:1] * 2 + (None,))),
        )
        A, B, scaling = low_rank(case, r, dtype, seed, draw(st.sampled_from((1.0, -0.7))))
        layouts = st.sampled_from(LAYOUTS)
        case.lora = restride(A, draw(layouts)), restride(B, draw(layouts)), scaling
    return case


@st.composite
def groupings(draw: st.DrawFn) -> tuple[list[int], Tensor, Tensor]:
    """ids (-1: padding), features [S, d] in general or degenerate position, rewards [S]."""
    ids = draw(st.lists(st.sampled_from((-1, 0, 1, 5, 2**40)), max_size=24))
    S, d = len(ids), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    features = torch.randn(S, d, generator=g)
    features *= 10.0 ** torch.randint(-3, 4, (S, 1), generator=g)
    kind = draw(st.sampled_from(("general", "collinear", "zeros")))
    if kind == "collinear" and S:
        features = features[:1] * torch.randn(S, 1, generator=g)
    if kind == "zeros":
        features[torch.rand(S, generator=g) < 0.4] = 0
    values = draw(st.sampled_from(((1.0, -1.0), (1.0,), (0.0, 1.0), (-2.5, 0.3, 7.0))))
    rewards = torch.tensor(values)[torch.randint(len(values), (S,), generator=g)]
    return ids, features, rewards
