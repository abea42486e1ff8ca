"""How the program shows an error: a refusal in one line, any other error with its traceback.

A refusal is an error that this package raises to tell the user what to change. The place where it
was raised does not help the user. Any other error, such as a ValueError of a library that was
called with wrong arguments, is a defect of the program, so its traceback is shown.
"""

import linecache
import traceback
from pathlib import Path

import sbml

PACKAGE = Path(sbml.__file__).parent


def line(error: BaseException) -> str | None:
    """The type and message of ``error``, for a terminal; None if it is no refusal.

    An error is a refusal if a file cannot be read or written, or if a ``raise`` statement of this
    package raised it.
    """
    if not isinstance(error, OSError) and not _raised_here(error):
        return None
    return f"{type(error).__name__}: {_printable(str(error))}"


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or PACKAGE not in Path(frames[-1].filename).parents:
        return False
    return (
        linecache.getline(frames[-1].filename, frames[-1].lineno or 0).lstrip().startswith("raise")
    )


def _printable(text: str) -> str:
    """``text`` with escapes for all control characters except line ends."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
