"""Parts by name: a short name of this package, or ``package.module:Name`` of any other.

SDES = Registry("SDE", {"vp": "sbml.sdes.linear_beta:VP"})
SDES["vp"]                  the class VP; its module is imported only now
SDES["mine.sdes:Mine"]      the class Mine of the user's own module

A registry can also hold a part itself instead of its ``module:Name``.
"""

import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any


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
        place = self.places.get(name, name)
        if not isinstance(place, str):
            return place
        module, colon, attribute = place.partition(":")
        if not (colon and attribute.isidentifier() and module.replace(".", "_").isidentifier()):
            names = ", ".join(sorted(self.places))
            raise ValueError(
                f"unknown {self.kind} {name!r}: choose one of {names}, or give your own as "
                f"package.module:Name{hint(name, self.places)}"
            )
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
        """Whether there is a part called ``name``, here or in another package."""
        try:
            self[str(name)]
        except ValueError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
