"""Fingerprints: what stored rows depend on, as plain values of JSON that objects make themselves.

A dataclass is its class and its fields, without those in its attribute ``without_effect``; a Linen
module its class and its settings; a set of examples its own ``fingerprint``; an array its type,
shape and CRC32. Two objects with the same fingerprint compute the same rows. The name of a part of
another package, such as ``mine.sde:Steep``, comes with the CRC32 of its file, without comments.
"""

import ast
import dataclasses
import inspect
import sys
import zlib
from collections.abc import Mapping
from types import CodeType
from typing import Any

import flax.linen as nn
import numpy as np

# Fields of networks that change the training, or its memory, and no number of an evaluation.
WITHOUT_EFFECT = ("dropout", "init_scale", "remat", "parent", "name")
# Packages whose code changes with their version only, which is noted beside stored rows.
VERSIONED = ("sbml", "flax", "jax", "numpy")


def of(value: Any) -> Any:
    """The fingerprint of ``value``.

    Raises:
      TypeError: ``value`` is of a kind whose content is not known.
    """
    if isinstance(value, str):
        return value + _source(value)  # It may be the name of a part in a config.
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(own := getattr(value, "fingerprint", None), Mapping):
        return own
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        default = WITHOUT_EFFECT if isinstance(value, nn.Module) else ()
        left_out = getattr(value, "without_effect", default)
        names = [f.name for f in dataclasses.fields(value) if f.name not in left_out]
        return {"class": _name(type(value))} | {name: of(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): of(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [of(item) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes())
        return {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": crc}
    if "<" not in getattr(value, "__qualname__", "<"):  # a class, or a function of a module
        return _name(value)
    if code := getattr(value, "__code__", None):  # a function inside another one, or a lambda
        read = [of(cell.cell_contents) for cell in value.__closure__ or ()]
        defaults = of([value.__defaults__, value.__kwdefaults__])
        return {"function": _name(value), "code": _code(code), "reads": read, "defaults": defaults}
    raise TypeError(f"{value!r} ({type(value).__name__}) has no fingerprint")


def _code(code: CodeType) -> list[object]:
    """The operations of a function, the names that it uses, and its constants, of which some are
    functions; their texts would have addresses in memory."""
    constants = (_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return [zlib.crc32(code.co_code), list(code.co_names), list(constants)]


def _name(value: Any) -> str:
    name = f"{value.__module__}:{value.__qualname__}"
    return name + _source(name)


def _source(name: str) -> str:
    """The checksum of the imported file of the part ``name`` of another package; otherwise ""."""
    place, colon, _ = name.partition(":")
    if not colon or place not in sys.modules or place.split(".")[0] in VERSIONED:
        return ""
    try:
        code = ast.unparse(ast.parse(inspect.getsource(sys.modules[place])))
    except (OSError, TypeError):  # There is no file, as in a notebook.
        return ""
    return f" {zlib.crc32(code.encode()):08x}"
