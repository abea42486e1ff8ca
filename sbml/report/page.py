"""The report of a run as two files: ``report.json`` for programs, ``report.html`` for people.

The page is one file that opens offline and loads nothing. It shows the content of ``report.json``,
with figures from the per-image table. All numbers come from the caller; only their means, extremes
and differences are computed here. Values that are not finite are counted and shown, never left out.
Each function prepares the values that one part of the template shows.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from sbml.report import plots
from sbml.report.result import COLUMNS, strict
from sbml.runtime.files import write_whole

Fetch = Callable[[Sequence[int]], np.ndarray]

PAGE_WIDTH = 1056  # pixels, as in report.css
STRIP_IMAGES, SAMPLE_COLUMNS, SAMPLE_ROWS = 10, 16, 8
PIXEL_BUDGET = 150_000  # bytes before compression, for each strip and half the sample grid

DETAILS = {"data": "Data fingerprints", "config": "Configuration"}
SHOWN_ELSEWHERE = {
    *("title", "results", "baselines", "baselines_left_out", "warnings", "command", "missing"),
}


def write(
    directory: epath.Path,
    content: Mapping[str, Any],
    *,
    table: Mapping[str, np.ndarray] | None,
    images: Fetch | None,
    levels: int,
    curves: Sequence[Mapping[str, Any]],
    samples: np.ndarray | None,
    pictures: Sequence[tuple[str, bytes]] = (),
) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``, each whole or not at all.

    Args:
      directory: the folder, which is made if it is missing.
      content: ``title``, ``results`` (a list of mappings with ``bits_per_dim``, ``interval``,
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
      images: a function from ids to uint8 (n, h, w, c); None without a table.
      levels: the number of levels L; pixels are 0 … L - 1.
      curves: mappings with ``step``, ``loss`` and perhaps ``images_per_s`` and ``seconds`` since
        training began. If a step occurs twice, the later one counts.
      samples: uint8 (m, h, w, c), or None.
      pictures: captions and the bytes of PNG files, shown after the samples.

    Raises:
      ValueError: JSON has no type for a value. Nothing has been written then.
    """
    report: dict[str, Any] = strict(content)
    evaluation = {}
    if table is not None and images is not None:
        evaluation = _evaluation(report, table, images, levels)
    progress = report.get("training", {})
    template = environment().get_template("report.html")
    page = template.render(
        results=evaluation.get("results"),
        title=report.get("title", "Evaluation"),
        warnings=[*report.get("warnings", []), *evaluation.get("uncounted", [])],
        progress=progress.get("line"),
        missing=report.get("missing", {}),
        without_checkpoint=bool(progress) and progress["checkpoint"] is None,
        facts=_facts(report),
        training=_training(curves),
        samples=None if samples is None else _samples(samples, levels),
        quality={name: text(value, ".4g") for name, value in report.get("quality", {}).items()},
        pictures=[{"png": data_url(png), "alt": caption} for caption, png in pictures],
        command=report.get("command"),
        details=_details(report),
    )
    directory.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(directory / "report.json", f"{numbers}\n".encode())
    write_whole(directory / "report.html", page.encode())


def _evaluation(
    report: Mapping[str, Any], table: Mapping[str, np.ndarray], images: Fetch, levels: int
) -> dict[str, Any]:
    """The values that the template shows of the results and of the evaluated images."""
    results, baselines = report["results"], report.get("baselines", [])
    bits = ending(table, "bits_per_dim")
    ids, names = np.asarray(table["id"]), table.get("name")
    best, worst = _extremes(ids, names, next(iter(bits.values())), images, levels)
    columns = _columns(results)
    rows = [
        {column["key"]: text(row.get(column["key"]), column["format"]) for column in columns}
        for row in results
    ]
    return {
        "uncounted": _uncounted(report, bits),
        "results": {
            "headline": _headline(results[0]),
            "versus": _versus(results[0], baselines if results[0].get("n") == len(ids) else []),
            "comparison": _comparison(results, baselines, report.get("baselines_left_out", {})),
            "columns": columns,
            "rows": rows,
            "ledger": _ledger(results),
            "histograms": [
                *(
                    _histogram(f"{name} bits/dim".strip(), column)
                    for name, column in bits.items()
                    if column.size > 1
                ),
                *(
                    _histogram(f"{name} network evaluations".strip(), column)
                    for name, column in ending(table, "nfe").items()
                    if np.ptp(column) > 0
                ),
            ],
            "best": best,
            "worst": worst,
        },
    }


def environment() -> jinja2.Environment:
    """The environment of the templates in this folder; all values that they show are escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sbml", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def text(value: Any, form: str = "") -> str:
    """A value of the report as text. ``form`` is the format of a float: "bits" for bits/dim, or a
    format of Python."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return " to ".join(text(item, form) for item in value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return json.dumps(value)
        bits_form = ".3f" if 1e-3 <= abs(value) < 1e5 or value == 0 else ".3g"
        return format(value, bits_form if form == "bits" else form)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def flat(value: Mapping[str, Any], top: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists are not changed, and the name ``top`` is omitted."""
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            prefix = "" if key == top else f"{key}."
            leaves |= {f"{prefix}{name}": leaf for name, leaf in flat(item).items()}
        else:
            leaves[key] = item
    return leaves


def _columns(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns of the result table: those in ``COLUMNS`` that a result has, and K only if a
    result has K > 1."""
    return [
        {"key": key, "label": label, "format": form, "number": form != "word"}
        for key, (label, form) in COLUMNS.items()
        if any(key in result for result in results)
        and not (key == "num_importance" and all(result.get(key) == 1 for result in results))
    ]


def _ledger(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The table of the terms of each number: the names of the terms, and a row of texts for each
    result."""
    terms = [item for row in results for item in row.get("terms", {}).items()]
    # Terms that are 0 in all results are left out, such as "importance" if K = 1.
    shown = {name for name, value in terms if value} | {"prior"}
    names = [name for name in dict.fromkeys(name for name, _ in terms) if name in shown]
    if not names:
        return None
    rows = [
        [_label(row)]
        + [text(row.get("terms", {}).get(name), ".4f") for name in names]
        + [text(row["bits_per_dim"], ".4f")]
        for row in results
    ]
    return {"names": names, "rows": rows}


def _label(result: Mapping[str, Any]) -> str:
    keys = ("estimator", "dequantizer", "data", "split")
    words = [result[key] for key in keys if result.get(key)]
    if (draws := result.get("num_importance") or 1) > 1:
        words.append(f"K = {draws}")
    return " · ".join(map(str, words)) or "result"


def _headline(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bits_per_dim": text(result["bits_per_dim"], "bits"),
        "finite": math.isfinite(float(result["bits_per_dim"])),
        "interval": text(result.get("interval"), "bits"),
        "label": _label(result),
        "n": text(result.get("n")),
        "smallest_time": text(result.get("smallest_time"), ".3g"),
    }


def _versus(result: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> str:
    """The difference between the headline and the best baseline, in words; "" if either is not
    finite."""
    finite = [row for row in baselines if math.isfinite(float(row["bits_per_dim"]))]
    if not finite or not math.isfinite(float(result["bits_per_dim"])):
        return ""
    best = min(finite, key=lambda row: row["bits_per_dim"])
    gap = result["bits_per_dim"] - best["bits_per_dim"]
    side = "below" if gap < 0 else "above"
    return f"{abs(gap):.3f} bits/dim {side} the best baseline, {best['name']}."


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    """The facts under the headline, without those that the report lacks."""
    model, newest = report.get("model", {}), report.get("training", {}).get("checkpoint")
    checkpoint = report.get("checkpoint", {"step": newest})
    result = (report["results"] or [{}])[0]
    facts = {
        "Model": model.get("name"),
        "Parameters": model.get("parameters"),
        "Checkpoint, step": checkpoint.get("step"),
        "Evaluations, mean": result.get("nfe_mean"),
        "Evaluations, max": result.get("nfe_max"),
        "Images not finite": result.get("nonfinite"),
    }
    return {name: text(value, ".4g") for name, value in facts.items() if value is not None}


def _uncounted(report: Mapping[str, Any], bits: Mapping[str, np.ndarray]) -> list[str]:
    """A warning if more values of the table are not finite than the results say."""
    count = sum(int((~np.isfinite(column)).sum()) for column in bits.values())
    stated = sum(int(result.get("nonfinite") or 0) for result in report["results"])
    if count <= stated:
        return []
    return [
        f"{count:,} bits/dim in the per-image table are not finite; the results count {stated:,}."
    ]


def _details(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All values of the report with all digits, under headings; except for those that the page
    shows elsewhere."""
    results = {f"{row}. {_label(r)}": r for row, r in enumerate(report["results"], 1)}
    details = {"Every figure of the results": flat(results)} if results else {}
    for name, value in report.items():
        if name not in SHOWN_ELSEWHERE:
            heading = DETAILS.get(name, name.replace("_", " ").capitalize())
            details[heading] = flat({name: value}, name)
    return details


def figure(name: str, draw: Callable, width: float, height: float, caption: str) -> dict[str, Any]:
    """A figure of ``width`` x ``height`` inches with its caption, for the templates; ``draw`` is as
    in ``plots.svg``."""
    svg = Markup(plots.svg(name, draw, width, height))
    return {"svg": svg, "alt": f"{name}. {caption}", "caption": caption}


def _comparison(
    results: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> dict[str, Any] | None:
    """The figure of all results and baselines; None if there is only one number."""
    dots = [plots.Dot.of(_label(result), result, ours=True) for result in results]
    dots += [plots.Dot.of(each["name"], each, ours=False) for each in baselines]
    if len(dots) < 2:
        return None
    values = "; ".join(f"{dot.label} {dot.value:.3f}" for dot in dots)
    comparison = figure(
        "Comparison",
        partial(plots.comparison, dots=dots),
        5.8,
        0.6 + 0.36 * len(dots),
        " ".join(
            [
                "Bars: 95% intervals. Blue: this model; grey: baselines.",
                *(f"Left out: {name}, for {reason}." for name, reason in left_out.items()),
            ]
        ),
    )
    return comparison | {"alt": f"Comparison in bits/dim: {values}."}


def _histogram(name: str, values: np.ndarray) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    caption = f"{values.size:,} images, none finite."
    if finite.size:
        caption = (
            f"{values.size:,} images: mean {finite.mean():.4g}, from "
            f"{finite.min():.4g} to {finite.max():.4g}."
        )
    if 0 < finite.size < values.size:
        caption += f" {values.size - finite.size:,} not finite, outside this mean."
    draw = partial(plots.histogram, values=values, label=name)
    return figure(name, draw, 5, 2.6, caption)


def _training(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    logged = {point["step"]: point for point in curves if "loss" in point}
    if len(logged) < 2:
        return None
    step = np.array(sorted(logged))
    loss = np.array([logged[at]["loss"] for at in step], np.float64)
    window = max(1, len(step) // 40) | 1
    caption = f"Loss at {len(step):,} logged steps"
    caption += f" (faint) and the mean of {window} around each." if window > 1 else "."
    speed = [float(point["images_per_s"]) for point in logged.values() if point.get("images_per_s")]
    if speed:
        caption += f" Median speed {np.median(speed):,.4g} images/s."
    if seconds := logged[max(logged)].get("seconds"):
        caption += f" Training time {timedelta(seconds=round(seconds))}."
    draw = partial(plots.training, step=step, loss=loss, window=window)
    return figure("Training loss", draw, 10.6, 3, caption)


def data_url(png: bytes) -> str:
    """A PNG file as a data URL for the ``src`` of an ``img``."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _extremes(
    ids: np.ndarray,
    names: np.ndarray | None,
    bits: np.ndarray,
    fetch: Fetch,
    levels: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images of the smallest bits/dim, best first, and of the largest, worst first. Values that
    are not finite count as the worst."""
    order = np.argsort(np.where(np.isfinite(bits), bits, np.inf), kind="stable")
    size = fetch([int(ids[order[0]])])[0].size
    count = min(STRIP_IMAGES, max(1, len(ids) // 2), max(1, PIXEL_BUDGET // size))

    def enlarged(pixels: np.ndarray) -> str:
        return data_url(plots.png(plots.image_grid(pixels[None], levels, 1, _scale(pixels, 96))))

    def strip(places: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "png": enlarged(pixels),
                "name": str(ids[i] if names is None else names[i]),
                "caption": f"id {ids[i]}" if names is None else str(names[i]),
                "bits_per_dim": text(float(bits[i]), "bits"),
                "finite": math.isfinite(bits[i]),
            }
            for i, pixels in zip(places, fetch([int(ids[i]) for i in places]), strict=True)
        ]

    return strip(order[:count]), strip(order[::-1][:count])


def _samples(samples: np.ndarray, levels: int) -> dict[str, str]:
    scale = _scale(samples[0], 64)
    columns = min(SAMPLE_COLUMNS, max(1, PAGE_WIDTH // (samples.shape[2] * scale)))
    rows = min(SAMPLE_ROWS, max(1, 2 * PIXEL_BUDGET // (columns * samples[0].size)))
    shown = samples[: rows * columns]
    grid = plots.image_grid(shown, levels, min(columns, len(shown)), scale)
    total = f" of {len(samples):,}" if len(shown) < len(samples) else ""
    alt = f"{len(shown):,}{total} samples from the model, not selected."
    return {"png": data_url(plots.png(grid)), "alt": alt}


def _scale(image: np.ndarray, width: int) -> int:
    """The largest integer factor, at least 1, that makes no side of an image exceed ``width``."""
    return max(1, width // max(image.shape[:2]))


def ending(table: Mapping[str, np.ndarray], ending: str) -> dict[str, np.ndarray]:
    """The columns whose names have this ending, by the text before it, in float64."""
    return {
        name.removesuffix(ending).strip("/_.: "): np.asarray(column, np.float64)
        for name, column in table.items()
        if name.endswith(ending)
    }
