"""A row of ``report.json``: a number (``Estimate.row``) with its cell and images."""

from collections.abc import Mapping
from typing import Any

from sbml.core.types import Json
from sbml.density import estimate
from sbml.density.estimators import Cell
from sbml.likelihood import PriorError
from sbml.program.runtime.workdir import Workdir
from sbml.statistics.intervals import HEAVY, Interval

# Pages of the documentation (``page.DOCS``).
_BARS, _TIME = "explanations/error_bars.html", "explanations/dequantization.html"
_TIME += "#the-smallest-time-for-integer-data"
_ALL = f"{_BARS}#no-image-and-no-outlier-is-left-out"
# What the table of the page shows of a row: the heading; the format, "bits" for bits/dim, or one of
# Python for floats; and the page of the documentation that explains it.
ROWS = {
    "n": ("images", "", ""),
    "bits_per_dim": ("bits/dim", "bits", "explanations/bits.html#from-a-density-to-bits-dim"),
    "interval": ("95% interval", "bits", f"{_BARS}#the-images"),
    "this_set_ci95": ("± for these images only", ".2g", f"{_BARS}#the-random-draws"),
    "converged": ("solver converged", "", f"{_BARS}#the-solver"),
    "solver_error": ("solver error", ".1g", f"{_BARS}#the-solver"),
    "solver_error_ci95": ("± of the solver error", ".1g", f"{_BARS}#the-solver"),
    "prior_error": ("error of the prior", ".1g", f"{_BARS}#the-prior"),
    "prior_error_each": ("error of the prior, one image", ".1g", f"{_BARS}#the-prior"),
    "tail": ("Pareto's k of the draws", ".2f", f"{_BARS}#draws-with-a-heavy-tail"),
    "nonfinite": ("images not finite", "", _ALL),
    "min": ("smallest of an image", "bits", ""),
    "max": ("largest of an image", "bits", ""),
    "median": ("median of the images", "bits", _ALL),
    "without_outliers": ("mean without outliers", "bits", _ALL),
    "smallest_time": ("smallest time", ".3g", _TIME),
    "nfe_mean": ("network evaluations, mean", ".1f", ""),
    "nfe_max": ("network evaluations, max", ".6g", ""),
}
KIND = ("estimator", "dequantizer", "num_importance")  # the fields of a ``Cell``


def read(value: Any) -> Any:
    """What ``core.files.strict`` was given: the strings for numbers become floats again."""
    if isinstance(value, Mapping):
        return {name: read(item) for name, item in value.items()}
    if isinstance(value, list):
        return [read(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def cell(row: Json) -> Cell:
    """The cell of a row."""
    return Cell(*(row[name] for name in KIND))


def population(row: Json) -> Interval:
    """The mean of a row with its 95% interval for the population of images."""
    return Interval(*(row[name] for name in ("bits_per_dim", "stderr", "ci95", "n", "nonfinite")))


def line(row: Json) -> str:
    """A number of bits/dim and its error bars, for a terminal; see :func:`said`."""
    of = f" on {row['data']} {row['split']}"
    return f"{cell(row).title:24s} {said(row, 'bits/dim', 'images', of)}"


def said(row: Json, unit: str, examples: str, of: str = "", after: str = "") -> str:
    """A number in words: ``estimate.line`` with what makes it untrustworthy, the remedy, ``after``,
    and the error of the prior in a line of its own."""
    about = " NOT CONVERGED" if row.get("converged") is False else ""
    about = " HEAVY TAILS" if row.get("tail", 0) > HEAVY else about
    remedy = f"; {why.rpartition('; ')[2]}" if (why := row.get("unconverged")) else ""
    prior = ""
    if "prior_error" in row:
        prior = PriorError(row["prior_error"], row["prior_error_each"]).line(unit.split()[0])
    return f"{estimate.line(row, unit, examples, about, of)}{remedy}{after}{prior}"


def next_steps(workdir: Workdir) -> str:
    """What one can do with the report and the model of ``workdir``: the last line of a command."""
    density = f"sbml.load({str(workdir)!r})"
    return f"next: open the report in a browser; in Python, {density} is the density"
