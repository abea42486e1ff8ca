"""Another name of ``--mode=verify``: ``--mode=audit``."""

from sbml.modes.verify import run as run
