"""Intervals, moments and distances of numbers and of images, by NumPy.

May import: core.
"""
