"""Progress bars: live at a terminal, a line now and then in a log, and on process 0 alone."""

import sys

import jax
from tqdm.auto import tqdm


def bar(name: str, unit: str, total: int, done: int = 0, *, leave: bool = True) -> tqdm:
    """A bar that starts at ``done`` of ``total``; use it as a context manager.

    ``leave=False`` wipes it off when done, for one of many alike.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        leave=leave,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=jax.process_index() > 0,
    )
