"""Features from a sampler's top-k log-probabilities, beside the exact ones, on rollouts of SmolLM2-135M.

    g2rl train recipes/demo.yaml                                     # writes runs/demo/model
    python -m benchmarks.topk_features --trained runs/demo/model     # benchmarks/results/topk-features.json
    python -m benchmarks.topk_features --document                    # docs/topk.md and its figure from it

Groups of responses to sums and open questions, of the model as it is at several temperatures, and of the
trained one. The log-probabilities are those of the sampled distribution, in float32, as vLLM reports them
with logprobs_mode="processed_logprobs". What stands in a row of the result: see `compare`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import g2rl_kernels as g2
from g2rl_kernels._files import write_whole
from g2rl_kernels.evaluation.engines import Decoding, TransformersEngine
from g2rl_kernels.models.lm_head import LMHead
from g2rl_kernels.models.loading import load_model
from g2rl_kernels.trainer import TrainerConfig

from .measure import machine, progress
from .vllm_logprobs import MODEL
from .vllm_logprobs import QUESTIONS as EIGHT

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "topk-features.json"
PAGE, FIGURE = ROOT / "docs" / "topk.md", ROOT / "docs" / "topk.png"
BLOCK = re.compile(r"(<!-- table: topk_features -->\n).*?(<!-- end -->)", re.DOTALL)

QUESTIONS = EIGHT[::2]  # two sums, two that are open
TEMPERATURES = (0.4, 0.7, 1.0, 1.3)
SAMPLES, NEW_TOKENS = 8, 48
KS = (5, 10, 20, 64, 128)
# Estimate -> `renormalise`, and whether the mean row is taken off the weight first.
ESTIMATES = {
    "renormalised": (True, False),
    "as reported": (False, False),
    "as reported, W centred": (False, True),
}
SHOWN = (5, 20, 64, 128)  # in the table


class Rollout(NamedTuple):
    """Responses of one policy, packed: `SAMPLES` to each question, and the KS[-1] likeliest of each token."""

    tokens: Tensor  # [N]
    cu_seqlens: Tensor  # [S + 1]
    top_ids: Tensor  # [N, k]
    top_logprobs: Tensor  # [N, k]
    exact: g2.HeadFeatures


def prompts_of(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@torch.no_grad()
def roll_out(model: Any, head: LMHead, tokenizer: Any, config: TrainerConfig, temperature: float) -> Rollout:
    prompts = prompts_of(tokenizer)
    config = replace(config, temperature=temperature)
    engine = TransformersEngine(model, tokenizer, config, Decoding(n=SAMPLES, temperature=temperature))
    responses = [
        (prompt, response.tokens)
        for prompt, group in zip(prompts, engine.sample(prompts, range(len(prompts))))
        for response in group
    ]
    hidden = torch.cat([states(head, prompt, tokens) for prompt, tokens in responses])
    tokens = torch.tensor([token for _, ids in responses for token in ids])
    cu_seqlens = torch.tensor([0, *(len(ids) for _, ids in responses)]).cumsum(0)
    tops = [(head.logits(h) / temperature).log_softmax(1).topk(KS[-1]) for h in hidden.split(128)]
    exact = g2.head_features(hidden, tokens=tokens, cu_seqlens=cu_seqlens, **head.arguments(temperature))
    logprobs, ids = (torch.cat(part) for part in zip(*tops))
    return Rollout(tokens, cu_seqlens, ids, logprobs, exact)


def states(head: LMHead, prompt: list[int], tokens: list[int]) -> Tensor:
    """Hidden states that predict the tokens of a response, [n, d]."""
    out: Tensor = head.backbone(input_ids=torch.tensor([prompt + tokens])).last_hidden_state
    return out[0, len(prompt) - 1 : -1]


def pairwise(features: Tensor) -> Tensor:
    """[groups, pairs]: the cosine of each pair of responses to the same question."""
    grouped = torch.nn.functional.normalize(features.double(), dim=1).view(-1, SAMPLES, features.shape[1])
    first, second = torch.triu_indices(SAMPLES, SAMPLES, 1)
    return (grouped @ grouped.mT)[:, first, second]


def compare(
    rollout: Rollout, weight: Tensor, k: int, estimate: str, constants: dict[str, float]
) -> dict[str, float]:
    """The estimate's features against the exact ones.

    cosine, cosine_min: with the exact feature, mean and least over responses; error: |estimate - exact| /
    |exact|, mean. pairs_error, pairs_error_max: by how much the cosine of two responses to a question is off;
    pairs_correlation: of these cosines with the exact ones, over all pairs. missing_mass: mean over
    responses. bound_over_error, bound_over_error_min: mean and least over responses; at least 1.
    """
    renormalise, centred = ESTIMATES[estimate]
    out = g2.topk_features(
        weight - weight.mean(0) if centred else weight,
        rollout.tokens,
        rollout.top_ids[:, :k],
        rollout.top_logprobs[:, :k],
        rollout.exact.logprobs,
        rollout.cu_seqlens,
        renormalise=renormalise,
    )
    exact = rollout.exact.features.double()
    cosine = torch.cosine_similarity(out.features.double(), exact)
    error = (out.features.double() - exact).norm(dim=1)
    bound = out.missing_mass * constants[estimate]
    pairs, exact_pairs = pairwise(out.features), pairwise(exact)
    off = (pairs - exact_pairs).abs()
    found = {
        "missing_mass": out.missing_mass.mean(),
        "cosine": cosine.mean(),
        "cosine_min": cosine.min(),
        "error": (error / exact.norm(dim=1)).mean(),
        "pairs_error": off.mean(),
        "pairs_error_max": off.max(),
        "pairs_correlation": torch.corrcoef(torch.stack([pairs.flatten(), exact_pairs.flatten()]))[0, 1],
        "bound_over_error": (bound / error).mean(),
        "bound_over_error_min": (bound / error).min(),
    }
    return {name: float(f"{float(value):.4g}") for name, value in found.items()}


def diameter(weight: Tensor) -> float:
    """max_v,w ||W[v] - W[w]||. Rows near the middle cannot be part of the largest pair: they are left out."""
    weight = weight.double()
    radii, order = (weight - weight.mean(0)).norm(dim=1).sort(descending=True)
    largest, count = 0.0, 1000
    while True:
        far = weight[order[:count]].float()
        largest = max(float(torch.cdist(part, far).max()) for part in far.split(1000))
        needed = int((radii + radii[0] >= largest).sum())
        if needed <= count:
            return largest
        count = needed


def policies(trained: Path | None) -> Iterator[tuple[str, str, float]]:
    """Name, model and temperature of each."""
    for temperature in TEMPERATURES:
        yield f"temperature {temperature}", MODEL, temperature
    if trained is not None:
        yield "trained, temperature 1.0", str(trained), 1.0


def measure(trained: Path | None) -> Iterator[dict[str, Any]]:
    loaded, constants = "", {}
    for name, path, temperature in policies(trained):
        progress(name)
        if path != loaded:
            config = TrainerConfig.from_dict(
                {"model": path, "max_new_tokens": NEW_TOKENS, "max_prompt_tokens": 96}
            )
            model, tokenizer = load_model(config)
            head, loaded = g2.find_head(model), path
            weight = head.weights(torch.float32)[0].detach()
            radius, centred = weight.norm(dim=1).max(), (weight - weight.mean(0)).norm(dim=1).max()
            constants = dict(zip(ESTIMATES, (diameter(weight), float(radius), float(centred))))
        rollout = roll_out(model, head, tokenizer, config, temperature)
        policy = {
            "policy": name,
            "entropy": float(f"{rollout.exact.entropy.mean():.4g}"),
            "tokens": len(rollout.tokens),
            "responses": len(rollout.exact.features),
        }
        for k in KS:
            for estimate in ESTIMATES:
                yield (
                    policy | {"k": k, "estimate": estimate} | compare(rollout, weight, k, estimate, constants)
                )


# --- the page -----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| policy | entropy, nats | k | missing mass | cosine, mean (least) | pairs off by, mean (most) | "
        "pairs' correlation | as reported, mean cosine: W, W centred |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["policy"], row["k"], row["estimate"]): row for row in rows}
    for policy, k, estimate in found:
        if estimate == "renormalised" and k in SHOWN:
            row, plain, centred = (found[policy, k, name] for name in ESTIMATES)
            cells = [
                f"{policy} | {row['entropy']:.2f} | {k} | {100 * row['missing_mass']:.1f} %",
                f"{row['cosine']:.3f} ({row['cosine_min']:.3f})",
                f"{row['pairs_error']:.3f} ({row['pairs_error_max']:.2f})",
                f"{row['pairs_correlation']:.3f}",
                f"{plain['cosine']:.3f}, {centred['cosine']:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def filled(page: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with its table from the result."""
    return BLOCK.sub(lambda found: found[1] + table(rows) + found[2], page)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against entropy, a curve a k; dashed without `renormalise`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "error": "feature: |estimate - exact| / |exact|, mean",
        "pairs_error": "cosine of two responses: off by, mean",
    }
    colours = dict(zip(KS, ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#666666")))
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items()):
        for k, colour in colours.items():
            for estimate, style in (("renormalised", "-"), ("as reported", "--")):
                line = sorted(
                    (row["entropy"], row[key])
                    for row in rows
                    if row["k"] == k and row["estimate"] == estimate
                )
                label = f"k = {k}" if style == "-" else None
                axes.plot(*zip(*line), style, color=colour, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("mean entropy, nats a token")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KS), frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.topk_features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trained", type=Path, help="a further policy: the folder of a model")
    parser.add_argument("--out", type=Path, default=OUT, help="the result")
    parser.add_argument("--document", action="store_true", help="fill in the page from the result, no more")
    args = parser.parse_args(argv)
    if not args.document:
        rows = [*measure(args.trained)]
        found = machine("cpu")
        where = {key: found[key] for key in ("date", "cpu", "cores", "threads", "isa", "torch", "python")}
        report = {
            "machine": where,
            "model": MODEL,
            "samples": SAMPLES,
            "new_tokens": NEW_TOKENS,
            "rows": rows,
        }
        write_whole(args.out, json.dumps(report, indent=1) + "\n")
    rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    if args.document:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
        draw(rows, FIGURE)
    print(table(rows))


if __name__ == "__main__":
    main()
