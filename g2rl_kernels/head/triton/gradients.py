"""`linear_logprobs` in Triton and cuBLAS: backend "triton". g2rl_kernels/logprobs.py says what is computed.

**Forward.** head_stats over all tokens, its strips joined (head_join.py), the realised token beside them.

**Backward.** For a chunk of tokens x a block of the vocabulary at a time, head_gradient.py computes dz anew,
in the dtype of hidden, and two products of torch's, that is cuBLAS, take it up:

    sum_hidden[chunk] += dz W[block]        grad_weight[block] = sum over chunks of dz^T hidden[chunk]

in float32, the latter rounded once: by the product itself if one chunk holds all tokens, else from sums that
lie in the rows of grad_weight behind the block, which are written later (`_sums`).

**Shapes.** With n tokens a chunk and v entries a block, float32 sums are read and written V / v and N / n
times: 8 N V d (1 / v + 1 / n) bytes beside the 6 N V d operations of the three bare products, which is 310 (1
/ v + 1 / n) of their time at 700 TFLOP/s and 3 TB/s. So both should be large, as far as the buffer for dz
allows: 4096 x 4096. All three products are then cut into whole waves of 128 x 256 tiles on 132
multiprocessors, to 3 %, if d is a multiple of 2048.

**On paper, H100, bf16, V = 151936, d = 2048**, in units of the three bare products, 2.7 us a token:

                                                          N <= 4096    N = 16384
    forward and dz: products, and 6 % for epilogues       0.71         0.71
    dhidden and dW                                        0.67         0.67
    float32 sums, if nothing hides behind products        0.08         0.15
    logits once more in logprobs._gradients, 2 N / V      0.02         0.07
                                                          1.47         1.60

dz is written once and read twice, like operands and results of the bare products, and more often from L2. A
tile of 4096 x 4096 is 0.3 ms of work behind three launches, some 50 us of the CPU's time. If half of the
sums' traffic hides behind products it is 1.43 and 1.52. The aim is 1.5; no GPU has run this yet.

**float16.** g p is mostly below what it can hold where g belongs to a mean over many tokens, and all of dz
but the realised tokens' would vanish. dz is therefore in units of 2^-15 of the largest that it can be, found
on the device, and so are the sums until the sweep ends. Relative error of dW in rows of tokens that were
never realised, 1024 tokens, V = 16384, g = advantages / 16384: 2.5 %, of which all is the result's own
rounding; without the units, and in plain torch, 20 %. bfloat16 has float32's exponents and needs no unit.

**float32.** Torch's products follow torch.set_float32_matmul_precision as all of torch's do: TF32 if the user
allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from ..tiled import slices
from .driver import CHUNK, choice
from .gradient import head_gradient
from .join import head_join
from .stats import head_stats
from .target import head_target
from .tile import Head
from .tuning import Config

GRADIENT = 32 << 20  # bytes of dz
TOKENS = 4096  # of a chunk
ENTRIES = 16384  # of a block of the vocabulary
SUMS = 8 << 20  # bytes of a block's sums, where the gradient itself has no room for them


def statistics(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
) -> tuple[Tensor, Tensor]:
    """m, s and u [1, 3, N] of each token, and the logit of the realised token [N]; in nats, float32.

    A token outside of [0, V), as on a rank that has other rows of the weight, has the logit -inf.
    """
    head = Head(weight, bias, temperature, logit_scale, logit_softcap)
    config, precision = choice("stats", hidden, head)
    tokens = tokens.clamp(-1, weight.shape[0])  # fits an int32
    parts, targets = [hidden.new_empty((1, 3, 0), dtype=torch.float32)], []
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        for rows in slices(0, hidden.shape[0], CHUNK):
            h, y = hidden[rows], tokens[rows]
            parts.append(head_join(head_stats(h, head, y, config, precision)))
            targets.append(head_target(h, head, y, head.nats, outside=-torch.inf)[0])
    return torch.cat(parts, dim=2), torch.cat([parts[0][0, 0], *targets])


def sweep(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
    terms: Tensor,
    temperature: float,
    logit_scale: float,
    logit_softcap: float,
    begin: int,
    end: int,
    sum_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """What the vocabulary entries [begin, end) give to the gradients: see `g2rl_kernels/logprobs.py`.

    grad_weight is contiguous, begin even, and grad_weight[begin:end] free until this returns.
    """
    N, d = hidden.shape
    if N == 0:
        if grad_weight is not None:
            grad_weight[begin:end] = 0
        return
    head = Head(weight, bias, temperature, logit_scale, logit_softcap)
    config, precision = choice("gradient", hidden, head)
    tokens = tokens.clamp(-1, weight.shape[0])
    terms = terms * (logit_scale / temperature)
    unit = _unit(terms) if hidden.dtype == torch.float16 else None
    numbers = torch.cat([normaliser, terms if unit is None else terms / unit])

    chunk, most = _shape(N, end - begin, hidden.element_size(), config)
    buffer = hidden.new_empty(chunk, most)
    # Whether the weight's gradient has to be added up apart from where it ends.
    apart = grad_weight is not None and hidden.element_size() < 4 and (chunk < N or unit is not None)
    if unit is not None and sum_hidden is not None:
        sum_hidden /= unit
    with torch.cuda.device_of(hidden), _rounded_once():
        for block in _blocks(begin, end, most, config.BN, SUMS // (4 * d) if apart else most):
            sum_weight = None if grad_weight is None else grad_weight[block]
            if grad_weight is not None and apart:
                sum_weight = _sums(grad_weight, block, end)
            for rows in slices(0, N, chunk):
                dz = buffer[: rows.stop - rows.start, : block.stop - block.start]
                head_gradient(hidden, head, tokens, numbers, rows, block, dz, config, precision)
                if sum_hidden is not None:
                    _add_product(sum_hidden[rows], dz, weight[block])
                if sum_weight is not None:
                    _add_product(sum_weight, dz.T, hidden[rows], beta=min(1, rows.start))
                if grad_bias is not None:
                    sum_bias = dz.sum(0, dtype=torch.float32)
                    grad_bias[block] += sum_bias if unit is None else sum_bias * unit
            if grad_weight is not None and sum_weight is not None and apart:
                grad_weight[block] = sum_weight if unit is None else sum_weight.mul_(unit)
    if unit is not None and sum_hidden is not None:
        sum_hidden *= unit


def _unit(terms: Tensor) -> Tensor:
    """Of dz in float16: 2^-15 of its largest. A token whose terms are not finite has no say."""
    a, e, at_token = terms.abs().nan_to_num(0.0, 0.0, 0.0)
    return torch.maximum(a + e, at_token).amax().clamp(min=1e-30) / 2**15


def _shape(N: int, V: int, element_size: int, config: Config) -> tuple[int, int]:
    """Tokens of a chunk, all chunks alike, and entries of a block at most."""
    chunk = triton.cdiv(triton.cdiv(N, triton.cdiv(N, TOKENS)), config.BM) * config.BM
    most = min(ENTRIES, GRADIENT // (chunk * element_size), triton.cdiv(V, config.BN) * config.BN)
    return chunk, max(1, most // config.BN) * config.BN


def _blocks(begin: int, end: int, most: int, BN: int, without_room: int) -> Iterator[slice]:
    """Of the vocabulary; `without_room` entries, or so many that twice as many follow, where `_sums` lie."""
    while begin < end:
        size = min(most, max(without_room, (end - begin) // 3))
        stop = min(end, begin + max(1, size // BN) * BN)
        yield slice(begin, stop)
        begin = stop


def _sums(grad_weight: Tensor, block: slice, end: int) -> Tensor:
    """float32 [entries of the block, d], in the rows behind the block, which are written later, if they
    suffice."""
    n, d = block.stop - block.start, grad_weight.shape[1]
    behind = grad_weight[block.stop : end].flatten()
    if len(behind) >= 2 * n * d:
        return behind[: 2 * n * d].view(torch.float32).view(n, d)
    return grad_weight.new_empty(n, d, dtype=torch.float32)


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """out = beta out + a b, added up in float32."""
    if a.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # beside interpreted kernels; on the CPU torch has no products into another dtype
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@contextmanager
def _rounded_once() -> Iterator[None]:
    """torch lets cuBLAS add parts of a bfloat16 product in bfloat16; not here."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    split_k = getattr(flags, "allow_bf16_reduced_precision_reduction_split_k", True)
    flags.allow_bf16_reduced_precision_reduction = False if split_k else (False, False)
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction = before if split_k else (before, False)
