"""The LM head without its logits: features, log-probabilities, entropy and their gradients.

Start reading at features.py and logprobs.py (the public functions), then spec.py (what a head is), backend.py
(what a backend provides) and reference.py (the equations). README.md draws the dataflow.
"""
