"""Fields of the config that must agree with the checkpoint, such as those of the network.

A converted checkpoint may fit no config of this package. So ``architecture.json`` in its work
directory holds the fields that fit it, and ``main`` puts them into the config (:func:`apply`).

Every checkpoint stores the config of its training. With another SDE or nonlinearity its parameters
would give wrong results, although their shapes fit; :func:`check` compares the two configs.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sbml.experiment.fields import as_tuples, plain
from sbml.runtime.workdir import ARCHITECTURE, Workdir

# Fields of a network or dequantizer that may differ from those in the checkpoint's config.
FREE = ("clipped", "dropout", "dtype", "init_scale", "remat")

Sections = dict[str, dict[str, Any]]


def write(workdir: epath.PathLike, sections: Sections) -> None:
    """Write ``sections``, the fields of "model", "dequantizer.model" ... by name, to
    ``workdir/architecture.json``, except for the fields in ``FREE``."""
    fixed = {
        name: {field: value for field, value in fields.items() if field not in FREE}
        for name, fields in sections.items()
    }
    Workdir(workdir).write(ARCHITECTURE, fixed)


def apply(config: ConfigDict, sections: Sections) -> tuple[ConfigDict, list[str]]:
    """A copy of ``config`` with the fields in ``sections`` replaced, and a line for each change.

    Raises:
      ValueError: the config has another network or SDE, or lacks a field of ``sections``.
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
                f"take a config with that {name}.name"
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
    """Check that ``config`` and ``trained``, the config of the checkpoint, agree in ``sections``.

    Both are plain JSON values. A field that only one of the two has comes from another version of
    the package and is ignored, as are the fields in ``FREE``.

    Raises:
      ValueError: they differ; the message names the fields with both values.
    """
    differences = []
    for name in sections:
        fields, trained_fields = config, trained
        for part in name.split("."):
            fields, trained_fields = fields[part], trained_fields.get(part, {})
        differences += [
            f"config.{name}.{field} is {fields[field]!r}, the checkpoint's is {value!r}"
            for field, value in trained_fields.items()
            if field in fields and field not in FREE and fields[field] != plain(value)
        ]
    if differences:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(differences)}. Use the --config of "
            "its training, or set these fields"
        )


def of_workdir(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """``config`` with the fields of ``architecture.json`` in ``workdir``, if there is such a file.
    Each changed field is printed."""
    workdir = Workdir(workdir)
    if not workdir.has(ARCHITECTURE):
        return config
    changed, lines = apply(config, workdir.read(ARCHITECTURE))
    for line in lines:
        print(f"{workdir / ARCHITECTURE}: {line}")
    return changed
