"""What the package does with models of transformers: loading them, finding their LM head, checkpointing.

Start with lm_head.py, whose `find_head` gives the ops what they need of a model.
"""
