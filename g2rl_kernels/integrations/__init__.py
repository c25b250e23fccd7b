"""G2RL in other trainers. Each module imports its own trainer; this package imports none of them.

trl.py                  G2RLTrainer (and G2RLConfig), for TRL; trl_config.py and trl_head.py belong to it
trl_async.py            AsyncG2RLTrainer, for TRL's asynchronous trainer (experimental)
geometry_callback.py    the geometry of responses in any of TRL's trainers
rewards.py              reward functions of the recipes
megatron.py             an output processor for Megatron Core's GPTModel
slime.py                the two functions that slime's flags name
verl/                   the plugin for verl: how it loads, the trainer g2rl_sync, features in the FSDP engine
skyrl.py                G2RLTrainer and its policy worker, for SkyRL
measure.py              both of these: features from a worker's forward
systems.py              both of these: settings, and what is read from the texts of responses
vllm.py                 log-probabilities of its samples, for topk_features
seams.py                what an integration needs of another package, checked at import
"""
