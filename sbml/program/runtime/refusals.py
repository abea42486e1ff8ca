"""How the program shows an error: a refusal in one line, any other error with its traceback.

A refusal tells the user what to change; the place where it was raised does not help. Any other
error, such as a ValueError of a library that was called with wrong arguments, is a defect of the
program, so its traceback is shown.
"""

import os
import re
import shutil
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any, TextIO

from absl import app

import sbml
from sbml.core.scalars import escaped

PACKAGE = Path(sbml.__file__).parent
LONGEST = 1_000  # characters of a line that are shown


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
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # Words, without the number of the error.
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return f"{type(error).__name__}: {readable(text)}"


def exit_line(error: SystemExit) -> str | None:
    """The line about code of another package that ended the program; None if this package did."""
    frames = [(f.f_globals["__name__"], f) for f, _ in traceback.walk_tb(error.__traceback__)]
    name, frame = [f for f in frames if f[0].partition(".")[0] not in sys.stdlib_module_names][-1]
    file = frame.f_code.co_filename
    said = f"SystemExit: {name} called sys.exit({error.code!r}) in {file}: raise a ValueError there"
    return None if PACKAGE in Path(file).parents else fitted(readable(said))


def fitted(text: str, stream: TextIO | None = None) -> str:
    """``text`` for ``stream``, or stderr; in a terminal, long lines are :func:`wrapped`."""
    is_live, lines = (stream or sys.stderr).isatty(), text.split("\n")
    width = shutil.get_terminal_size().columns if is_live else len(text)
    return "\n".join(each if len(each) <= width else wrapped(each, width) for each in lines)


def wrapped(line: str, width: int = 80, hang: int = 2) -> str:
    """``line``, wrapped between words. The new lines have ``hang`` more spaces before them."""
    indent = " " * (len(line) - len(line.lstrip()) + hang)
    whole: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width, subsequent_indent=indent, **whole)


def readable(text: str) -> str:
    """``text`` for a terminal: what cannot be printed is escaped, paths are :func:`relative`, and
    of a long line, which repeats a long value, the beginning and the end are kept."""
    lines = relative("\n".join(map(escaped, text.split("\n")))).split("\n")
    half = LONGEST // 2
    return "\n".join(
        line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}" for line in lines
    )


def relative(text: str) -> str:
    """``text`` with the paths below the folder in which the program runs relative to it."""
    try:
        here = os.getcwd()
    except OSError:  # The folder was removed.
        return text
    return text if here == "/" else re.sub(rf"(?<![\w./~-]){re.escape(here)}/", "", text)
