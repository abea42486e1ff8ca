"""How the program shows an error: a refusal in one line, any other error with its traceback.

A refusal tells the user what to change; the place where it was raised does not help. Any other
error, such as a ValueError of a library that was called with wrong arguments, is a defect of the
program, so its traceback is shown.
"""

import os
import re
import traceback
from pathlib import Path

from absl import app

import sbml

PACKAGE = Path(sbml.__file__).parent


def line(error: BaseException) -> str | None:
    """The type and message of ``error``, for a terminal; None if it is no refusal.

    Refusals are errors of this package's own classes, of files that cannot be read or written, and
    a ``ValueError``, ``ImportError`` or ``UsageError`` that no library raised.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = frames and PACKAGE in Path(frames[-1].f_code.co_filename).parents
    inside = inside and isinstance(error, ValueError | ImportError | app.UsageError)
    own = type(error).__module__.startswith("sbml.")
    if not (inside or own or isinstance(error, OSError)):
        return None
    printable = (
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(error)
    )
    return f"{type(error).__name__}: {relative(''.join(printable))}"


def relative(text: str) -> str:
    """``text`` with the paths below the folder in which the program runs relative to it."""
    try:
        here = os.getcwd()
    except OSError:  # The folder was removed.
        return text
    return text if here == "/" else re.sub(rf"(?<![\w./~-]){re.escape(here)}/", "", text)
