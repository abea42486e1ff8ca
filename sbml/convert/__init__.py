"""Conversion of checkpoints of other published code: one file in this folder for each code.

NETWORK                              the name of the network in its checkpoints
CODE                                 the name of the code in messages
recognises(tree)                     whether a file with the content ``tree`` is such a checkpoint
convert(config, workdir, path, tree) converts the checkpoint and writes it to ``workdir``

A model of diffusers is a folder instead of a file: see ``sbml.convert.diffusers``.
"""

from sbml.convert import score_flow, vdm

SOURCES = (score_flow, vdm)
