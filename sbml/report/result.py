"""One number of an evaluation: the one place that spells what ``report.json`` says of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sbml import intervals
from sbml.estimate import Estimate
from sbml.estimators import Cell


def _shown(heading: str, form: str, **options: Any) -> Any:
    """A field with its heading in the page's table and its format: "word", "bits" or Python's."""
    return dataclasses.field(metadata={"shown": (heading, form)}, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A mean over images in bits/dim, what it is of, and what it is worth.

    Attributes:
      estimator, dequantizer, num_importance: which number; K draws of the dequantizer.
      data, split, n, split_size: of which images, and of how many in the split.
      bits_per_dim, stderr, ci95, interval: the mean, with its error bars for data like these.
      this_set_stderr, this_set_ci95, this_set_interval: for these very images.
      converged: whether the solver's error is within ``eval.solver_budget``; None for a bound.
      solver_error, solver_error_ci95, solver_images: against a stricter solve, on some images.
      sweeps, target_se: of a bound, its sweeps and the ``eval.target_se`` that was asked for.
      nonfinite, min, max, outliers: counts, extremes, and [id, bits/dim] of outliers.
      terms: means of the terms, which add up to ``bits_per_dim``.
      smallest_time, trace, dequantizer_step: how it was computed.
      nfe_mean, nfe_max: evaluations of the score for an image.
    """

    estimator: str = _shown("estimator", "word")
    dequantizer: str = _shown("dequantizer", "word")
    num_importance: int = _shown("K", "")
    data: str
    split: str
    n: int = _shown("images", "")
    split_size: int
    bits_per_dim: float = _shown("bits/dim", "bits")
    stderr: float
    ci95: float = _shown("±\u00a095%", "bits")
    interval: list[float] = _shown("95% interval", "bits")
    this_set_stderr: float
    this_set_ci95: float = _shown("± these images", ".2g")
    this_set_interval: list[float]
    converged: bool | None = _shown("converged", "word", default=None)
    solver_error: float | None = _shown("solver error", ".1g", default=None)
    solver_error_ci95: float | None = _shown("± of it", ".1g", default=None)
    solver_images: int | None = None
    sweeps: int | None = None
    target_se: float | None = None
    nonfinite: int = _shown("not finite", "")
    min: float = _shown("least", "bits")
    max: float = _shown("greatest", "bits")
    outliers: list[list[float]]
    terms: dict[str, float]
    smallest_time: float
    trace: dict[str, Any] | None
    dequantizer_step: int | None
    nfe_mean: float = _shown("evaluations, mean", ".1f")
    nfe_max: int = _shown("evaluations, max", ".6g")

    @classmethod
    def of(cls, found: Estimate, ids: np.ndarray, **origin: Any) -> "Result":
        """The result of an estimate of the images ``ids``; ``origin`` are the other fields."""
        values, (low, high) = found.values, found.population.bounds
        far = intervals.outliers(values)
        far = far[np.argsort(-values[far])]
        gap, half = found.solver_error, found.this_set.ci95
        solved: dict[str, Any] = (
            {}
            if gap is None
            else {
                "converged": found.converged,
                "solver_error": gap.mean,
                "solver_error_ci95": gap.ci95,
                "solver_images": gap.n,
            }
        )
        return cls(
            **origin,
            **(solved or {"sweeps": found.sweeps}),
            n=found.population.n,
            bits_per_dim=found.population.mean,
            stderr=found.population.stderr,
            ci95=found.population.ci95,
            interval=[low, high],
            this_set_stderr=found.this_set.stderr,
            this_set_ci95=half,
            this_set_interval=[found.this_set.mean - half, found.this_set.mean + half],
            nonfinite=found.population.nonfinite,
            min=float(values.min()),
            max=float(values.max()),
            outliers=[[int(ids[i]), float(values[i])] for i in far],
            terms={name: float(term.mean()) for name, term in found.terms.items()},
            nfe_mean=float(found.nfe.mean()),
            nfe_max=int(found.nfe.max()),
        )

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Result":
        """A result of ``report.json``, where "NaN" and "Infinity" stand for such numbers.

        Raises:
          ValueError: it lacks a field, or has one that is unknown.
        """

        def number(value: Any) -> Any:
            if isinstance(value, list):
                return [number(item) for item in value]
            return float(value) if value in ("NaN", "Infinity", "-Infinity") else value

        try:
            return cls(**{name: number(value) for name, value in row.items()})
        except TypeError as error:
            raise ValueError(f"{dict(row)} is no result of an evaluation: {error}") from error

    def plain(self) -> dict[str, Any]:
        """As ``report.json`` has it: without the fields that this kind of number lacks."""
        optional = {f.name for f in dataclasses.fields(self) if f.default is None}
        found = dataclasses.asdict(self)
        return {k: v for k, v in found.items() if v is not None or k not in optional}

    @property
    def name(self) -> str:
        """As messages call it."""
        draws = f" K={self.num_importance}" if self.num_importance > 1 else ""
        return f"{self.estimator} {self.dequantizer}{draws}"

    @property
    def column(self) -> str:
        """What precedes the names of its columns in the per-image table."""
        return Cell(self.estimator, self.dequantizer, self.num_importance).name

    @property
    def line(self) -> str:
        """The number and its error bars, for a terminal."""
        low, high = self.interval
        mark = " UNCONVERGED" if self.converged is False else ""
        return (
            f"{self.name:24s} {self.bits_per_dim:.4f} bits/dim{mark} on {self.data} {self.split}, "
            f"95% interval [{low:.4f}, {high:.4f}], for these images +-{self.this_set_ci95:.4f}, "
            f"n={self.n}"
        )

    def warnings(self, names: Sequence[str] | None = None) -> list[str]:
        """What a reader of the number must know: non-finite or outlying images, no convergence.

        ``names`` are those of all images of the split, by id, where they have any.
        """
        found = []
        if self.nonfinite:
            found.append(f"{self.name}: {self.nonfinite} images have a non-finite result")
        if self.outliers:
            far = [(names[int(i)] if names else i, value) for i, value in self.outliers[:5]]
            shown = ", ".join(f"{name} ({value:.3f})" for name, value in far)
            found.append(
                f"{self.name}: over 6 robust standard deviations from the median, and counted like "
                f"all others: {len(self.outliers)} of {self.n} images, {shown}"
            )
        if self.target_se and not self.this_set_stderr <= self.target_se:
            found.append(
                f"{self.name}: standard error {self.this_set_stderr:.2g} after {self.sweeps} "
                f"sweeps (eval.max_sweeps), above eval.target_se={self.target_se}"
            )
        if self.converged is False:
            found.append(
                f"{self.name}: UNCONVERGED, a stricter solve moves it by "
                f"{self.solver_error:.2g} +- {self.solver_error_ci95:.2g} bits/dim on "
                f"{self.solver_images} images: lower eval.rtol and eval.atol, or raise eval.subset"
            )
        return found


# Fields that the page's table shows: (heading, format of a float).
COLUMNS: dict[str, tuple[str, str]] = {
    f.name: f.metadata["shown"] for f in dataclasses.fields(Result) if f.metadata
}
