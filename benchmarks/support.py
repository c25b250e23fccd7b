"""Times heads restricted to some ids a token (`support=`) beside the full head, in turns, on a CPU or a GPU.

    python -m benchmarks.support                        qwen3-1.7b's head in bf16, 256 tokens; a minute or two
    python -m benchmarks.support --out benchmarks/results/support.json

Every token has a list of its own, drawn at random: no two tokens share more rows than chance gives, which is
the hardest case (tokens of a language model share most). The limit of a call is the bytes that it gathers
over the machine's copy rate (read and written), measured in the same run: the kept rows once in
`head_features` and in a forward pass, once more for the gradient of hidden.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import g2rl_kernels as g2
from benchmarks.measure import ceilings, in_turns, machine, quantiles
from benchmarks.registry import DTYPES, SHAPES

FORWARD, BOTH = "head_features", "linear_logprobs, forward and backward, frozen weight"


def random_lists(tokens: Tensor, V: int, kept: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many ids a token, the realised one among them, ascending."""
    N = len(tokens)
    # One id out of each of `kept` equal parts of the vocabulary; the token in place of its part's.
    part = V // kept
    first = torch.arange(kept) * part
    ids = first + torch.randint(part, (N, kept), generator=generator)
    at = (tokens // part).clamp_(max=kept - 1)
    ids[torch.arange(N), at] = tokens
    return ids.flatten(), torch.arange(N + 1) * kept


def calls(shape: str, dtype: str, N: int, kept: Sequence[int], device: str) -> dict[str, Callable[[], Any]]:
    head, generator = SHAPES[shape], torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, head.d, generator=generator).mul_(head.d**-0.25).to(DTYPES[dtype]).to(device)
        for rows in (N, head.V)
    )
    tokens = torch.randint(head.V, (N,), generator=generator)
    cu_seqlens = torch.tensor([0, N // 2, N], device=device)
    incoming = torch.randn(N, generator=generator).to(device)

    def both(**options: Any) -> None:
        leaf = hidden.detach().requires_grad_()
        out = g2.linear_logprobs(leaf, weight, tokens.to(device), logit_softcap=head.softcap, **options)
        (out.logprobs * incoming + 0.1 * out.entropy).sum().backward()

    found: dict[str, Callable[[], Any]] = {}
    for ids in (None, *kept):
        options: dict[str, Any] = {"logit_softcap": head.softcap}
        support = None if ids is None else random_lists(tokens, head.V, ids, generator)
        support = None if support is None else (support[0].to(device), support[1].to(device))
        name = "all ids" if ids is None else f"{ids} ids"
        operands = hidden, weight, tokens.to(device), cu_seqlens
        found[f"{FORWARD}: {name}"] = partial(g2.head_features, *operands, support=support, **options)
        found[f"{BOTH}: {name}"] = partial(both, support=support)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a call; milliseconds."""
    lines = [
        "| call | ids a token | ms | times faster | times its bytes at copy rate |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [
            f"{row[key]:.{n}f}" if key in row else "" for key, n in (("times_faster", 0), ("of_copy", 2))
        ]
        ids = row["ids"].removesuffix(" ids")
        lines.append("| " + " | ".join([row["what"], ids, f"{1e3 * row['seconds'][1]:.1f}", *ratios]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.support",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="qwen3-1.7b", choices=SHAPES, help="whose head (%(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="N (%(default)s)")
    parser.add_argument("--kept", type=int, nargs="+", default=[64, 512], help="ids a token (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="writes a JSON file")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head, size = SHAPES[args.shape], DTYPES[args.dtype].itemsize
    made = calls(args.shape, args.dtype, args.tokens, args.kept, device)
    rates = [ceilings(device)["copy_gb_s"]]
    times = in_turns(device, "support", made, args.rounds)
    rates.append(ceilings(device)["copy_gb_s"])
    rate = sum(rates) / 2
    rows = []
    for name, values in times.items():
        what, ids = name.rsplit(": ", 1)
        low, median, high = quantiles(values)
        row: dict[str, Any] = {"what": what, "ids": ids, "seconds": [low, median, high]}
        if ids != "all ids":
            passes = 1 if what == FORWARD else 2
            gathered = passes * args.tokens * int(ids.split()[0]) * head.d * size
            full = quantiles(times[f"{what}: all ids"])[1]
            row |= {"times_faster": full / median, "gathered_bytes": gathered}
            row["of_copy"] = median * rate * 1e9 / gathered
        rows.append(row)
        print(f"{name:64} {1e3 * median:9.2f} ms", end="")
        if "of_copy" in row:
            print(
                f" {row['times_faster']:7.1f} x faster {row['of_copy']:6.2f} of its bytes at copy rate",
                end="",
            )
        print()
    if args.out:
        options = {"shape": args.shape, "dtype": args.dtype, "tokens": args.tokens, "rounds": args.rounds}
        content = {"machine": machine(device), "op": "support", "copy_gb_s": rates, **options, "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
