"""Evaluation: pass@k, maj@k and pass@1 of a model on verifiable problems, with intervals (`g2rl eval`)."""
