"""G2RL inside other people's trainers; what is heavy is imported by the module that needs it.

trl.py           G2RLConfig and G2RLTrainer, for TRL
trl_command.py   `g2rl train` for recipes with `engine: trl`
rewards.py       reward functions of the recipes
verl/            the plugin for verl: how it loads, the trainer g2rl_sync, features in the FSDP engine
shaping.py       what the integrations share: from a trainer's scores to shaped ones, and the g2rl/* metrics
"""
