#!/usr/bin/env bash
# TRL + transformers: GRPO samples by settings that only the model's generation_config has.
#
# Expected: GRPOConfig decides how the trainer samples. min_p=None, its default, is no min_p, and what it has no field
#   for is off. TRL has code of its own that overrides the model's generation_config while it generates.
# Observed: that code does nothing from transformers 5 on. generate() fills what TRL's GenerationConfig leaves unset
#   from model.generation_config: min_p, typical_p and suppress_tokens of a checkpoint's generation_config.json
#   truncate what GRPO samples, while `args` shows min_p=None. What TRL sets (top_p, top_k, temperature) is TRL's.
# Why it matters: tokens come from a truncated softmax, and the loss takes log-probs of the whole one, so ratios are
#   biased in a way that no setting and no metric shows. Checkpoints that were tuned for chat have such files.
#   min_p=0.0 in GRPOConfig switches min_p off; for the rest set the model's generation_config to a new one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0

HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers", "trl"):
    print(name, version(name))

words = ["<pad>", "<eos>", *(f"w{number}" for number in range(30))]
raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="w0"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
config = Qwen3Config(
    vocab_size=len(words),
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.5,
    pad_token_id=0,
    eos_token_id=1,
)


def kept(own, **arguments):
    """The mean number of ids that each token of one GRPO step was drawn from."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(**own)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(one)) for one in completions],
        args=GRPOConfig(
            "out",
            use_cpu=True,
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4", "w5 w6 w7"] * 4}),
        processing_class=tokenizer,
    )
    counts, theirs = [], torch.multinomial

    def watched(p, *others, **keywords):
        counts.append((p > 0).sum(-1).float().mean())
        return theirs(p, *others, **keywords)

    torch.multinomial = watched
    with redirect_stdout(StringIO()):  # TRL's own lines
        trainer.train()
    torch.multinomial = theirs
    mean = float(torch.stack(counts).mean())
    print(f"model.generation_config: {own}; GRPOConfig: {arguments}: {mean:.1f} of {len(words)} ids")
    return mean


V = len(words)
assert GRPOConfig("out", use_cpu=True, bf16=False).min_p is None
assert kept({}) == V
assert kept({"min_p": 0.3}) < V / 2
assert kept({"typical_p": 0.3}) < V / 2
assert kept({"suppress_tokens": [4, 5, 6]}) == V - 3
assert kept({"top_k": 2, "top_p": 0.1}) == V  # TRL sets these
assert kept({"min_p": 0.3}, min_p=0.0) == V
PROGRAM
