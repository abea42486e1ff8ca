"""Parts by name: a short name of this package, or ``package.module:Name`` of any other.

    SDES = Registry("SDE", {"vp": "sbml.sdes.linear_beta:VP"}, subclass(SDE))
    SDES["vp"]                  the class VP; its module is imported only now
    SDES["mine.sdes:Mine"]      the class Mine of the user's own module

A registry can also hold a part itself instead of its ``module:Name``.

To import a part of another package is to run its code. A name in the user's own Python code may be
imported; for names in files that may be somebody else's, :func:`only` says which.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any

from sbml.core import door

OUTSIDE = re.compile(r"\w+(?:\.\w+)*:\w+")  # the form of the name of a part of another package
# What :func:`only` allows; None: everything. Each thread has its own value, so a thread that works
# for the context of another one must run in a copy of it (``contextvars.copy_context``).
_trusted: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar(
    "trusted", default=None
)


@contextlib.contextmanager
def only(names: Iterable[str]) -> Iterator[None]:
    """A context in which parts of other packages are imported only if they are among ``names``, or
    in a package or module among them, and only paths among them are read (:func:`check_path`). A
    context inside of another one changes nothing. Contexts of other threads have no effect."""
    before = _trusted.get()
    token = _trusted.set(frozenset(names) if before is None else before)
    try:
        yield
    finally:
        _trusted.reset(token)


def _is_trusted(name: str) -> bool:
    trusted = _trusted.get()
    if trusted is None or name in trusted:
        return True
    module = name.partition(":")[0]
    return any(f"{module}.".startswith(f"{package}.") for package in trusted)


def absolute(path: str) -> str:
    """The absolute path, which is never the name of a package."""
    return os.path.abspath(os.path.expanduser(path))


def check_path(field: str, path: str) -> None:
    """Check that the program may use ``path``, the value of ``field``: it is empty, :func:`only`
    names it, or there is no such context. Files there can name code, and be private."""
    trusted = _trusted.get()
    if path and trusted is not None and absolute(path) not in map(absolute, trusted):
        raise PermissionError(
            f"{field}={path} is not read: a file of the work directory names it, but you did not. "
            f"If you mean this path, give {shlex.quote(f'--config.{field}={path}')}, or "
            f"{shlex.quote(f'--trust={path}')}, or the --config that names it (in Python: "
            f"trust=[{path!r}])"
        )


def hint(name: str, names: Iterable[str], remedy: str = "", section: str = "") -> str:
    """The end of a message about an unknown ``name``: first the one of ``names`` that is most like
    it, with its ``section``; then the ``remedy``."""
    known = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), known, 1)
    if not near:
        return remedy
    return f"did you mean {section}{known[near[0]]}? {remedy[:1].upper()}{remedy[1:]}".rstrip()


def listed(name: str, names: Collection[str]) -> str:
    """The ``names`` in one line; of more than 15, the six that are most like ``name``."""
    if len(names) <= 15:
        return ", ".join(names)
    near = difflib.get_close_matches(name, names, 6, cutoff=0)
    return f"{', '.join(filter(near.__contains__, names))} and {len(names) - 6} more (--help)"


def subclass(base: type) -> Any:
    """The annotation of a class that is derived from ``base``, of which a section of a config can
    make an object."""
    return Annotated[
        type[base],
        door.condition(
            "that is a dataclass and defines all abstract methods",
            lambda kind: dataclasses.is_dataclass(kind) and not inspect.isabstract(kind),
        ),
    ]


class Registry(Mapping[str, Any]):
    """The parts of one kind. It iterates over the short names, and finds parts of other packages.

    Attributes:
      kind: what the parts are, in words, for messages.
      places: from the short names to ``module:attribute``, or to the parts themselves.
      form: the annotation that a part fits, such as that of :func:`subclass`.
    """

    def __init__(self, kind: str, places: Mapping[str, Any], form: Any) -> None:
        self.kind, self.places, self.form = kind, dict(places), form

    def __getitem__(self, name: str) -> Any:
        """The part called ``name``."""
        if name not in self:
            names = listed(str(name), sorted(self.places))
            remedy = f"choose one of {names}, or give your own as package.module:Name"
            raise ValueError(
                f"unknown {self.kind} {name!r}: {hint(str(name), self.places, remedy)}"
            )
        if name not in self.places and not _is_trusted(name):
            package = name.partition(".")[0].partition(":")[0]
            raise PermissionError(
                f"the {self.kind} {name} is not imported: a file of the work directory names it, "
                "but you did not, and to import it is to run its code. If you trust the code, give "
                f"--trust={name}, or --trust={package} for the whole package, or the --config that "
                f"names it (in Python: trust=[{name!r}])"
            )
        place = self.places.get(name, name)
        if not isinstance(place, str):
            return place
        place, _, attribute = place.partition(":")
        try:
            module = importlib.import_module(place)
        except Exception as error:
            of_path = isinstance(error, ModuleNotFoundError) and place.startswith(str(error.name))
            remedy = (
                "start Python where it can be imported (PYTHONPATH)" if of_path else "correct it"
            )
            raise ValueError(
                f"{self.kind} {name}: the module {place} cannot be imported "
                f"({type(error).__name__}: {error}): {remedy}"
            ) from error
        if not hasattr(module, attribute):
            raise ValueError(
                f"{self.kind} {name}: the module {place} has no attribute {attribute}: "
                f"{hint(attribute, dir(module), f'give {door.needs(self.form)}')}"
            )
        part = getattr(module, attribute)
        if not door.fits(part, self.form):
            raise ValueError(
                f"{self.kind} {name} is {door.shown(part)}: give {door.needs(self.form)}"
            )
        return part

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is a short name, or has the form of a name in another package, which is
        not imported."""
        return isinstance(name, str) and bool(name in self.places or OUTSIDE.fullmatch(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
