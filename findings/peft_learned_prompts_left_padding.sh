#!/usr/bin/env bash
# PEFT: with a learned prompt, left padding changes the logits of generate() or of a forward, though the mask is right.
#
# Expected: attention_mask hides the padding, and Llama's rotary positions are relative, so a left-padded prompt gives
#   the logits of the prompt alone. The base model and LoRA do that.
# Observed: virtual tokens stand in front of the padding, so each pad token moves them one position further from the
#   prompt. Prompt tuning and P-tuning ignore position_ids (with a Python warning), so generate() and every forward
#   are nats off. Prefix tuning uses them: generate() is right, but a forward without position_ids is nats off.
# Why it matters: in a batch of prompts of different lengths, a row's policy depends on the longest prompt beside it.
#   With prefix tuning the sampler is right and log-probs of a padded forward without position_ids are
#   not, so importance ratios are far from 1 on fresh responses.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2

HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
import warnings
from importlib.metadata import version

import peft
import torch
import transformers

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers", "peft"):
    print(name, version(name))
PROMPT = torch.tensor([[11, 42, 7, 23, 58, 31]])
RESPONSE = torch.tensor([[19, 50, 8, 37, 26]])
TASK = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "no adapter": None,
    "LoRA": peft.LoraConfig(r=2, init_lora_weights=False, **TASK),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
}


def tiny(adapter):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    return (model if adapter is None else peft.get_peft_model(model, adapter)).eval()


@torch.no_grad()
def errors(model, pads):
    """Errors in nats of generate() and of a padded forward, without and with position_ids, from the prompt alone."""
    steps, response = RESPONSE.shape[1], iter(RESPONSE[0].tolist())
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), PROMPT], 1)
    mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(PROMPT)], 1)

    def force(_, scores):  # generate() has to choose RESPONSE; output_logits are those before this
        chosen = torch.full_like(scores, -1e9)
        chosen[:, next(response)] = 0.0
        return chosen

    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        logits_processor=[force],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences[:, -steps:], RESPONSE)
    sequence, whole = torch.cat([ids, RESPONSE], 1), torch.cat([mask, torch.ones_like(RESPONSE)], 1)
    forward, placed = (
        model(input_ids=sequence, attention_mask=whole, position_ids=positions, use_cache=False).logits
        for positions in (None, (whole.cumsum(-1) - 1).clamp(min=0))
    )
    alone = model(input_ids=torch.cat([PROMPT, RESPONSE], 1), use_cache=False).logits
    found = torch.stack(generated.logits, 1), forward[:, -steps - 1 : -1], placed[:, -steps - 1 : -1]
    own = alone[:, -steps - 1 : -1].log_softmax(-1)
    return [(logits.log_softmax(-1) - own).abs().max().item() for logits in found]


print("largest error in nats of  generate()      forward  with position_ids")
for name, adapter in ADAPTERS.items():
    model = tiny(adapter)
    for pads in (0, 1, 4):
        generated, forward, placed = errors(model, pads)
        print(f"{name:13} {pads} pads     {generated:12.5f} {forward:12.5f} {placed:18.5f}")
        learned = pads > 0 and name in ("prompt tuning", "P-tuning")
        assert (generated > 0.2) if learned else (generated < 1e-3)
        assert (placed > 0.2) if learned else (placed < 1e-3)
        assert (forward > 0.2) if learned or (pads and name == "prefix tuning") else (forward < 1e-3)
PROGRAM
