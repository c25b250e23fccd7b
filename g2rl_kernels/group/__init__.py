"""What happens within groups of responses to one prompt: similarity, exploration score, rewards, advantages.

Start with geometry.py, the public op `group_geometry`; shaping.py builds on it what a trainer needs.
"""
