"""Names of files as text that every file and terminal takes."""

import os


def printable(name: str) -> str:
    """``name`` with an escape such as \\x1b for each character that does not print.

    A file's name may hold any bytes: those of no text, line ends, and sequences that a terminal
    would obey.
    """
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
