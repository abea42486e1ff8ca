"""One number of an evaluation, with all fields that ``report.json`` has for it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sbml.core.door import typed
from sbml.core.scalars import notation
from sbml.density.estimate import Estimate
from sbml.density.estimators import Cell
from sbml.likelihood import PriorError
from sbml.program.runtime.workdir import EVALUATION
from sbml.statistics import intervals
from sbml.statistics.intervals import Interval

# ``name`` + HALF_WIDTH is the name of the half-width of the 95% interval of the number ``name``.
HALF_WIDTH = ", 95% interval +-"

# Pages of the documentation (``page.DOCS``).
_BARS, _DEQUANTIZATION = "explanations/error_bars.html", "explanations/dequantization.html"
_ALL = f"{_BARS}#no-image-and-no-outlier-is-left-out"


def with_half_widths(values: Mapping[str, Any], sign: str = "+-") -> dict[str, str]:
    """Each number as text, with the half-width of its interval if ``values`` has it."""
    return {
        name: f"{float(value):z.4g}"
        + (f" {sign}{float(values[half]):.2g}" if half in values else "")
        for name, value in values.items()
        if not name.endswith(HALF_WIDTH)
        for half in [f"{name}{HALF_WIDTH}"]
    }


def _column(heading: str, form: str, page: str = "", **options: Any) -> Any:
    """A field that the table of the page shows as a row called ``heading``.

    ``form`` is "bits" for bits/dim, or a format of Python for floats; ``page`` is where the
    documentation explains the row.
    """
    return dataclasses.field(metadata={"shown": (heading, form, page)}, **options)


def strict(value: Any, name: str = "report") -> Any:
    """``value`` in the types of JSON, without numbers that are not finite.

    Such numbers become the strings "NaN", "Infinity" and "-Infinity", which Python's ``float``
    reads. Arrays and tuples become lists.

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
    raise ValueError(f"{name} is {value!r}, which JSON cannot hold: pass a number or a string.")


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The mean of the bits/dim of images, its error bars, and how it was computed.

    Attributes:
      estimator, dequantizer: their names.
      num_importance: K, the number of draws of the dequantizer in one logarithm.
      data, split: the names of the data set and of its split.
      n, split_size: the number of images in the mean, and in the split.
      bits_per_dim: the mean.
      stderr, ci95, interval: the standard error of the mean, and the half-width and the ends of its
        95% interval, for the population of images.
      this_set_stderr, this_set_ci95, this_set_interval: the same for this set of images, with the
        noise of the random draws only.
      converged: whether all numbers are finite and the solver's error is within
        ``eval.ode.solver_budget``; None for a bound.
      solver_error, solver_error_ci95: the mean difference from a stricter solve, and the half-width
        of its 95% interval, in bits/dim; None for a bound.
      solver_images: the number of images on which the solver's error was measured; None for a
        bound.
      unconverged: why the number has not converged, and the remedy; None if it has, and for a
        bound.
      prior_error, prior_error_each: the error that comes from using the prior in place of p_T, in
        bits/dim: KL(p_T || pi) for the mean, and the approximate size for one image
        (``likelihood.PriorError``); None for a bound, which contains this error.
      sweeps: the number of sweeps of a bound; None for the ODE.
      tail: Pareto's k of the draws or of the weights of their times (``Estimate.tail``); None for
        the ODE, and for few draws.
      target_se: ``eval.bound.target_se``; None for the ODE.
      nonfinite: the number of images whose bits/dim are not finite.
      min, max, median: the smallest, the largest and the median bits/dim of an image; the median
        is that of the finite numbers.
      outliers: [id, bits/dim] of the outliers, in the order of ``Estimate.outliers``.
      without_outliers, without_outliers_interval: the mean without them, and the ends of its 95%
        interval; None if no image or every image is an outlier.
      terms: the means of the terms, whose sum is ``bits_per_dim``.
      smallest_time: the smallest time eps, at which the model's density is taken.
      trace: the kind of trace and the number of probes; None if no divergence is computed.
      dequantizer_step: the step of the dequantizer's checkpoint; None if it was not trained.
      nfe_mean, nfe_max: the mean and the largest number of evaluations of the score for an image.
    """

    estimator: str
    dequantizer: str
    num_importance: int
    data: str
    split: str
    n: int = _column("images", "")
    split_size: int
    bits_per_dim: float = _column(
        "bits/dim", "bits", "explanations/bits.html#from-a-density-to-bits-dim"
    )
    stderr: float
    ci95: float
    interval: list[float] = _column("95% interval", "bits", f"{_BARS}#the-images")
    this_set_stderr: float
    this_set_ci95: float = _column("± for these images only", ".2g", f"{_BARS}#the-random-draws")
    this_set_interval: list[float]
    converged: bool | None = _column("solver converged", "", f"{_BARS}#the-solver", default=None)
    solver_error: float | None = _column("solver error", ".1g", f"{_BARS}#the-solver", default=None)
    solver_error_ci95: float | None = _column(
        "± of the solver error", ".1g", f"{_BARS}#the-solver", default=None
    )
    solver_images: int | None = None
    unconverged: str | None = None
    prior_error: float | None = _column(
        "error of the prior", ".1g", f"{_BARS}#the-prior", default=None
    )
    prior_error_each: float | None = _column(
        "error of the prior, one image", ".1g", f"{_BARS}#the-prior", default=None
    )
    sweeps: int | None = None
    tail: float | None = _column(
        "Pareto's k of the draws", ".2f", f"{_BARS}#draws-with-a-heavy-tail", default=None
    )
    target_se: float | None = None
    nonfinite: int = _column("images not finite", "", _ALL)
    min: float = _column("smallest of an image", "bits")
    max: float = _column("largest of an image", "bits")
    median: float | None = _column("median of the images", "bits", _ALL, default=None)
    outliers: list[list[float]]
    without_outliers: float | None = _column("mean without outliers", "bits", _ALL, default=None)
    without_outliers_interval: list[float] | None = None
    terms: dict[str, float]
    smallest_time: float = _column(
        "smallest time", ".3g", f"{_DEQUANTIZATION}#the-smallest-time-for-integer-data"
    )
    trace: dict[str, Any] | None
    dequantizer_step: int | None
    nfe_mean: float = _column("network evaluations, mean", ".1f")
    nfe_max: int = _column("network evaluations, max", ".6g")

    @classmethod
    def of(cls, number: Estimate, ids: np.ndarray, **origin: Any) -> "Result":
        """The result of the estimate ``number`` over the images ``ids (n,)``; ``origin`` are the
        other fields."""
        values, population, this_set = number.values, number.population, number.this_set
        without = number.without_outliers
        gap = number.solver_error
        kind: dict[str, Any] = (
            {
                "sweeps": number.sweeps,
                "target_se": number.target_se,
                "tail": None if math.isnan(number.tail) else number.tail,
            }
            if gap is None
            else {
                "converged": number.converged,
                "solver_error": gap.mean,
                "solver_error_ci95": gap.ci95,
                "solver_images": gap.n,
                "unconverged": number.unconverged("eval.ode.") or None,
                "prior_error": number.prior_error.mean if number.prior_error else None,
                "prior_error_each": number.prior_error.each if number.prior_error else None,
            }
        )
        return cls(
            **origin,
            **kind,
            smallest_time=number.eps,
            n=population.n,
            bits_per_dim=population.mean,
            stderr=population.stderr,
            ci95=population.ci95,
            interval=list(population.bounds),
            this_set_stderr=this_set.stderr,
            this_set_ci95=this_set.ci95,
            this_set_interval=list(this_set.bounds),
            nonfinite=population.nonfinite,
            min=float(values.min()),
            max=float(values.max()),
            median=number.median,
            outliers=[[int(ids[i]), float(values[i])] for i in number.outliers],
            without_outliers=without and without.mean,
            without_outliers_interval=without and list(without.bounds),
            terms={name: float(term.mean()) for name, term in number.terms.items()},
            nfe_mean=float(number.nfe.mean()),
            nfe_max=int(number.nfe.max()),
        )

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Result":
        """The result from a ``row`` of ``report.json``, which is :func:`strict`."""

        def number(value: Any) -> Any:
            if isinstance(value, list):
                return [number(item) for item in value]
            if isinstance(value, Mapping):
                return {name: number(item) for name, item in value.items()}
            return float(value) if value in ("NaN", "Infinity", "-Infinity") else value

        try:
            return cls(**{name: number(value) for name, value in row.items()})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a row of results in {EVALUATION} is no result of an evaluation: {error}; "
                "evaluate again (--mode=eval)"
            ) from error

    def plain(self) -> dict[str, Any]:
        """The row of ``report.json``: the fields, without those that this kind of number lacks."""
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        row = dataclasses.asdict(self)
        return {k: v for k, v in row.items() if v is not None or k not in optional}

    @property
    def population(self) -> Interval:
        """The mean with its 95% interval for the population of images."""
        return Interval(self.bits_per_dim, self.stderr, self.ci95, self.n, self.nonfinite)

    @property
    def _cell(self) -> Cell:
        return Cell(self.estimator, self.dequantizer, self.num_importance)

    @property
    def name(self) -> str:
        """The name of the number in messages."""
        return self._cell.title

    @property
    def column(self) -> str:
        """The beginning of the names of its columns in the per-image table."""
        return self._cell.name

    @property
    def line(self) -> str:
        """The number and its error bars, for a terminal, and the remedy if it has not converged."""
        low, high = self.interval
        prior = ""
        if self.prior_error is not None and self.prior_error_each is not None:
            prior = PriorError(self.prior_error, self.prior_error_each).line("bits/dim")
        mark = " NOT CONVERGED" if self.converged is False else ""
        remedy = f"; {self.unconverged.rpartition('; ')[2]}" if self.unconverged else ""
        if self.tail is not None and self.tail > intervals.HEAVY:
            mark = " HEAVY TAILS"
        return (
            f"{self.name:24s} {self.bits_per_dim:z.4f} bits/dim{mark} at "
            f"t={notation(self.smallest_time, '.3g')} on {self.data} {self.split}, 95% interval "
            f"[{low:z.4f}, {high:z.4f}], for these images "
            f"+-{self.this_set_ci95:.4f}, n={self.n}{remedy}{prior}"
        )


# The fields that the table of the page shows, one a row: (heading, format, page that explains it).
ROWS: dict[str, tuple[str, str, str]] = {
    f.name: f.metadata["shown"] for f in dataclasses.fields(Result) if f.metadata
}
