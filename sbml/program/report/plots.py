"""Figures of the report as SVG text.

In a figure, text stays text in the font of the page, and each colour of the palette becomes a CSS
variable, so that one figure fits light and dark pages.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# The colours by their variables in report.css. Blue (accent) and amber (second) differ for all
# kinds of colour blindness.
PALETTE = {"ink": "#1b2026", "muted": "#59616c", "rule": "#d9dde3"}
PALETTE |= {"accent": "#1d5fa6", "second": "#c07a00", "warn": "#a63a0a"}
INK, MUTED, RULE, ACCENT, SECOND, WARN = PALETTE.values()
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
    "axes.formatter.limits": (-3, 6),
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}
# A figure of this width in inches fills a phone of 390 pixels, where its text has 12 pixels.
WIDTH, HEIGHT = 3.4, 2.3
ROWS_HEIGHT, ROW_HEIGHT = 0.45, 0.42  # inches, of :func:`rows`
# Height of a line of text as a fraction of the axes, in a figure that is ``HEIGHT`` inches high.
ANNOTATION_HEIGHT = 0.12


def figure(
    name: str,
    draw: Callable[[Axes], None],
    caption: str = "",
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> dict[str, str]:
    """The figure that ``draw`` draws on new axes of width x height inches, for the templates: the
    ``svg``, its ``caption``, and the text ``alt`` in its place.

    ``name`` must differ between the figures of a page, because the ids of clip paths are made from
    it.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        drawn.patch.set_visible(False)
        axes = drawn.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # None: left out
        drawn.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The ids of groups are the same in every figure, but an id must be unique in a page.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    return {"svg": Markup(text), "alt": f"{name}. {caption}".strip(), "caption": caption}


class Row(NamedTuple):
    """A number on an axis: a dot with its 95% interval as a bar, its ``label`` above them at the
    left, and ``text`` at the right, in ``colour``."""

    label: str
    mean: float
    low: float
    high: float
    text: str
    colour: str = ACCENT


def limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of an axis for ``rows``, ten times the median distance from the median plus the
    median half-width of the finite intervals: numbers beyond would press the others together."""
    means = np.array([row.mean for row in rows if math.isfinite(row.mean)] or [0.0])
    halves = [half for row in rows if math.isfinite(half := (row.high - row.low) / 2)] or [0.0]
    centre = np.median(means)
    reach = 10 * (np.median(np.abs(means - centre)) + np.median(halves)) or np.inf
    return float(centre - reach), float(centre + reach)


def rows(axes: Axes, rows: Sequence[Row], unit: str, origin: float | None = None) -> None:
    """The ``rows``, the first at the top, each with a mark at ``origin``; an arrow is in the place
    of a number beyond the :func:`limits`.

    A figure is ``ROWS_HEIGHT`` inches high, and ``ROW_HEIGHT`` more for each row.
    """
    low, high = limits(rows)
    for y, row in enumerate(rows):
        bold = "normal" if row.colour == MUTED else "bold"
        place = partial(
            axes.annotate,
            xytext=(0, 8),  # above the dot and the bar of its own row
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
        axes.axhline(y, color=RULE, linewidth=0.6)
        if row.mean < low or row.mean > high:
            end, arrow = (1, ">") if row.mean > high else (0, "<")
            edge = axes.get_yaxis_transform()
            axes.plot(end, y, arrow, color=row.colour, transform=edge, clip_on=False)
        else:
            axes.plot(np.clip([row.low, row.high], low, high), [y, y], color=row.colour, lw=2)
            axes.plot(row.mean, y, "o", color=row.colour, markersize=5)
        label = row.label if len(row.label) < 36 else f"…{row.label[-34:]}"
        place(label, (0, y), parse_math=False)
        place(row.text, (1, y), ha="right", color=row.colour, weight=bold)
    if origin is not None:
        for y in range(len(rows)):  # A line through all rows would cross their labels.
            axes.plot([origin, origin], [y - 0.1, y + 0.1], color=INK, linewidth=1.2)
    axes.set(yticks=[], ylim=(len(rows) - 0.6, -0.75), xlabel=unit)
    axes.margins(x=0.08)


def histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    """A histogram of ``values`` (n,), and their mean.

    Values that are too far from the others for a common axis, and values that are not finite, are
    not in the histogram. A text on the figure gives their numbers.
    """
    finite = np.sort(np.asarray(values[np.isfinite(values)], np.float64))
    # Values within 8 interquartile ranges of the quartiles are shown.
    low, high = np.quantile(finite, [0.25, 0.75]) if finite.size else (0.0, 0.0)
    reach = 8 * (high - low) or np.inf
    left, right = finite[finite < low - reach], finite[finite > high + reach]
    shown = finite[left.size : finite.size - right.size]
    notes = {}
    if left.size:
        notes[f"{left.size} further left, down to {left[0]:.4g}"] = INK
    if right.size:
        notes[f"{right.size} further right, up to {right[-1]:.4g}"] = INK
    if nonfinite := values.size - finite.size:
        notes[f"{nonfinite} of {values.size} not finite"] = WARN
    if shown.size:
        edges = _bins(shown).tolist()
        axes.hist(shown, edges, histtype="stepfilled", color=ACCENT, alpha=0.75, linewidth=0)
        if shown[0] <= finite.mean() <= shown[-1]:
            axes.axvline(finite.mean(), color=INK, linewidth=1)
            axes.annotate(
                "mean",
                (finite.mean(), 1),
                xytext=(3, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="bottom",
            )
    axes.grid(axis="y")
    for line, (note, colour) in enumerate(notes.items()):
        _note(axes, 0.98 - ANNOTATION_HEIGHT * line, note, colour)
    axes.set_xlabel(label, parse_math=False)
    axes.set_ylabel("number of images")
    axes.locator_params(axis="y", integer=True)


def marginal(axes: Axes, data: np.ndarray, samples: np.ndarray, label: str) -> None:
    """The densities of one column: histograms of ``data`` (n,), filled, and of ``samples`` (m,) of
    a model, as a line. Samples are not shown if they are outside the range of the data by more than
    half of its width."""
    low, high = float(data.min()), float(data.max())
    reach = (high - low) / 2
    shown = samples[(samples >= low - reach) & (samples <= high + reach)]
    edges = np.histogram_bin_edges(np.concatenate([data, shown]), _bins(data).size - 1).tolist()
    axes.hist(data, edges, density=True, color=MUTED, alpha=0.35, label="held-out rows")
    axes.hist(shown, edges, density=True, histtype="step", color=ACCENT, label="samples")
    axes.set(yticks=[], ylabel="density per unit")
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(label, parse_math=False)


def pair(
    axes: Axes, rows: np.ndarray, limits: np.ndarray, labels: tuple[str, str], colour: str
) -> None:
    """Two columns of ``rows`` (n, 2) as dots, between the ``limits`` (2, 2), lower and upper."""
    axes.scatter(rows[:, 0], rows[:, 1], s=8, color=colour, alpha=0.6, linewidths=0)
    axes.set(xlim=limits[:, 0], ylim=limits[:, 1])
    axes.grid()
    axes.locator_params(nbins=5)
    axes.set_xlabel(labels[0], parse_math=False)
    axes.set_ylabel(labels[1], parse_math=False)


def _note(axes: Axes, height: float, text: str, colour: str = WARN) -> None:
    weight = "bold" if colour == WARN else "normal"
    axes.annotate(
        text,
        (1, height),
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=colour,
        weight=weight,
    )


def _bins(values: np.ndarray) -> np.ndarray:
    """The edges of 10 to 60 bins by the Freedman-Diaconis rule.

    If all values are whole numbers, the edges lie halfway between whole numbers.
    """
    edges = np.histogram_bin_edges(values, "fd")
    count = int(np.clip(edges.size - 1, 10, 60))
    low, high = float(values.min()), float(values.max())
    if np.all(values == np.rint(values)):
        width = max(1, round((high - low) / count))
        return np.arange(low - 0.5, high + width + 0.5, width)
    return np.histogram_bin_edges(values, count)


def training(axes: Axes, step: np.ndarray, loss: np.ndarray, window: int) -> None:
    """Loss against step: every logged value, faint, and its mean over ``window`` values."""
    finite = np.isfinite(loss)
    if nonfinite := int((~finite).sum()):
        _note(axes, 1, f"{nonfinite} of {loss.size} losses not finite")
    step, loss = step[finite], loss[finite]
    if loss.size:
        axes.plot(*_thin(step, loss), color=ACCENT, alpha=0.45, linewidth=0.8)
        axes.plot(*_thin(step, running_mean(loss, window)), color=ACCENT, linewidth=1.8)
    if loss.size and loss.min() > 0 and loss.max() > 10 * loss.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.set(xlabel="training step", ylabel="loss, nats/dim")


def validation(
    axes: Axes, step: np.ndarray, values: np.ndarray, half_width: np.ndarray, label: str
) -> None:
    """The ``values`` by step, with a band of ``half_width`` around them, each ``(n,)``."""
    low, high = values - half_width, values + half_width
    axes.fill_between(step, low, high, color=ACCENT, alpha=0.15, lw=0)
    axes.plot(step, values, "o-", color=ACCENT, markersize=3, linewidth=1.4)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    axes.set(xlabel="training step", ylabel=label)


def levels(
    axes: Axes, edges: np.ndarray, curves: Mapping[str, np.ndarray], bars: Mapping[str, np.ndarray]
) -> None:
    """Curves by name, ``(bins,)`` each, that are constant in the bins between ``edges (bins + 1,)``
    of the log-SNR; ``bars`` has the half-widths of the bands around them."""
    for order, (name, curve) in enumerate(curves.items()):
        dashes = "--" if "linear" in name else ":"
        colour, line = ((ACCENT, SECOND)[order], "-") if name in bars else (MUTED, dashes)
        # The first is on top, and the second is wider, so that both are seen where they agree.
        stairs = partial(axes.stairs, edges=edges[::-1], color=colour, zorder=3 - order / 3)
        stairs(curve[::-1], ls=line, lw=1.3 + 2.2 * (order == 1), label=name, baseline=None)
        if name in bars:
            low, high = curve - bars[name], curve + bars[name]
            stairs(high[::-1], baseline=low[::-1], alpha=0.25, fill=True, linewidth=0)
    axes.legend(frameon=False, handlelength=1.2)
    axes.grid(axis="y")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="log SNR: noise left, data right", ylabel="bits/dim per unit of log SNR")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean over ``window`` values ``(n,)``; near the ends, over those that exist.

    ``window`` is odd. If it exceeds the number of values, that number takes its place.
    """
    ones = np.ones(min(window, values.size))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(values.size), ones, "same")


def _thin(x: np.ndarray, y: np.ndarray, buckets: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 points of each bucket, those with the smallest and the largest y. The curve looks
    the same, and the page stays small."""
    if x.size <= 2 * buckets:
        return x, y
    parts = np.array_split(np.arange(x.size), buckets)
    kept = sorted(
        {index for part in parts for index in (part[y[part].argmin()], part[y[part].argmax()])}
    )
    return x[kept], y[kept]
