#!/usr/bin/env bash
# TRL: a deep copy of trainer.model computes logits with the original's weights, so an EMA of the policy is the policy.
#
# Expected: copy.deepcopy(trainer.model) is a model of its own: its logits follow its own parameters.
# Observed: its parameters are its own, but logits and generate() use the original's. A copy with all weights zero
#   still generates the original's text. After training, torch's AveragedModel that was never updated gives the
#   trained policy's logits. add_fused_lm_head puts a forward on the model that calls the original's bound forward,
#   and a deep copy keeps that. With fused_lm_head=True the copy uses its own weights, so the two calls disagree.
#   vars(copy).pop("forward") cures it.
# Why it matters: averages of weights, frozen teachers and snapshots for evaluation are made by deepcopy. Each of them
#   answers as the policy of the moment, without an error: a KL to the copy is zero, and an EMA looks as good as the
#   policy. GRPO, RLOO, KTO, DPO and SFT trainers call add_fused_lm_head on their model.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0

HF_HUB_OFFLINE=1 venv/bin/python - <<'PROGRAM'
import copy
import warnings
from importlib.metadata import version

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.swa_utils import AveragedModel
from trl import GRPOConfig, GRPOTrainer

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
for name in ("torch", "transformers", "trl"):
    print(name, version(name))
VOCABULARY = 64
IDS = torch.tensor([[11, 42, 7, 23, 58, 31]])


def make_trainer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w2"}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return GRPOTrainer(
        transformers.LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(
            "trained",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=1,
            learning_rate=0.1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4 w5"] * 8}),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.clone()


def fused(model):
    labels = {"labels": IDS, "fused_lm_head": True}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), **labels).log_probs


def tokens(model):
    return model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, IDS.shape[1] :].tolist()


def distance(one, other):
    return (one - other).abs().max().item()


trainer = make_trainer()
policy = trainer.model
average = AveragedModel(policy)  # a deep copy; update_parameters() is never called, so it stays the first policy
first = logits(policy)
first_weights = {name: weight.clone() for name, weight in policy.named_parameters()}
trainer.train()
for name, weight in average.module.named_parameters():
    assert torch.equal(weight, first_weights[name])
own = type(policy).forward(average.module, input_ids=IDS).logits
print("a copy made before a step of training, its weights unchanged: largest difference of its logits")
for what, found, expected in (
    ("from the policy before the step", distance(logits(average.module), first), "> 1"),
    ("from the policy after the step", distance(logits(average.module), logits(policy)), "0"),
    ("by its class's forward, from the policy before the step", distance(own, first), "0"),
):
    print(f"    {what:57} {found:.4f}")
    assert (found > 1) if expected == "> 1" else (found < 1e-4)

zero = copy.deepcopy(policy)
with torch.no_grad():
    for weight in zero.parameters():
        weight.zero_()
print("a copy with all weights zero, and the policy")
print("    largest logit                 ", *(f"{logits(model).abs().max():.4f}" for model in (zero, policy)))
print("    generate()                    ", tokens(zero), tokens(policy))
print("    log-prob with fused_lm_head   ", *(f"{fused(model)[0, 0]:.4f}" for model in (zero, policy)))
assert torch.equal(logits(zero), logits(policy))
assert tokens(zero) == tokens(policy)
assert distance(fused(zero), -torch.tensor(VOCABULARY).log()) < 1e-4
vars(zero).pop("forward")
print("    largest logit, without forward", f"{logits(zero).abs().max():.4f}")
assert logits(zero).abs().max() == 0
PROGRAM
