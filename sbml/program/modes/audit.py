"""Another name of ``--mode=verify``: ``--mode=audit``."""

from sbml.program.modes.verify import run as run
