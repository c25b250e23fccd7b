"""reasoning-gym's data sets. procedural.py makes a task of them.

judge.py scores, in worker processes; maker.py makes items, in one process, whose this side is process.py.
"""
