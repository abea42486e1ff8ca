"""Parts by name: a short name of this package, or ``package.module:Name`` of any other.

SDES = Registry("SDE", {"vp": "sbml.sdes.linear_beta:VP"})
SDES["vp"]                  the class VP; its module is imported only now
SDES["mine.sdes:Mine"]      the class Mine of the user's own module

A registry can also hold a part itself instead of its ``module:Name``.

To import a part of another package is to run its code. A name in the user's own Python code may be
imported; for names in files that may be somebody else's, :func:`only` says which.
"""

import contextlib
import difflib
import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

OUTSIDE = re.compile(r"\w+(?:\.\w+)*:\w+")  # the form of the name of a part of another package
_trusted: frozenset[str] | None = None  # what :func:`only` allows; None: everything


@contextlib.contextmanager
def only(names: Iterable[str]) -> Iterator[None]:
    """A context in which parts of other packages are imported only if they are among ``names``, or
    in a package or module among them. A context inside of another one changes nothing."""
    global _trusted
    before = _trusted
    _trusted = frozenset(names) if before is None else before
    try:
        yield
    finally:
        _trusted = before


def _is_trusted(name: str) -> bool:
    if _trusted is None or name in _trusted:
        return True
    module = name.partition(":")[0]
    return any(f"{module}.".startswith(f"{package}.") for package in _trusted)


def hint(name: str, names: Collection[str]) -> str:
    """The end of a message about an unknown ``name``: the one of ``names`` that is most like it."""
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


class Registry(Mapping[str, Any]):
    """The parts of one kind. It iterates over the short names, and finds parts of other packages.

    Attributes:
      kind: what the parts are, in words, for messages.
      places: from the short names to ``module:attribute``, or to the parts themselves.
    """

    def __init__(self, kind: str, places: Mapping[str, Any]) -> None:
        self.kind, self.places = kind, dict(places)

    def __getitem__(self, name: str) -> Any:
        """The part called ``name``."""
        if name not in self:
            names = ", ".join(sorted(self.places))
            raise ValueError(
                f"unknown {self.kind} {name!r}: choose one of {names}, or give your own as "
                f"package.module:Name{hint(name, self.places)}"
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
        module, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not module.startswith(str(error.name)):
                raise  # A module that the part itself imports is missing.
            raise ValueError(
                f"{self.kind} {name}: {error}; the module must be importable from where Python "
                "starts (PYTHONPATH)"
            ) from error

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is a short name, or has the form of a name in another package, which is
        not imported."""
        known = isinstance(name, str) and (name in self.places or OUTSIDE.fullmatch(name))
        return bool(known)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
