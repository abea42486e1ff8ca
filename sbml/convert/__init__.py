"""Checkpoints of others' published code: one file for each source, which exports

convert(config, workdir, source)      writes what lies in the folder ``source`` to ``workdir``
"""
