#!/usr/bin/env bash
# transformers: Nemotron-H and Zamba2 compute other logits token by token, with a cache, than in one forward.
#
# Expected: generate() with its cache gives the logits of one forward over the whole sequence, to rounding: there is no
#   padding, and the dtype is float32.
# Observed: with PyTorch's operators, Mamba layers raise time steps to time_step_min (0.001) where they read a
#   sequence, but not where they read one token with a cache. Where a time step is smaller, states differ from then
#   on. Log-probs differ by little more than rounding at small random weights, and by tenths of a nat to nats at
#   larger ones. With the floor at 0 both agree. Nemotron-H's own time_step_limit, (0, inf), is not read.
# Why it matters: the policy that samples is not the one whose log-probs are trained, so importance ratios are not 1 on
#   fresh responses. How far apart the two are depends on the weights, and nothing reports it.
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
from transformers import NemotronHConfig, NemotronHForCausalLM, Zamba2Config, Zamba2ForCausalLM

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers"):
    print(name, version(name))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def nemotron_h(spread):
    config = NemotronHConfig(
        **SIZES,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        layers_block_type=["linear_attention", "full_attention"] * 2,
        initializer_range=spread,
    )
    assert tuple(config.time_step_limit) == (0.0, float("inf"))
    return NemotronHForCausalLM(config)


def zamba2(spread):
    config = Zamba2Config(
        **SIZES,
        num_hidden_layers=4,
        mamba_d_state=16,
        mamba_headdim=16,
        num_mem_blocks=1,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        initializer_range=spread,
    )
    return Zamba2ForCausalLM(config)


@torch.no_grad()
def error(model, **settings):
    """Largest error in nats of the log-probs of 32 sampled tokens, against one forward over prompt and response."""
    torch.manual_seed(1)
    prompt = torch.randint(2, 64, (1, 10))
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=True,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    response = generated.sequences[:, 10:, None]
    sampled = torch.stack(generated.logits, 1).log_softmax(-1).gather(-1, response)
    trained = model(generated.sequences, use_cache=False).logits[:, 9:-1].log_softmax(-1).gather(-1, response)
    return (sampled - trained).abs().max().item()


print("largest error in nats of the log-probs of generate()")
for make in (nemotron_h, zamba2):
    for spread in (0.02, 0.1, 0.3):
        torch.manual_seed(0)
        model = make(spread).eval()
        cached, uncached = error(model), error(model, use_cache=False)
        floors = [layer for layer in model.modules() if hasattr(layer, "time_step_limit")]
        assert floors
        assert all(layer.time_step_limit == (0.001, float("inf")) for layer in floors)
        for layer in floors:
            layer.time_step_limit = (0.0, float("inf"))
        free = error(model)
        print(f"{make.__name__:10} initializer_range={spread:4}: {cached:.1e} with the cache,", end=" ")
        print(f"{uncached:.1e} without it, {free:.1e} with the cache and no floor")
        assert uncached < 2e-3
        assert free < 2e-3
        if spread == 0.02:
            assert cached < 1e-5
        if spread == 0.3:
            assert cached > 0.02
            assert cached > 20 * max(uncached, free)
PROGRAM
