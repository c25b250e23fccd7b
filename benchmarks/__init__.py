"""Microbenchmarks: `g2rl bench`, or `python -m benchmarks.run` in a checkout."""
