"""Heads restricted to some ids a token: p is the softmax over `support`'s ids alone (head/README.md)."""
