"""Error bars of means (intervals), moments, and distances between sets of images, by NumPy.

May import: core.
"""
