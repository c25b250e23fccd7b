#!/usr/bin/env bash
# The paper's recipe (Table 3) for Qwen3-1.7B-Base on the MATH training set, in slime. One node; docs/slime.md explains.
#
#     SLIME=/src/slime MEGATRON=/src/Megatron-LM recipes/slime-qwen3-1.7b.sh      with 8 GPUs, on a node where Ray runs (ray start --head)
#     GPUS=4 DATA=/data/math MODELS=/models recipes/slime-qwen3-1.7b.sh           with 4; data and checkpoints in other folders
#     recipes/slime-qwen3-1.7b.sh --rollout-temperature 0.9                       set any option of slime
#     G2RL=recipes/other.yaml recipes/slime-qwen3-1.7b.sh                         other settings; lam: 0 is the baseline, GRPO
#
# The data: train.jsonl and test.jsonl with "prompt" (with the instruction to think step by step and to give the final answer in
# \boxed{}) and "label", the answer. The checkpoints: the model from the hub, and what slime's tools/convert_hf_to_torch_dist.py makes of it.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SLIME=${SLIME:-$PWD/slime}
MEGATRON=${MEGATRON:-$PWD/Megatron-LM}
MODELS=${MODELS:-$PWD/models}
DATA=${DATA:-$PWD/data/math}
GPUS=${GPUS:-8}
G2RL=$(realpath "${G2RL:-$HERE/slime-g2rl.yaml}")
# shellcheck source=/dev/null
source "$SLIME/scripts/models/qwen3-1.7B.sh"    # MODEL_ARGS

options=(
  --custom-megatron-before-log-prob-hook-path g2rl_kernels.integrations.slime.measure_features
  --custom-advantage-function-path g2rl_kernels.integrations.slime.shaped_advantages
  --custom-config-path "$G2RL"
  --advantage-estimator grpo

  --hf-checkpoint "$MODELS/Qwen3-1.7B-Base"
  --ref-load "$MODELS/Qwen3-1.7B-Base_torch_dist"
  --load "$MODELS/Qwen3-1.7B-Base_g2rl"
  --save "$MODELS/Qwen3-1.7B-Base_g2rl"
  --save-interval 50

  --prompt-data "$DATA/train.jsonl"
  --input-key prompt
  --label-key label
  --apply-chat-template
  --rollout-shuffle
  --rm-type math                    # 1 or 0
  --num-epoch 1                     # the paper does not give the number of passes
  --rollout-batch-size 16           # prompts a step
  --n-samples-per-prompt 16
  --rollout-max-prompt-len 1024
  --rollout-max-response-len 8192
  --rollout-temperature 1
  --global-batch-size 32            # "PPO mini-batch 1 (effective 32)": we read 32 responses an update, so 8 updates a rollout

  --eval-interval 50
  --eval-prompt-data math "$DATA/test.jsonl"
  --n-samples-per-eval-prompt 1
  --eval-temperature 0.8
  --eval-max-response-len 8192

  --lr 5e-7
  --lr-decay-style constant
  --weight-decay 0.01
  --adam-beta1 0.9
  --adam-beta2 0.999
  --eps-clip 0.2                    # not given; the usual value
  --use-kl-loss
  --kl-loss-coef 0.001
  --kl-loss-type k2                 # the default, k1, has a gradient of 0 on average
  --entropy-coef 0

  --tensor-model-parallel-size 2
  --sequence-parallel
  --use-dynamic-batch-size
  --max-tokens-per-gpu 9216
  --recompute-granularity full
  --recompute-method uniform
  --recompute-num-layers 1
  --attention-dropout 0
  --hidden-dropout 0
  --accumulate-allreduce-grads-in-fp32
  --attention-softmax-in-fp32
  --attention-backend flash

  --actor-num-nodes 1
  --actor-num-gpus-per-node "$GPUS"
  --colocate
  --rollout-num-gpus-per-engine 1
  --sglang-mem-fraction-static 0.7
)
cd "$SLIME"
exec ray job submit --address "${RAY:-http://127.0.0.1:8265}" \
  --runtime-env-json "{\"env_vars\": {\"PYTHONPATH\": \"$MEGATRON\", \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\"}}" \
  -- "${PYTHON:-python3}" "$SLIME/train.py" "${MODEL_ARGS[@]}" "${options[@]}" "$@"
