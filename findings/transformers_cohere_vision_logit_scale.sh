#!/usr/bin/env bash
# transformers: AyaVision and Cohere2Vision ignore logit_scale of their text configuration; Cohere2 applies it.
#
# Expected: a vision-language model around Cohere2, given text alone, returns the logits of Cohere2ForCausalLM with the
#   same weights and the same text configuration.
# Observed: Cohere2ForCausalLM multiplies logits by logit_scale, 0.0625 by default. The vision classes hold the same
#   backbone, head and configuration and return logits without the factor, 16 times larger.
# Why it matters: for a policy that was trained with the factor, sampling is at 1/16 of the temperature asked for.
#   Greedy answers are the same, so evaluation shows nothing, while entropy, KL and log-probs are of another
#   distribution than those of the text model.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0

HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
from importlib.metadata import version

import torch
import transformers
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2ForCausalLM,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
)

transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers"):
    print(name, version(name))
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}


def text_config():
    return Cohere2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


SCALE = text_config().logit_scale
assert SCALE == 0.0625
ids = torch.tensor([[11, 42, 7, 23, 58, 31, 19, 50]])
for kind, config, image_token in (
    (AyaVisionForConditionalGeneration, AyaVisionConfig, "image_token_index"),
    (Cohere2VisionForConditionalGeneration, Cohere2VisionConfig, "image_token_id"),
):
    torch.manual_seed(0)
    vision = kind(config(text_config=text_config(), vision_config=VISION, **{image_token: 63})).eval()
    text = Cohere2ForCausalLM(text_config()).eval()
    text.model.load_state_dict(vision.model.language_model.state_dict())
    text.lm_head.load_state_dict(vision.lm_head.state_dict())
    assert vision.config.text_config.logit_scale == SCALE
    with torch.no_grad():
        seen, own = vision(input_ids=ids).logits, text(input_ids=ids).logits
    print(f"{kind.__name__}: text_config.logit_scale {SCALE}, same weights and tokens")
    print(f"  its logits are {(seen.norm() / own.norm()).item():.3f} times those of Cohere2ForCausalLM;", end=" ")
    print(f"entropy {entropy(seen):.2f} nats, {entropy(own):.2f} there")
    print(f"  largest difference {(seen - own).abs().max().item():.3f}", end=", ")
    print(f"with the factor applied by hand {(seen * SCALE - own).abs().max().item():.1e}")
    assert (seen - own).abs().max() > 1
    assert torch.equal(seen.argmax(-1), own.argmax(-1))
    assert torch.allclose(seen * SCALE, own, atol=1e-5)
PROGRAM
