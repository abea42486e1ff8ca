"""What a checkpoint decides, whatever the config says.

A converted checkpoint need not fit any config here. ``architecture.json`` beside it holds the
sections of a config that do fit, and ``main`` lays them over the config it was given.

Any checkpoint says what config it was trained with. Parameters mean nothing under another process
or nonlinearity, and their shapes would not show it: :func:`check` does.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sbml.experiment.fields import plain, tupled
from sbml.runtime.workdir import ARCHITECTURE, Workdir

# Of a network's or dequantizer's fields, those that any checkpoint may be used with.
FREE = ("clipped", "dropout", "dtype", "init_scale", "remat")

Sections = dict[str, dict[str, Any]]


def write(workdir: epath.PathLike, sections: Sections) -> None:
    """Write ``sections`` ("model", "dequantizer.model" ...) to ``workdir``."""
    bound = {
        name: {field: value for field, value in fields.items() if field not in FREE}
        for name, fields in sections.items()
    }
    Workdir(workdir).write(ARCHITECTURE, bound)


def apply(config: ConfigDict, sections: Sections) -> tuple[ConfigDict, list[str]]:
    """A copy of ``config`` with ``sections`` laid over it, and a line for each field that changed.

    Raises:
      ValueError: a section or field that the config does not have.
    """
    config = config.copy_and_resolve_references()
    lines = []
    for name, fields in sections.items():
        node = config
        for part in name.split("."):
            node = node[part]
        if fields.get("name", node.get("name")) != node.get("name"):
            raise ValueError(
                f"config.{name}.name={node.name!r}, the checkpoint's is {fields['name']!r}: take a "
                "config of that network"
            )
        lines += [f"config.{name}.{line}" for line in _update(node, fields)]
    return config, lines


def _update(node: ConfigDict, fields: dict[str, Any]) -> Iterator[str]:
    for field, value in fields.items():
        value = tupled(value)
        if field not in node:
            raise ValueError(
                f"the config has no field {field!r}: was it written by a newer version?"
            )
        if node[field] != value:
            yield f"{field} is {node[field]!r}, the checkpoint's is {value!r}"
            node[field] = value


def check(config: dict[str, Any], trained: dict[str, Any], sections: Iterable[str]) -> None:
    """Refuse a ``config`` that differs from the checkpoint's, ``trained``, in ``sections``.

    Both are plain JSON values. A field that only one of the two has is of another version, and left
    alone.

    Raises:
      ValueError: naming the fields, their values and the checkpoint's.
    """
    differing = []
    for name in sections:
        ours, theirs = config, trained
        for part in name.split("."):
            ours, theirs = ours[part], theirs.get(part, {})
        differing += [
            f"config.{name}.{field} is {ours[field]!r}, the checkpoint's is {value!r}"
            for field, value in theirs.items()
            if field in ours and field not in FREE and ours[field] != plain(value)
        ]
    if differing:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(differing)}. Take its own --config, "
            "or set these fields"
        )


def of_workdir(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """``config`` with the architecture that ``workdir`` carries, if any; says what that changes."""
    workdir = Workdir(workdir)
    if not workdir.has(ARCHITECTURE):
        return config
    fitted, lines = apply(config, workdir.read(ARCHITECTURE))
    for line in lines:
        print(f"{workdir / ARCHITECTURE}: {line}")
    return fitted
