"""Names of files as text that can be written to every file and terminal."""

import os


def printable(name: str) -> str:
    """``name`` with an escape such as \\x1b for each character that does not print.

    The name of a file may contain any bytes, also line ends, control sequences of a terminal, and
    bytes that are not text.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
