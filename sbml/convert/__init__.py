"""Checkpoints of others' published code: one file for each source, which exports

NETWORK                              the network that its checkpoints are of
CODE                                 what messages call it
recognises(tree)                     whether a file of this content is one of its checkpoints
convert(config, workdir, path, tree) writes the checkpoint to ``workdir``
"""
