"""Measures a model on problems with verifiable answers: pass@k and maj@k, with intervals (`g2rl eval`).

Start with samples.py, which samples responses into a file; results.py turns that file into numbers.
"""
