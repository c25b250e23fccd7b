#!/usr/bin/env bash
# The paper's recipe (Table 3) for Qwen3-1.7B-Base on the MATH training set, in verl 0.9. One node; docs/verl.md explains.
#
#     recipes/verl-qwen3-1.7b.sh                                            with 8 GPUs
#     GPUS=4 DATA=/data/math recipes/verl-qwen3-1.7b.sh                     with 4; both .parquet files in another folder
#     recipes/verl-qwen3-1.7b.sh +algorithm.g2rl.lam=1                      set any option of verl or G2RL
#     recipes/verl-qwen3-1.7b.sh trainer.v1.trainer_mode=sync               the baseline: verl's own trainer, GRPO
#
# The data: examples/data_preprocess/math_dataset.py of verl's sources writes both files, with the instruction to think
# step by step and the final answer in \boxed{}. verl's rule-based verifier then scores 1 or 0.
set -euo pipefail
DATA=${DATA:-data/math}
GPUS=${GPUS:-8}

options=(
  trainer.v1.trainer_mode=g2rl_sync
  algorithm.adv_estimator=grpo
  +algorithm.g2rl.lam=0.5                     # not given in the paper; 0 is GRPO to the bit
  +algorithm.g2rl.clip=3.0
  +algorithm.g2rl.shaping=right               # right answers alone; the paper: equation, eq. 12 as printed; intent, as the text after it

  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.train_batch_size=16                    # prompts a step
  data.max_prompt_length=1024
  data.max_response_length=8192
  data.filter_overlong_prompts=True

  actor_rollout_ref.model.path=Qwen/Qwen3-1.7B-Base
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True

  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=16              # responses a prompt
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.val_kwargs.temperature=0.8
  actor_rollout_ref.rollout.val_kwargs.do_sample=True
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2

  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.ppo_mini_batch_size=2          # "PPO mini-batch 1 (effective 32)": we read 32 responses an update
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2
  actor_rollout_ref.actor.optim.lr=5e-7
  actor_rollout_ref.actor.clip_ratio=0.2                 # not given; the usual value
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean   # equal weight for every response, as in equation 3
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_coef=0.001
  actor_rollout_ref.actor.kl_loss_type=k2                # the default, low_var_kl, has no gradient beyond 2.6 nats: docs/verl.md
  actor_rollout_ref.actor.entropy_coeff=0
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2

  trainer.project_name=g2rl
  trainer.experiment_name=qwen3-1.7b
  'trainer.logger=[console,tensorboard]'
  trainer.nnodes=1
  trainer.n_gpus_per_node="$GPUS"
  trainer.total_epochs=1                      # 468 steps; the paper does not give the number of passes
  trainer.save_freq=50
  trainer.test_freq=50
)
exec "${PYTHON:-python3}" -m verl.trainer.main_ppo "${options[@]}" "$@"
