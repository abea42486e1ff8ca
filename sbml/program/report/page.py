"""The report of a run as two files: ``report.json`` for programs, ``report.html`` for people.

The page is one file that opens offline and loads nothing. It shows the content of ``report.json``,
with figures from the per-image table. All numbers come from the caller; only their means, extremes
and differences are computed here. Values that are not finite are counted and shown, never left out.
"""

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import jinja2
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from sbml.core.files import strict, write_whole
from sbml.core.scalars import notation
from sbml.core.types import Json
from sbml.program.report import plots
from sbml.program.report.pictures import extremes, few, sample_grid
from sbml.program.report.result import KIND, ROWS, cell, read
from sbml.statistics import intervals
from sbml.statistics.intervals import HEAVY, Interval

DOCS = "https://sbml-jax.github.io/sbml/latest/"
# The sections of the documentation that explain the terms of a number.
OF_ODE, OF_BOUND = (f"explanations/bits.html#the-terms-of-the-{name}" for name in ("ode", "bound"))
BITS = "bits_per_dim"  # the end of the names of columns with bits/dim
OF_LEVELS = (
    "These values are measured on {:,} images of each kind with other draws than the bound, so "
    "they may differ from its term."
)

# The names of the estimators on the page: in headings, and in the headline.
ESTIMATORS = {"ode": ("ODE", "probability-flow ODE"), "bound": ("bound", "evidence bound")}
DETAILS = {"data": "Data fingerprints", "config": "Configuration"}
SHOWN_ELSEWHERE = set(
    """
    title results baselines baselines_left_out warnings remark command missing gap noise_levels
    running provenance verdict
    """.split()
)


def write(
    directory: epath.Path,
    content: Json,
    *,
    table: Mapping[str, np.ndarray] | None,
    images: np.ndarray | None,
    levels: int,
    curves: Sequence[Mapping[str, Any]],
    samples: np.ndarray | None,
    pictures: Sequence[tuple[str, bytes]] = (),
) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``, each whole or not at all.

    Args:
      directory: the folder, which is made if it is missing.
      content: what ``evaluation.json`` holds, of whose ``results`` the first is the headline, and
        what :func:`summary.write` adds. If the model has classes, ``classes`` are their C names,
        and sample i has the class i modulo C. The page lists entries that it does not know under
        their own names.
      table: columns (n,) with a row for each image; None for a run that was not evaluated, whose
        ``results`` are empty. It needs ``id`` and at least one column whose name ends in
        ``bits_per_dim``, and may have columns that end in ``nfe``, numbers of network evaluations.
        The text before the ending is the title of the figure. ``name``, if there is such a column,
        is shown in place of the id, and ``class`` beside it.
      images: the images of the split, uint8 (N, h, w, c), at the places ``id``; None without a
        table.
      levels: the number of levels L; pixels are 0 … L - 1.
      curves: mappings with ``step``, ``loss`` and perhaps ``images_per_s`` and ``seconds`` since
        training began. If a step occurs twice, the later one counts.
      samples: uint8 (m, h, w, c), or None.
      pictures: captions and the bytes of PNG files, shown after the samples.

    Raises:
      ValueError: JSON has no type for a value. Nothing has been written then.
    """
    report: Json = strict(content)
    results = report["results"]
    classifier = {
        name: intervals.cell(Interval(**value) if isinstance(value, dict) else value, "± ")
        for name, value in read(report.get("classifier", {})).items()
    }
    losses = training(curves), validation(curves), levels_figure(report)
    shown: dict[str, Any] = dict.fromkeys(["results", "beside", "samples"])
    warnings = [*report.get("warnings", [])]
    if table is not None and images is not None:
        report["verdict"] = verdict(results[0])[0]
        shown |= _evaluation(report, table, images, levels)
        if samples is not None:
            real, split = images[table["id"]][: len(samples)], results[0]["split"]
            shown["beside"] = [
                ("Samples of the model", few(samples[: len(real)], levels)),
                (f"Real images ({split})", few(real, levels)),
            ]
        count = sum(int((~np.isfinite(bits)).sum()) for bits in _ending(table, BITS).values())
        stated = sum(int(result.get("nonfinite") or 0) for result in results)
        if count > stated:
            warnings.append(
                f"{count:,} bits/dim in the per-image table are not finite; the results count "
                f"{stated:,}."
            )
    if samples is not None:
        shown["samples"] = sample_grid(samples, levels, report.get("classes", []))
    # All values with all digits, except for those that the page shows elsewhere.
    numbered = {f"{row}. {label(result)}": result for row, result in enumerate(results, 1)}
    details = {"Every number of the results": flat(numbered)} if results else {}
    for name, value in report.items():
        if name not in SHOWN_ELSEWHERE:
            heading = DETAILS.get(name, name.replace("_", " ").capitalize())
            details[heading] = flat(value if value and isinstance(value, dict) else {name: value})
    html = render(
        "report.html",
        report=report,
        title=report.get("title", "Evaluation"),
        warnings=warnings,
        losses=losses,
        details=details,
        copied=copied(report.get("title", ""), results),
        classifier=classifier,
        pictures=pictures,
        **shown,
    )
    directory.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(directory / "report.json", f"{numbers}\n".encode())
    write_whole(directory / "report.html", html.encode())


def _evaluation(
    report: Json, table: Mapping[str, np.ndarray], images: np.ndarray, levels: int
) -> dict[str, object]:
    """What the template shows of the results and of the evaluated images."""
    results, baselines = report["results"], report.get("baselines", [])
    first, bits = results[0], _ending(table, BITS)
    # The best baseline, if it and the headline are finite and of the same images.
    finite, best = [row for row in baselines if not isinstance(row["bits_per_dim"], str)], None
    if finite and not isinstance(first["bits_per_dim"], str) and first.get("n") == len(table["id"]):
        best = min(finite, key=lambda row: row["bits_per_dim"])
    comparison, rows = None, [row(label(result), result, ours=True) for result in results]
    rows += [row(each["name"], each, ours=False) for each in baselines]
    if len(rows) > 1:
        left_out = report.get("baselines_left_out", {}).items()
        caption = ["Bars: 95% intervals. Blue: this model; grey: baselines."]
        caption += [f"Left out: {name}, because {reason}." for name, reason in left_out]
        unit = "bits/dim, lower is better"
        comparison = rows_figure("Comparison", rows, unit, " ".join(caption))
    # Terms that are 0 in all results are left out, such as "importance" if K = 1.
    terms = [(row, *item) for row in results for item in row.get("terms", {}).items()]
    shown = {name for _, name, value in terms if value} | {"prior"}
    of_ode = {name for row, name, _ in terms if row.get("estimator") == "ode"}
    nfe = {name: column for name, column in _ending(table, "nfe").items() if np.ptp(column) > 0}
    named = {cell(result).name: label(result) for result in results}
    histograms = [
        _histogram(named.get(name, name), f"{quantity} of an image", column)
        for quantity, columns in (("bits/dim", bits), ("network evaluations", nfe))
        for name, column in columns.items()
        if column.size > 1
    ]
    return {
        "results": results,
        "verdict": verdict(first),
        "best": best,
        "comparison": comparison,
        "rows": {k: row for k, row in ROWS.items() if any(r.get(k) is not None for r in results)},
        "terms": {
            name: OF_ODE if name in of_ode else OF_BOUND for _, name, _ in terms if name in shown
        },
        "histograms": histograms,
        "extremes": extremes(table, next(iter(bits.values())), images, levels),
    }


def render(template: str, **shown: object) -> str:
    """The page that a ``template`` of this folder makes of the values ``shown``, all escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sbml.program", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"text": text, "duration": duration, "docs": DOCS}
    environment.globals["of_levels"] = OF_LEVELS
    environment.filters |= {"label": label, "base64": lambda png: base64.b64encode(png).decode()}
    return environment.get_template(template).render(shown)


def text(value: object, form: str = "") -> str:
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
        return notation(value, bits_form if form == "bits" else form)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def duration(seconds: float | None) -> str:
    """The time as h:mm:ss."""
    return text(None) if seconds is None else str(timedelta(seconds=round(seconds)))


def flat(value: Json) -> Json:
    """{"a": {"b": 1}} as {"a.b": 1}; lists and {} are not changed."""
    leaves: Json = flatten_dict(value, is_leaf=lambda _, item: not item, sep=".")
    return leaves


def rows_figure(
    name: str, rows: Sequence[plots.Row], unit: str, caption: str, origin: float | None = None
) -> dict[str, str]:
    """A figure of ``plots.rows``, with all rows in its alternative text."""
    draw = partial(plots.rows, rows=rows, unit=unit, origin=origin)
    height = plots.ROWS_HEIGHT + plots.ROW_HEIGHT * len(rows)
    each = "; ".join(f"{row.label} {row.text}" for row in rows)
    low, high = plots.limits(rows)
    if any(row.mean < low or row.mean > high for row in rows):
        caption += " An arrow: the number is too far from the others for this axis."
    drawn = plots.figure(name, draw, caption, height=height)
    return {**drawn, "alt": f"{name}, {unit}: {each}."}


def row(label: str, number: Json, *, ours: bool, key: str = "bits_per_dim") -> plots.Row:
    """The value ``key`` of ``number`` with its 95% interval, in blue if it is of this model."""
    value, (low, high) = float(number[key]), map(float, number["interval"])
    if not math.isfinite(value):
        return plots.Row(label, value, low, high, "not finite", plots.WARN)
    colour = plots.ACCENT if ours else plots.MUTED
    return plots.Row(label, value, low, high, f"{value:z.3f}", colour)


def label(result: Json, whole: bool = False) -> str:
    """The name of a result on the page, in full words if ``whole``."""
    kind, noise, draws = (result[name] for name in KIND)
    words = [ESTIMATORS.get(kind, (kind, kind))[whole]]
    words.append(noise.replace("_", " ") + " dequantization" * whole)
    return ", ".join(words + [f"K = {draws}"] * (draws > 1))


def verdict(result: Json, examples: str = "images") -> tuple[str, bool]:
    """What is known of how far a number can be trusted, in words, and whether all of it is good."""
    n, lost, k, far = (result.get(key) for key in ("n", "nonfinite", "tail", "outliers"))
    found = [("converged", "NOT CONVERGED", result.get("converged"))]
    if lost is not None:
        all_of = f"{n:,} {examples}"
        found.append((f"all {all_of} finite", f"{lost:,} of {all_of} NOT FINITE", not lost))
    if k is not None:  # a number, or the text "Infinity"
        found.append(("no heavy tail", f"HEAVY TAIL, Pareto's k {float(k):.2f}", float(k) <= HEAVY))
    if far is not None:
        found.append(("no outliers", f"outliers: {len(far):,}", not far))
    bad = [no for _, no, good in found if good is False]
    text = ", ".join(bad + [yes for yes, _, good in found if good])
    return text[:1].upper() + text[1:], not bad


def copied(run: str, results: Sequence[Json]) -> dict[str, str]:
    """The results as rows to copy, for LaTeX, in Markdown and as CSV.

    The columns are run, estimator, dequantizer, K, bits/dim, its 95% interval, n and eps. In LaTeX
    and in Markdown, K has no column: if it is above 1, it stands beside the dequantizer.
    """
    names = ["run", "estimator", "dequantizer", "K", "bits_per_dim", "low", "high", "n", "eps"]
    heads = ["run", "estimator", "dequantizer", "bits/dim", "95% interval", "images", "t"]
    marked = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    table, rows = io.StringIO(), []
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(names)
    for result in results:
        kind, noise, draws = (result[name] for name in KIND)
        interval, n, eps = (result[name] for name in ("interval", "n", "smallest_time"))
        writer.writerow([run, kind, noise, draws, result["bits_per_dim"], *interval, n, eps])
        low, high = (text(end, "bits") for end in interval)
        mantissa, _, exponent = f"{eps:.2e}".partition("e")
        time = f"{float(mantissa):g}" + (rf" \times 10^{{{int(exponent)}}}" if eps else "")
        row = [run, kind, noise + (f", K = {draws}" if draws > 1 else "")]
        bits, own = text(result["bits_per_dim"], "bits"), f"{low} to {high}"
        cells = [re.sub(r"([|\\<])", r"\\\1", cell) for cell in row]
        marked.append(f"| {' | '.join([*cells, bits, own, text(n), text(eps, '.3g')])} |")
        row = [re.sub(r"([#$%&_{}])", r"\\\1", cell) for cell in row]
        row += [f"${bits}$", f"$[{low}, {high}]$", text(n)]
        rows.append(" & ".join([*row, f"${time}$"]) + r" \\")
    shown = {"LaTeX": rows, "Markdown": marked, "CSV": [table.getvalue().rstrip()]}
    return {name: "\n".join(lines) for name, lines in shown.items()}


def levels_figure(report: Json) -> dict[str, str] | None:
    """The figure of the loss at each noise level; None without a bound."""
    if not (levels := report.get("noise_levels")):
        return None
    # A bin with one draw has no standard error: the file has the text "NaN" in its place.
    values = {name: np.asarray(value, float) for name, value in levels.items()}
    edges = values["edges"]
    split = str(report["results"][0].get("split", "held-out"))
    named = {f"{split} images": "split", "training images": "train"}
    named |= {"best linear": "linear", "training images by heart": "floor"}
    if split == "train":
        del named["training images"]
    curves = {name: values[key] for name, key in named.items() if key in values}
    areas = [f"{name} {area(edges, curve):.2f}" for name, curve in curves.items()]
    measured = OF_LEVELS.format(levels["images"])
    caption = (
        "Where the bits of the bound come from: the squared error of the noise prediction at each "
        "ratio of signal to noise, SNR, whose logarithm is natural. The area below a "
        f"curve is the term diffusion, in bits/dim: {', '.join(areas)}. {measured} The best "
        "linear prediction is that of a Gaussian with the moments of the training images. A "
        "network that has learned the training images by heart has the lowest possible curve of "
        "training images. Bands are 1.96 standard errors wide on each side."
    )
    errors = {f"{split} images": "split_stderr", "training images": "train_stderr"}
    bars = {name: 1.96 * values[errors[name]] for name in curves if name in errors}
    draw = partial(plots.levels, edges=edges, curves=curves, bars=bars)
    return plots.figure("Loss at each noise level", draw, caption)


def area(edges: np.ndarray, curve: np.ndarray) -> float:
    """The area below a ``curve (bins,)`` of the loss between the ``edges (bins + 1,)``, which fall:
    the term diffusion, in bits/dim."""
    return float(-np.diff(edges) @ curve)


def _histogram(name: str, quantity: str, values: np.ndarray) -> dict[str, str]:
    """The figure of the ``values`` of a ``quantity`` for the number called ``name``."""
    finite = values[np.isfinite(values)]
    caption = f"{values.size:,} images, none finite."
    if finite.size:
        caption = (
            f"{values.size:,} images: mean {finite.mean():.4g}, from "
            f"{finite.min():.4g} to {finite.max():.4g}."
        )
    if 0 < finite.size < values.size:
        caption += f" {values.size - finite.size:,} not finite, not in this mean."
    caption = f"{name}. {caption}" if name else caption
    return plots.figure(
        f"{name}: {quantity}", partial(plots.histogram, values=values, label=quantity), caption
    )


def training(curves: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """The figure of the loss of a training; None if fewer than two steps are logged."""
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
        caption += f" Training time {duration(seconds)}."
    draw = partial(plots.training, step=step, loss=loss, window=window)
    return plots.figure("Training loss", draw, caption)


def validation(curves: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """The figure of the bound on validation images during a training; None without two points."""
    name, error = "validation_bits_per_dim", "validation_stderr"
    points = {p["step"]: (p[name], p.get(error)) for p in curves if p.get(name) is not None}
    if len(points) < 2:
        return None
    step = np.array(sorted(points))
    bound, stderr = np.array([points[at] for at in step], np.float64).T
    finite = np.flatnonzero(np.isfinite(bound))
    least = ""
    if finite.size:
        best = finite[bound[finite].argmin()]
        least = f" The least is {bound[best]:z.4f} bits/dim, at step {step[best]:,}."
    caption = (
        f"Bound on the validation images.{least} The band is 1.96 standard errors of a mean over "
        "images. All points have the same images and draws, so differences between steps are more "
        "certain than the band."
    )
    band, unit = 1.96 * stderr, "bound, bits/dim"
    draw = partial(plots.validation, step=step, values=bound, half_width=band, label=unit)
    return plots.figure("Validation", draw, caption)


def _ending(table: Mapping[str, np.ndarray], ending: str) -> dict[str, np.ndarray]:
    """The columns whose names have this ending, by the text before it, in float64."""
    return {
        name.removesuffix(ending).strip("/_.: "): np.asarray(column, np.float64)
        for name, column in table.items()
        if name.endswith(ending)
    }
