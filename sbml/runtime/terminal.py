"""Text in a terminal: a line that does not fit is wrapped between words, not in the middle of one.

The text of ``--help`` is made for 80 columns. Other lines are whole in a file and in a pipe.
"""

import os
import shutil
import sys
import textwrap
from typing import Any, TextIO

WIDTH = 80  # columns of the text of --help


def wrapped(line: str, width: int = WIDTH, hang: int = 2) -> str:
    """``line`` in lines of at most ``width`` characters, as far as its words allow; all but the
    first have its indentation and ``hang`` more spaces."""
    indent = " " * (len(line) - len(line.lstrip()) + hang)
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width, subsequent_indent=indent, **options)


def fitted(text: str, stream: TextIO) -> str:
    """``text`` with its long lines :func:`wrapped`, if ``stream`` is a terminal."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        line if len(line) <= width else wrapped(line, width) for line in text.split("\n")
    )


class Fitted:
    """``stream``, in which every text is :func:`fitted`; for all results that are printed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``."""
        self._stream.write(fitted(text, self._stream))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def show(text: str) -> None:
    """Print ``text``, of which a reader such as ``head`` may take the first lines only."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # What is left goes nowhere, also when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
