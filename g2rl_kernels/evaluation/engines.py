"""Engines that sample responses: transformers runs anywhere; vLLM, if installed, is much faster on a GPU."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from .. import versions
from .._files import home
from ..errors import ConfigError, TrainerError, import_failure, one_line, out_of_memory
from ..models.loading import load_config, load_model
from ..trainer.config import TrainerConfig
from ..trainer.sampling import (
    Sampler,
    autocast,
    check_embedded,
    check_room,
    end_tokens,
    prepare_tokenizer,
    response_text,
)
from ..trainer.startup import check_policy


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: from softmax(logits / temperature), cut by top_k, then by top_p and min_p."""

    n: int = 8  # responses for each prompt
    temperature: float = 1.0  # 0: greedy, always the likeliest token
    top_p: float = 1.0  # keeps the fewest likeliest tokens whose probabilities add up to top_p; 1.0: all
    top_k: int = 0  # keeps the top_k likeliest tokens; 0: all
    min_p: float = 0.0  # keeps tokens with at least this share of the likeliest one's probability; 0: all

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot work."""
        for name in ("n", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}={value}: must be a whole number")
        if self.n < 1:
            raise ConfigError(f"n={self.n}: must be at least 1, the number of responses a problem")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: must be at least 0, and finite")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError(f"temperature=0: all n={self.n} responses would be the same; set n to 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must be at least 0; 0 is all tokens")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p}: must be from 0 to 1; 0 is all tokens")


@dataclass(frozen=True)
class Response:
    """One sampled response to a prompt."""

    tokens: list[int]  # up to the first end token, inclusive
    text: str  # without padding and end tokens
    truncated: bool  # no end token came


class Engine(Protocol):
    """A model that answers prompts, and its tokenizer."""

    tokenizer: Any

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """n responses to each prompt. The same prompts and seeds give the same responses.

        prompts: token ids; seeds: one for each prompt.
        """
        ...


class TransformersEngine:
    """Samples with the trainer's sampler. Responses depend on all prompts of a call and its first seed."""

    def __init__(self, model: Any, tokenizer: Any, config: TrainerConfig, decoding: Decoding):
        self.model, self.tokenizer, self.n = model.eval(), tokenizer, decoding.n
        config = replace(
            config,
            temperature=decoding.temperature or 1.0,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            min_p=decoding.min_p,
            keep_sampling_mask=False,  # nothing is trained
        )
        self.sampler = Sampler(model, tokenizer, [], config)
        if decoding.temperature == 0:
            generation = self.sampler.generation
            generation.do_sample, generation.temperature, generation.top_p = False, None, None
            generation.top_k = None
        check_policy(
            model,
            tokenizer.pad_token_id,
            temperature=decoding.temperature or 1.0,
            context=lambda: autocast(self.sampler.config, model.device),
        )

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[0])
            nothing: Any = None  # the sampler uses neither task nor item
            rollout = self.sampler.respond([(nothing, {}, p) for p in prompts for _ in range(self.n)])
        ids = rollout.ids[:, -rollout.mask.shape[1] :]
        responses = [
            Response(row[mask].tolist(), text, bool(truncated))
            for row, mask, text, truncated in zip(ids, rollout.mask, rollout.completions, rollout.truncated)
        ]
        return [responses[at : at + self.n] for at in range(0, len(responses), self.n)]


# vLLM's environment, where the user has not set it.
VLLM_ENVIRONMENT = {
    # The engine in this process: one of its own outlives a killed parent, with all its memory, and schedules
    # requests by arrival, so that equal seeds may give other samples.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; vLLM would take 92 % of all memory, or fail where it is in use
}


class VllmEngine:
    """Samples with vLLM's offline `LLM`. Each prompt has its own seed, whatever is in a batch with it.

    vLLM works in this process: it sets the seeds of torch, numpy and random, and when one of two engines is
    freed, the other no longer works.
    """

    def __init__(self, tokenizer: Any, config: TrainerConfig, decoding: Decoding, **options: Any):
        """options: further arguments of vllm.LLM, or others for its own, e.g. gpu_memory_utilization=0.5."""
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        vllm = _vllm()
        from transformers import GenerationConfig

        if config.model.startswith("pypi:"):
            raise ConfigError(f"engine=vllm: cannot read {config.model}; use engine=transformers")
        model_config = load_config(config)
        try:
            generation = GenerationConfig.from_pretrained(home(config.model))
        except OSError:  # the model has no generation_config.json
            generation = GenerationConfig.from_model_config(model_config)
        prepare_tokenizer(tokenizer, model_config, config)
        self.tokenizer, self.end_tokens = tokenizer, end_tokens(tokenizer, generation, config)
        self.longest = config.max_prompt_tokens
        self.params = {
            "n": decoding.n,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or -1,  # -1 means all tokens in every version of vLLM
            "min_p": decoding.min_p,
            "max_tokens": config.max_new_tokens,
            "stop_token_ids": self.end_tokens,
            "detokenize": False,  # `_response` decodes, as for the other engine
        }
        self.make_params = vllm.SamplingParams
        self._check_params(decoding)
        # generation_config="vllm": nothing of the model's own generation_config.json is used
        arguments = {
            "model": home(config.model),
            "dtype": config.dtype,
            "seed": config.seed,
            "max_model_len": config.max_prompt_tokens + config.max_new_tokens,
            "generation_config": "vllm",
        }
        from vllm.platforms import current_platform

        if current_platform.is_cpu():  # vLLM 0.32 fails there at the first prompt with a seed that it splits
            arguments["enable_chunked_prefill"] = False
        try:
            self.llm = vllm.LLM(**{**arguments, **options})
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = one_line(error)
            raise TrainerError(f"engine=vllm: vLLM cannot load {config.model!r}: {reason}") from error

    def _check_params(self, decoding: Decoding) -> None:
        """Raises ConfigError for what vLLM refuses or would change, before the model is loaded."""
        try:
            made = self.make_params(seed=0, **self.params)
        except Exception as error:  # of vLLM's own types, which differ from version to version
            raise ConfigError(f"engine=vllm: {one_line(error)}; or use engine=transformers") from None
        if made.temperature != decoding.temperature:  # it raises small ones, with a warning in its log
            raise ConfigError(
                f"temperature={decoding.temperature}: vLLM would sample with {made.temperature}: give that "
                "or more, 0 (greedy) with n=1, or use engine=transformers"
            )

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[Response]]:
        for index, prompt in enumerate(prompts):
            if len(prompt) > self.longest:  # vLLM would cut its responses short
                raise ConfigError(
                    f"prompts: number {index} has {len(prompt)} tokens, the engine is made for "
                    f"max_prompt_tokens={self.longest}: raise it"
                )
        # Keys cached in an earlier call may differ in their last bits, and so, now and then, a token would.
        self.llm.reset_prefix_cache()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [self.make_params(seed=seed, **self.params) for seed in seeds],
            use_tqdm=False,
        )
        return [[self._response(list(out.token_ids)) for out in output.outputs] for output in outputs]

    def _response(self, tokens: list[int]) -> Response:
        ends = [at for at, token in enumerate(tokens) if token in self.end_tokens]
        if ends:
            tokens = tokens[: ends[0] + 1]
        return Response(tokens, response_text(tokens, self.tokenizer, self.end_tokens), not ends)


def _vllm() -> Any:
    """The module vllm; TrainerError where it cannot be imported, a warning for an untested version."""
    missing = "engine=vllm: vllm is not installed: pip install vllm, or use engine=transformers"
    try:
        import vllm
    except Exception as error:  # its dependencies raise many types where they do not fit each other
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise TrainerError(missing) from None
        reason = import_failure(error) or f"{type(error).__name__}: {one_line(error)}"
        raise TrainerError(f"engine=vllm: {reason}; or use engine=transformers") from error
    if not hasattr(vllm, "LLM"):  # a folder of that name
        raise TrainerError(missing)
    versions.warn_untested("vllm", vllm.__version__, stacklevel=3)
    return vllm


def check_prompts(
    prompts: Mapping[str, list[int]], model_config: Any, tokenizer: Any, config: TrainerConfig
) -> None:
    """Raises ConfigError or TrainerError, naming the problem, for a prompt that the model cannot answer.

    prompts: {problem: token ids}.
    """
    rows = model_config.get_text_config().vocab_size
    for problem, tokens in prompts.items():
        what = f"data: problem {problem}"
        check_embedded(tokens, rows, tokenizer, what)
        what += f" ({len(tokens)} tokens)"
        check_room(len(tokens), config.max_new_tokens, model_config, what, "--max-new-tokens")


def choose_engine(name: str, model: str) -> str:
    """`name`; for "auto": "vllm" if it is installed, a GPU is there and it can read the model, else
    "transformers". ConfigError for another name."""
    if name not in ("auto", "transformers", "vllm"):
        raise ConfigError(f"engine={name!r}: choose one of auto, transformers, vllm")
    if name != "auto":
        return name
    found = importlib.util.find_spec("vllm")  # a folder of that name has no origin
    usable = found is not None and found.origin is not None and torch.cuda.is_available()
    return "vllm" if usable and not model.startswith("pypi:") else "transformers"


def load_engine(name: str, tokenizer: Any, config: TrainerConfig, decoding: Decoding) -> Engine:
    """Loads config.model, whose tokenizer is given, into "transformers" or "vllm"."""
    if name == "vllm":
        return VllmEngine(tokenizer, config, decoding)
    return TransformersEngine(*load_model(config, tokenizer), config, decoding)
