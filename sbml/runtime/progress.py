"""Progress bars, on process 0 only: live in a terminal, one line every ten seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm.auto import tqdm


def bar(
    name: str,
    unit: str,
    total: int,
    done: int = 0,
    *,
    leave: bool = True,
    over: Iterable[Any] | None = None,
) -> tqdm:
    """A bar that starts at ``done`` of ``total``; use it as a context manager, or iterate over it
    to get the items of ``over``.

    With ``leave=False`` the finished bar is removed, for one of many similar bars.
    """
    return tqdm(
        over,
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        leave=leave,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=jax.process_index() > 0,
    )
