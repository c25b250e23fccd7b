"""The geometry of a model's responses in gradient space (`g2rl geometry`): numbers, and a page about them.

Start with measure.py, which computes the numbers; rows.py has their types, report.py makes the page.
"""
