#!/usr/bin/env bash
# transformers: MiniMax whose first layer is linear attention generates from another distribution after left padding.
#
# Expected: a prompt with padding on its left, and the attention_mask that says so, is continued as the prompt alone.
# Observed: from the second token on, the logits of generate() are nats away; one pad token is enough. A forward over
#   the padded sequence is right, and so are generate(use_cache=False) and a model whose first layer is full attention.
#   The cache asks its first layer for the length so far. A linear layer keeps no keys, so the answer stays 0, and
#   the mask of each new token has a single column, the prompt's first. Where that is a pad, full attention sees
#   no token at all.
# Why it matters: RL samples batches of prompts of different lengths, padded on the left. The responses come from
#   another policy than the one whose log-probs are trained, without an error. MiniMax-Text-01 has seven linear
#   layers before each one of full attention, so its first layer is linear.
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
from transformers import MiniMaxConfig, MiniMaxForCausalLM

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers"):
    print(name, version(name))
PROMPT = torch.tensor([[11, 42, 7, 23, 58, 31]])
RESPONSE = torch.tensor([[19, 50, 8, 37, 26]])


def tiny(layers):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        block_size=16,
        max_position_embeddings=64,
        initializer_range=0.3,
        layer_types=layers,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MiniMaxForCausalLM(config).eval()


@torch.no_grad()
def errors(model, pads, use_cache=True):
    """Largest errors in nats, by response token, of generate() and of a padded forward, against the prompt alone."""
    steps, response = RESPONSE.shape[1], iter(RESPONSE[0].tolist())
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), PROMPT], 1)
    mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(PROMPT)], 1)

    def force(_, scores):  # generate() has to choose RESPONSE; output_logits are those before this
        chosen = torch.full_like(scores, -1e9)
        chosen[:, next(response)] = 0.0
        return chosen

    generated = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        use_cache=use_cache,
        logits_processor=[force],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences[:, -steps:], RESPONSE)
    whole = torch.cat([mask, torch.ones_like(RESPONSE)], 1)
    forward = model(torch.cat([ids, RESPONSE], 1), attention_mask=whole, use_cache=False).logits
    alone = model(torch.cat([PROMPT, RESPONSE], 1), use_cache=False).logits[:, -steps - 1 : -1].log_softmax(-1)
    both = torch.stack(generated.logits, 1), forward[:, -steps - 1 : -1]
    return [(logits.log_softmax(-1) - alone).abs().amax(-1)[0] for logits in both]


def show(what, nats):
    print(f"{what:62}", *(f"{x:6.3f}" for x in nats.tolist()))


print("largest error in nats, for each of 5 response tokens")
linear_first = tiny(["linear_attention", "full_attention"] * 2)
full_first = tiny(["full_attention", "linear_attention"] * 2)
for pads in (0, 1, 3):
    generated, forward = errors(linear_first, pads)
    show(f"linear layer first, {pads} pads, generate()", generated)
    show(f"linear layer first, {pads} pads, forward", forward)
    assert forward.max() < 1e-3
    assert generated[0] < 1e-3
    assert (generated[1:].max() > 1) == (pads > 0)
for what, found in (
    ("linear layer first, 3 pads, generate(use_cache=False)", errors(linear_first, 3, use_cache=False)[0]),
    ("full attention first, 3 pads, generate()", errors(full_first, 3)[0]),
):
    show(what, found)
    assert found.max() < 1e-3
PROGRAM
