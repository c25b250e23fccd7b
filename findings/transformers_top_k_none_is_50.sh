#!/usr/bin/env bash
# transformers: `top_k=None` is off as an argument of generate(), but 50 in a GenerationConfig.
#
# Expected: None in a configuration means what it means as an argument: no top_k. model.generation_config.top_k is
#   None for a new model, so that do_sample=True draws from the whole softmax.
# Observed: generate(do_sample=True) keeps 50 entries, and so it does with GenerationConfig(top_k=None), or after
#   model.generation_config.top_k = None; the configuration says None all the while. generate(top_k=None) keeps all.
#   What is None in a configuration counts as unset, and unset is 50. top_k=0 is off everywhere.
# Why it matters: RL samples from a policy cut to 50 entries and trains the whole one, so that ratios are biased.
#   Printing the configuration shows None. Trainers that pass a user's top_k in a GenerationConfig turn None into 50.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0

HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
import warnings
from importlib.metadata import version

import torch
import transformers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers"):
    print(name, version(name))
torch.manual_seed(0)
V = 300
config = Qwen3Config(
    vocab_size=V,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    bos_token_id=None,
    eos_token_id=None,
)


def kept(how, own="unset", **options):
    """How many entries the next token is drawn from."""
    model = Qwen3ForCausalLM(config)
    assert model.generation_config.top_k is None
    if own != "unset":
        model.generation_config.top_k = own
    out = model.generate(
        torch.tensor([[1, 2]]),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    found = int((out.scores[0] > -torch.inf).sum())
    print(f"{how:40} {found:3} of {V} entries")
    return found


assert GenerationConfig(do_sample=True).top_k is None
assert kept("generate()") == 50
assert kept("generate(top_p=1.0, temperature=1.0)", top_p=1.0, temperature=1.0) == 50
assert kept("model.generation_config.top_k = None", own=None) == 50
none = GenerationConfig(do_sample=True, top_k=None)
assert kept("GenerationConfig(top_k=None)", generation_config=none) == 50
assert kept("generate(top_k=None)", top_k=None) == V
zero = GenerationConfig(do_sample=True, top_k=0)
assert kept("GenerationConfig(top_k=0)", generation_config=zero) == V
assert kept("generate(top_k=0)", top_k=0) == V
PROGRAM
