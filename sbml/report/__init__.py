"""The report of a run as two files: ``report.json`` for programs, ``report.html`` for people.

The page is one file that opens offline and loads nothing. It shows the content of ``report.json``,
with figures from the per-image table. All numbers come from the caller; only their means, extremes
and differences are computed here. Values that are not finite are counted and shown, never left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sbml.report import images as _images
from sbml.report import page as _page
from sbml.report.images import image_grid as image_grid
from sbml.runtime.files import write_whole


def write(
    directory: epath.PathLike,
    report: Mapping[str, Any],
    *,
    table: Mapping[str, np.ndarray] | None,
    images: _page.Fetch | np.ndarray | None,
    levels: int,
    curves: Sequence[Mapping[str, Any]],
    samples: np.ndarray | None,
    pictures: Sequence[tuple[str, bytes]] = (),
) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``, each whole or not at all.

    Args:
      directory: anything etils can open, gs:// included; made if missing.
      report: ``title``, ``results`` (a list of mappings with ``bits_per_dim``, ``interval``,
        ``n`` …; the first is the headline), and optionally ``baselines``, ``warnings``,
        ``command``, ``model``, ``checkpoint``, ``quality`` (names to numbers),
        ``baselines_left_out`` (names to reasons), ``training`` (with a ``line`` and the step of the
        newest ``checkpoint``) and ``missing`` (names to the commands that make these parts). The
        page lists other entries under their own names.
      table: columns (n,) with a row for each image; None for a run that was not evaluated, whose
        ``results`` are empty. It needs ``id`` and at least one column whose name ends in
        ``bits_per_dim``, and may have columns that end in ``nfe``, numbers of network evaluations.
        The text before the ending is the title of the figure. ``name``, if there is such a column,
        is shown in place of the id.
      images: uint8 (n, h, w, c) indexed by id, or a function from ids to such an array; None
        without a table.
      levels: the number of levels L; pixels are 0 … L - 1.
      curves: rows with ``step``, ``loss`` and perhaps ``images_per_s`` and ``seconds`` since
        training began. If a step occurs twice, the later row counts.
      samples: uint8 (m, h, w, c), or None.
      pictures: captions and the bytes of PNG files, shown after the samples.

    Raises:
      ValueError: a result or column is missing, columns have different lengths, or JSON has no type
        for a value. Nothing has been written then.
    """
    plain: dict[str, Any] = strict(report)
    _check(plain, table)
    page = _page.render(plain, table, images, levels, curves, samples, pictures)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(directory / "report.json", f"{text}\n".encode())
    write_whole(directory / "report.html", page.encode())


def strict(value: Any, name: str = "report") -> Any:
    """``value`` in the types of JSON, without numbers that are not finite.

    Such numbers become the strings "NaN", "Infinity" and "-Infinity", which Python's ``float``
    reads. Arrays and tuples become lists, and paths strings.

    Raises:
      ValueError: JSON has no type for a value; the message gives its place in ``name``.
    """
    if isinstance(value, Mapping):
        return {str(key): strict(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return strict(value.tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, epath.PathLike):
        return str(value)
    raise ValueError(f"{name} is {value!r}, which JSON cannot hold: pass a number or a string.")


def write_png(path: epath.PathLike, array: np.ndarray) -> None:
    """Write uint8 (h, w), (h, w, 1) or (h, w, 3) as PNG, whole or not at all."""
    write_whole(path, _images.png(array))


def _check(report: Mapping[str, Any], table: Mapping[str, np.ndarray] | None) -> None:
    if table is None and report.get("results") == [] and "training" in report:
        return
    if table is None or not report.get("results"):
        raise ValueError(
            f"Got a report with {sorted(report)}: it needs one result or more and a table, or the "
            "progress of its training and neither."
        )
    for name in ("results", "baselines"):
        for row in report.get(name, []):
            _number(row.get("bits_per_dim"), f"bits_per_dim of {row}")
    if "id" not in table or not _page.ending(table, "bits_per_dim"):
        raise ValueError(f"Got a table of {sorted(table)}: it needs id and bits_per_dim.")
    lengths = {name: np.shape(column)[:1] for name, column in table.items()}
    if len(set(lengths.values())) > 1 or lengths["id"] in ((), (0,)):
        raise ValueError(f"Got columns of {lengths}: all need the same length, one row per image.")


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: pass a number, NaN if there is none.") from None
