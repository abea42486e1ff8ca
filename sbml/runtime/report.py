"""An evaluation as two files: `report.json` for programs, `report.html` for people.

The page is one file that opens offline: it shows what `report.json` says, with figures from the
per-image table, and asks nothing of the network. Nothing here knows a formula; every number
comes from the caller, and a value that is not finite is counted and shown, never left out.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup
from PIL import Image

from sbml.runtime import _plots

Fetch = Callable[[Sequence[int]], np.ndarray]

GAP_GREY = 128  # tells cells apart on light pages and dark ones
STRIP_IMAGES, SAMPLE_COLUMNS, SAMPLE_ROWS = 10, 16, 8
PIXEL_BUDGET = 150_000  # bytes before compression, for each strip and half the sample grid

# key of a result: (heading, format of a float)
COLUMNS = {
    "estimator": ("estimator", ""),
    "dequantizer": ("dequantizer", ""),
    "split": ("split", ""),
    "n": ("images", ""),
    "bits_per_dim": ("bits/dim", "bits"),
    "ci95": ("± 95%", "bits"),
    "interval": ("95% interval", "bits"),
    "stderr": ("std. error", "bits"),
    "min": ("least", "bits"),
    "max": ("greatest", "bits"),
    "nonfinite": ("not finite", ""),
    "nfe_mean": ("evaluations, mean", ".1f"),
    "nfe_max": ("max", ".6g"),
}
DETAILS = {"data": "Data fingerprints", "config": "Configuration"}
SHOWN_ELSEWHERE = {"title", "results", "baselines", "warnings", "command"}


def write(
    directory: epath.PathLike,
    report: Mapping[str, Any],
    *,
    table: Mapping[str, np.ndarray],
    images: Fetch | np.ndarray,
    levels: int,
    curves: Sequence[Mapping[str, Any]],
    samples: np.ndarray | None,
) -> None:
    """Write `report.json` and `report.html` into `directory`, each whole or not at all.

    Args:
      directory: anything etils can open, gs:// included; made if missing.
      report: `title`, `results` (a list of mappings with `bits_per_dim`, `interval`, `n` …; the
        first is the headline), and optionally `baselines`, `warnings`, `command`, `model`,
        `checkpoint`; whatever else it has is listed under its own name.
      table: columns (n,), one row an image: `id`, at least one whose name ends in
        `bits_per_dim`, and any that end in `nfe`, network evaluations. What precedes the ending
        names the figure.
      images: uint8 (n, h, w, c) indexed by id, or a function from ids to such an array.
      levels: grey levels L; pixels are 0 … L - 1.
      curves: rows with `step`, `loss` and perhaps `images_per_s`. Where a step occurs twice,
        the later row counts.
      samples: uint8 (m, h, w, c), or None.

    Raises:
      ValueError: a missing result or column, columns of unequal length, or a value that JSON
        cannot hold. Nothing has been written then.
    """
    report = strict(report)
    _check(report, table)
    page = _page(report, table, images, levels, curves, samples)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    _write_whole(directory / "report.json", f"{text}\n".encode())
    _write_whole(directory / "report.html", page.encode())


def strict(value: Any, name: str = "report") -> Any:
    """`value` in the types of JSON; numbers that are not finite as "NaN", "Infinity", "-Infinity".

    Python's `float` reads those strings back. Arrays and tuples become lists, paths strings.
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


def image_grid(
    images: np.ndarray, levels: int, columns: int = 8, scale: int = 1, gap: int = 2
) -> np.ndarray:
    """Tile images row by row: uint8 (m, h, w, c) of 0 … L - 1 -> uint8 (H, W, c) of 0 … 255.

    A pixel becomes scale x scale equal ones; between neighbours lie `gap` grey pixels, so
    H = rows (h scale + gap) - gap with rows = ceil(m / columns), and likewise W. Cells without
    an image are grey.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f"Got images {images.dtype}{images.shape}: pass some, uint8 (m, h, w, c).")
    if not 2 <= levels <= 256 or images.max() >= levels:
        raise ValueError(f"Got levels={levels}, greatest pixel {images.max()}: the levels of the "
                         "data are needed, 2 to 256 and more than any pixel.")  # fmt: skip
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"Got {columns=}, {scale=}, {gap=}: columns and scale start at 1, gap 0.")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    height, width = height * scale, width * scale
    pixels = np.rint(images * (255 / (levels - 1))).astype(np.uint8)
    cells = np.full((rows * columns, height + gap, width + gap, channels), GAP_GREY, np.uint8)
    cells[:count, :height, :width] = pixels.repeat(scale, 1).repeat(scale, 2)
    cells = cells.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    grid = cells.reshape(rows * (height + gap), columns * (width + gap), channels)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def write_png(path: epath.PathLike, array: np.ndarray) -> None:
    """Write uint8 (h, w), (h, w, 1) or (h, w, 3) as PNG, whole or not at all."""
    _write_whole(epath.Path(path), _png(array))


def _png(array: np.ndarray) -> bytes:
    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and
                                       array.shape[2] in (1, 3)):  # fmt: skip
        raise ValueError(f"Got {array.dtype}{array.shape}: PNG takes uint8 (h, w), (h, w, 1) or "
                         "(h, w, 3).")  # fmt: skip
    buffer = io.BytesIO()
    grey = array.ndim == 3 and array.shape[2] == 1
    Image.fromarray(array[..., 0] if grey else array).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _write_whole(path: epath.Path, content: bytes) -> None:
    partial_path = path.parent / f".{path.name}.partial"
    partial_path.write_bytes(content)
    partial_path.replace(path)


def _check(report: Mapping[str, Any], table: Mapping[str, np.ndarray]) -> None:
    if not report.get("results"):
        raise ValueError(f"Got a report with {sorted(report)}: it needs one result or more.")
    if "id" not in table or not _ending(table, "bits_per_dim"):
        raise ValueError(f"Got a table of {sorted(table)}: it needs id and bits_per_dim.")
    lengths = {name: np.shape(column) for name, column in table.items()}
    if len(set(lengths.values())) > 1 or lengths["id"] in ((), (0,)):
        raise ValueError(f"Got columns of {lengths}: all need the same length, one row an image.")


def _ending(table: Mapping[str, np.ndarray], ending: str) -> dict[str, np.ndarray]:
    """Columns whose name has this ending, by what precedes it ("" for nothing)."""
    found = {name: column for name, column in table.items() if name.endswith(ending)}
    return {
        name.removesuffix(ending).strip("/_.: "): np.asarray(column, np.float64)
        for name, column in found.items()
    }


def _page(
    report: dict[str, Any],
    table: Mapping[str, np.ndarray],
    images: Fetch | np.ndarray,
    levels: int,
    curves: Sequence[Mapping[str, Any]],
    samples: np.ndarray | None,
) -> str:
    bits = _ending(table, "bits_per_dim")
    best, worst = _extremes(np.asarray(table["id"]), next(iter(bits.values())), images, levels)
    columns = _columns(report["results"])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sbml", "runtime"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=report.get("title", "Evaluation"),
        warnings=[*report.get("warnings", []), *_broken(bits)],
        headline=_headline(report["results"][0]),
        versus=_versus(report["results"][0], report.get("baselines", [])),
        comparison=_comparison(report["results"], report.get("baselines", [])),
        facts=_facts(report),
        columns=columns,
        rows=[
            {column["key"]: _text(row.get(column["key"]), column["format"]) for column in columns}
            for row in map(_flat, report["results"])
        ],
        histograms=[
            *(_histogram(f"{name} bits/dim".strip(), column) for name, column in bits.items()),
            *(
                _histogram(f"{name} network evaluations".strip(), column)
                for name, column in _ending(table, "nfe").items()
            ),
        ],
        best=best,
        worst=worst,
        training=_training(curves),
        samples=None if samples is None else _samples(samples, levels),
        command=report.get("command"),
        details={
            DETAILS.get(name, name.replace("_", " ").capitalize()): _flat({name: value}, name)
            for name, value in report.items()
            if name not in SHOWN_ELSEWHERE
        },
    )


def _text(value: Any, form: str = "") -> str:
    """A value of the report as the page shows it; `form` is for floats, "bits" for bits/dim."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return " to ".join(_text(item, form) for item in value)
    if isinstance(value, float):
        readable = ".3f" if 1e-3 <= abs(value) < 1e5 or value == 0 else ".3g"
        return format(value, readable if form == "bits" else form)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _flat(value: Mapping[str, Any], top: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay whole, and the name `top` is left off."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            below = _flat(item)
            flat |= below if key == top else {f"{key}.{name}": leaf for name, leaf in below.items()}
        else:
            flat[key] = item
    return flat


def _columns(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns of the result table: the known ones that occur, in order, then any others."""
    rows = [_flat(result) for result in results]
    present = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in COLUMNS if key in present]
    keys += [key for key in present if key not in COLUMNS]
    columns = []
    for key in keys:
        label, form = COLUMNS.get(key, (key, ".6g"))
        words = key in ("estimator", "dequantizer", "split")
        columns.append({"key": key, "label": label, "format": form, "number": not words})
    return columns


def _label(result: Mapping[str, Any]) -> str:
    words = [result[key] for key in ("estimator", "dequantizer", "split") if result.get(key)]
    return " · ".join(map(str, words)) or "result"


def _headline(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bits_per_dim": _text(result["bits_per_dim"], "bits"),
        "finite": math.isfinite(float(result["bits_per_dim"])),
        "interval": _text(result.get("interval"), "bits"),
        "label": _label(result),
        "n": _text(result.get("n")),
    }


def _versus(result: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    """How far the headline lies from the best baseline, in words; "" if either is not finite."""
    finite = [row for row in baselines if math.isfinite(float(row["bits_per_dim"]))]
    if not finite or not math.isfinite(float(result["bits_per_dim"])):
        return ""
    best = min(finite, key=lambda row: row["bits_per_dim"])
    gap = result["bits_per_dim"] - best["bits_per_dim"]
    side = "below" if gap < 0 else "above"
    return f"{abs(gap):.3f} bits/dim {side} the best baseline, {best['name']}."


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """The few figures that stand under the headline; those that the report lacks are left off."""
    model, checkpoint = report.get("model", {}), report.get("checkpoint", {})
    result = report["results"][0]
    facts = {
        "Model": model.get("name"),
        "Parameters": model.get("parameters"),
        "Checkpoint, step": checkpoint.get("step"),
        "Evaluations, mean": result.get("nfe_mean"),
        "Evaluations, max": result.get("nfe_max"),
        "Images not finite": result.get("nonfinite"),
    }
    return {name: _text(value, ".4g") for name, value in facts.items() if value is not None}


def _broken(bits: Mapping[str, np.ndarray]) -> list[str]:
    """A warning for each column that holds a value which is not finite."""
    counts = {name: int((~np.isfinite(column)).sum()) for name, column in bits.items()}
    return [
        f"{count:,} of {bits[name].size:,} images have no finite {name} bits/dim.".replace("  ", " ")
        for name, count in counts.items()
        if count
    ]


def _figure(name: str, draw: Callable, width: float, height: float, caption: str) -> dict[str, Any]:
    svg = Markup(_plots.svg(name, draw, width, height))
    return {"svg": svg, "alt": f"{name}. {caption}", "caption": caption}


def _comparison(
    results: Sequence[Mapping[str, Any]], baselines: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    estimates = [_estimate(_label(row), row, ours=True) for row in results]
    estimates += [_estimate(row["name"], row, ours=False) for row in baselines]
    values = "; ".join(f"{row.label} {row.value:.3f}" for row in estimates)
    figure = _figure(
        "Comparison", partial(_plots.comparison, estimates=estimates), 5.8,
        0.6 + 0.36 * len(estimates), "Bars: 95% intervals. Blue: this model; grey: baselines.",
    )  # fmt: skip
    return figure | {"alt": f"Comparison in bits/dim: {values}."}


def _estimate(label: str, row: Mapping[str, Any], ours: bool) -> _plots.Estimate:
    value, half = float(row["bits_per_dim"]), float(row.get("ci95") or 0)
    low, high = row.get("interval") or (value - half, value + half)
    return _plots.Estimate(label, value, float(low), float(high), ours)


def _histogram(name: str, values: np.ndarray) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    caption = f"{values.size:,} images, none finite."
    if finite.size:
        caption = (f"{values.size:,} images: mean {finite.mean():.4g} (line), from "
                   f"{finite.min():.4g} to {finite.max():.4g}.")  # fmt: skip
    if 0 < finite.size < values.size:
        caption += f" {values.size - finite.size:,} not finite, outside this mean."
    draw = partial(_plots.histogram, values=values, label=name)
    return _figure(name, draw, 5, 2.6, caption)


def _training(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    rows = {row["step"]: row for row in curves if "loss" in row}
    if not rows:
        return None
    step = np.array(sorted(rows))
    loss = np.array([rows[at]["loss"] for at in step], np.float64)
    window = max(1, len(step) // 40) | 1
    caption = f"Loss at {len(step):,} logged steps (faint)"
    caption += f" and the mean of {window} around each." if window > 1 else "."
    speed = [float(row["images_per_s"]) for row in rows.values() if row.get("images_per_s")]
    if speed:
        caption += f" Median speed {np.median(speed):,.4g} images/s."
    draw = partial(_plots.training, step=step, loss=loss, window=window)
    return _figure("Training loss", draw, 10.6, 3, caption)


def _data_url(array: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(_png(array)).decode()}"


def _extremes(
    ids: np.ndarray, bits: np.ndarray, images: Fetch | np.ndarray, levels: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images of least bits/dim, best first, and of most, worst first (not finite: worst)."""
    order = np.argsort(np.where(np.isfinite(bits), bits, np.inf), kind="stable")
    fetch: Fetch = images if callable(images) else images.__getitem__
    size = fetch([int(ids[order[0]])])[0].size
    most = min(STRIP_IMAGES, max(1, len(ids) // 2), max(1, PIXEL_BUDGET // size))

    def strip(rows: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "png": _data_url(image_grid(pixels[None], levels, 1, _scale(pixels, 96))),
                "id": ids[row],
                "bits_per_dim": _text(float(bits[row]), "bits"),
                "finite": math.isfinite(bits[row]),
            }
            for row, pixels in zip(rows, fetch([int(ids[row]) for row in rows]), strict=True)
        ]

    return strip(order[:most]), strip(order[::-1][:most])


def _samples(samples: np.ndarray, levels: int) -> dict[str, str]:
    rows = max(1, min(SAMPLE_ROWS, 2 * PIXEL_BUDGET // (SAMPLE_COLUMNS * samples[0].size)))
    shown = samples[: rows * SAMPLE_COLUMNS]
    columns = min(SAMPLE_COLUMNS, len(shown))
    grid = image_grid(shown, levels, columns, _scale(shown[0], 64))
    left_off = f" of {len(samples):,}" if len(shown) < len(samples) else ""
    alt = f"{len(shown):,}{left_off} samples from the model, not selected."
    return {"png": _data_url(grid), "alt": alt}


def _scale(image: np.ndarray, width: int) -> int:
    """The whole factor that brings an image closest to `width` from below, at least 1."""
    return max(1, width // max(image.shape[:2]))
