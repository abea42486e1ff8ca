"""What the program says of an error: one line of a refusal, and all of what nobody foresaw.

A refusal is an error that this package raises to tell the user what to change. Where it was raised
tells the user nothing. Anything else, as a ValueError of a library that was called wrongly, is a
defect of the program, and keeps its traceback.
"""

import linecache
import traceback
from pathlib import Path

import sbml

PACKAGE = Path(sbml.__file__).parent


def line(error: BaseException) -> str | None:
    """What ``error`` says, for a terminal; None if it is no refusal.

    A refusal is a file that is not there, or is raised by a statement of this package.
    """
    if not isinstance(error, FileNotFoundError) and not _raised_here(error):
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
    """``text`` with an escape for what a terminal would obey, but for line ends."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
