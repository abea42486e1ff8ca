"""Figures of the report: ``svg(name, draw, width, height)`` -> SVG text.

A figure is inlined in the page and belongs to it: text stays text in the page's font, and each
colour of the palette becomes a CSS variable, so one drawing serves light and dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

INK, MUTED, RULE = "#1b2026", "#59616c", "#d9dde3"
ACCENT, WARN = "#1d5fa6", "#a63a0a"
PALETTE = {"ink": INK, "muted": MUTED, "rule": RULE, "accent": ACCENT, "warn": WARN}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": INK,
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
ANNOTATION_HEIGHT = 0.11  # of the axes, a line of text in a figure 2.6 inches high


class Estimate(NamedTuple):
    """A value with its interval, in bits/dim; ``ours`` tells a result from a baseline."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


def svg(name: str, draw: Callable[[Axes], None], width: float, height: float) -> str:
    """``draw`` on fresh axes of width x height inches; SVG text for inlining in HTML.

    ``name`` must differ between the figures of a page: clip paths are found by ids made from it.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, so not ids in a page
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def comparison(axes: Axes, estimates: Sequence[Estimate]) -> None:
    """A dot and its interval for each estimate, first on top; the value at the right."""
    for row, (_, value, low, high, ours) in enumerate(estimates):
        colour = ACCENT if ours else MUTED
        axes.axhline(row, color=RULE, linewidth=0.6)
        axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(value, row, "o", color=colour, markersize=6 if ours else 5)
        finite = np.isfinite(value)
        axes.annotate(
            f"{value:.3f}" if finite else "not finite",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour if finite else WARN,
            weight="bold" if ours else "normal",
        )
    labels = [estimate.label for estimate in estimates]
    axes.set_yticks(range(len(labels)), labels, color=INK, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("bits/dim, lower is better")
    axes.margins(x=0.08)


def histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    """Counts of ``values`` (n,) and their mean.

    Nothing is dropped in silence: values too far out to share the axis with the bulk, and
    values that are not finite, are counted in words on the figure.
    """
    finite = np.sort(np.asarray(values[np.isfinite(values)], np.float64))
    first, last = _bulk(finite)
    shown = finite[first:last]
    notes = []
    if first > 0:
        notes.append(f"{first} further left, down to {finite[0]:.4g}")
    if last < finite.size:
        notes.append(f"{finite.size - last} further right, up to {finite[-1]:.4g}")
    if broken := values.size - finite.size:
        notes.append(f"{broken} of {values.size} not finite")
    if shown.size:
        axes.hist(
            shown,
            _bins(shown).tolist(),
            histtype="stepfilled",
            color=ACCENT,
            alpha=0.75,
            linewidth=0,
        )
        if shown[0] <= finite.mean() <= shown[-1]:
            axes.axvline(finite.mean(), color=INK, linewidth=1)
            axes.annotate(
                "mean",
                (finite.mean(), 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                va="bottom",
            )
    axes.grid(axis="y")
    for line, note in enumerate(notes):
        axes.text(
            1,
            0.98 - ANNOTATION_HEIGHT * line,
            note,
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=WARN,
            weight="bold",
        )
    axes.set_xlabel(label, parse_math=False)
    axes.set_ylabel("images")


def _bulk(ordered: np.ndarray) -> tuple[int, int]:
    """Slice of ``ordered`` that shares an axis: all, but for values far beyond the quartiles."""
    if ordered.size == 0:
        return 0, 0
    low, high = np.quantile(ordered, [0.25, 0.75])
    reach = 8 * (high - low) or np.inf
    first = np.searchsorted(ordered, low - reach, "left")
    last = np.searchsorted(ordered, high + reach, "right")
    return int(first), int(last)


def _bins(values: np.ndarray) -> np.ndarray:
    """Edges by the Freedman-Diaconis rule, 10 to 60 bins; whole numbers never split a bin."""
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
    if broken := int((~finite).sum()):
        axes.text(
            1,
            1,
            f"{broken} of {loss.size} losses not finite",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=WARN,
            weight="bold",
        )
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
    axes.set_xlabel("step")
    axes.set_ylabel("loss")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values; at the ends, over those that exist.

    ``window`` is odd; more than all values is all of them.
    """
    ones = np.ones(min(window, values.size))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(values.size), ones, "same")


def _thin(x: np.ndarray, y: np.ndarray, buckets: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 points a bucket, its least and greatest y: looks the same, stays small."""
    if x.size <= 2 * buckets:
        return x, y
    parts = np.array_split(np.arange(x.size), buckets)
    keep = sorted(
        {index for part in parts for index in (part[y[part].argmin()], part[y[part].argmax()])}
    )
    return x[keep], y[keep]
