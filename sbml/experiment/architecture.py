"""Fields of the config that the checkpoint decides, such as the network and the SDE.

A converted checkpoint may fit no config of this package. Then ``architecture.json`` in its work
directory holds the fields that fit, and ``main`` puts them into its config (:func:`apply`).

Every checkpoint stores the config of its training. With another SDE or nonlinearity its parameters
would give wrong results, which their shapes do not show; :func:`check` compares the two configs.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sbml.experiment.fields import as_tuples, plain
from sbml.runtime.workdir import ARCHITECTURE, Workdir

# Fields of a network or dequantizer that may differ from those of the checkpoint's training.
FREE = ("clipped", "dropout", "dtype", "init_scale", "remat")

Sections = dict[str, dict[str, Any]]


def write(workdir: epath.PathLike, sections: Sections) -> None:
    """Write ``sections`` ("model", "dequantizer.model" ...) to ``workdir``, without ``FREE``
    fields."""
    fixed = {
        name: {field: value for field, value in fields.items() if field not in FREE}
        for name, fields in sections.items()
    }
    Workdir(workdir).write(ARCHITECTURE, fixed)


def apply(config: ConfigDict, sections: Sections) -> tuple[ConfigDict, list[str]]:
    """A copy of ``config`` with the fields in ``sections`` replaced, and a line for each change.

    Raises:
      ValueError: the config has another network, or lacks a field of ``sections``.
    """
    config = config.copy_and_resolve_references()
    lines = []
    for name, fields in sections.items():
        node = config
        for part in name.split("."):
            node = node[part]
        if fields.get("name", node.get("name")) != node.get("name"):
            raise ValueError(
                f"config.{name}.name={node.name!r}, but the checkpoint's is {fields['name']!r}: "
                "take a config of that network"
            )
        lines += [f"config.{name}.{line}" for line in _update(node, fields)]
    return config, lines


def _update(node: ConfigDict, fields: dict[str, Any]) -> Iterator[str]:
    for field, value in fields.items():
        value = as_tuples(value)
        if field not in node:
            raise ValueError(
                f"the config has no field {field!r}, but {ARCHITECTURE} has: if a newer version "
                "wrote it, use that version"
            )
        if node[field] != value:
            yield f"{field} is {node[field]!r}, the checkpoint's is {value!r}"
            node[field] = value


def check(config: dict[str, Any], trained: dict[str, Any], sections: Iterable[str]) -> None:
    """Compare ``config`` with ``trained``, the config of the checkpoint, in ``sections``.

    Both are plain JSON values. A field that only one of the two has comes from another version of
    the package and is ignored.

    Raises:
      ValueError: they differ; the message names the fields with both values.
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
            f"the checkpoint is of another model: {'; '.join(differing)}. Use the --config of its "
            "training, or set these fields"
        )


def of_workdir(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """``config`` with the architecture stored in ``workdir``, if there is one; prints the
    changes."""
    workdir = Workdir(workdir)
    if not workdir.has(ARCHITECTURE):
        return config
    fitted, lines = apply(config, workdir.read(ARCHITECTURE))
    for line in lines:
        print(f"{workdir / ARCHITECTURE}: {line}")
    return fitted
