"""Makes the objects of a run from its config, and compares a config with that of a checkpoint.

Each section has a file, whose lines hold the meaning of its fields; ``fields`` is what sections are
made of. ``build`` makes the objects, and ``compatibility`` compares.
"""
