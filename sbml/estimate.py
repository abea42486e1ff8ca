"""A number for every example, and the mean of these numbers with its error bars.

An example has independent random draws in each *sweep*. Sweep 0 covers all examples. There are two
kinds of estimates, which measure the noise of the draws in different ways:

    ode      -log p by an ODE. Sweep 1 covers a subset of the examples, and the differences between
             its two draws measure the noise. The subset is also solved again with the draws of
             sweep 0 and the :func:`reference` solver; the difference measures the solver's error.
    bound    an expectation over times. Every sweep covers all examples. The value of an example is
             its mean over R sweeps, and the spread of the sweeps' means m_r measures the noise:
             the standard error is sd(m_r) / sqrt(R). If a few rare draws decide the mean, the
             intervals are too narrow. Pareto's k of the draws, each minus the median of its
             example, and of the weights of their times show this.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Integer, Num

from sbml import intervals
from sbml.intervals import Interval
from sbml.likelihood import PriorError
from sbml.ode import Solver

Ids = Integer[np.ndarray, "n"]
Values = Num[np.ndarray, "n"]
Columns = dict[str, Values]
Rows = Callable[[Ids, int, Solver], Columns]  # (ids, sweep, solver) -> terms and nfe of each id


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number for every example, and the mean of these numbers with its error bars.

    Attributes:
      values: the numbers of the examples, ``(n,)``, in ``unit``.
      terms: the terms whose sum is ``values``, each ``(n,)``.
      unit: "nats" or "bits/dim".
      nfe: the number of evaluations of the score for each example, ``(n,)``.
      population: the mean of ``values`` with its 95% interval for the population from which the
        examples come.
      this_set: the mean with its 95% interval for this set of examples. It contains the noise of
        the random draws only (probes, times and dequantization), so its width is 0 without draws.
      sweeps: the number of sweeps of a bound; 1 for an ODE.
      solver_error: the mean difference from a solve by :func:`reference`, on a subset of the
        examples, with its 95% interval; None for a bound, which solves no ODE.
      budget: the largest solver error that counts as converged, in ``unit``.
      prior_error: the error because the prior takes the place of p_T, in ``unit``; None for a
        bound, which contains it.
      tail: ``intervals.pareto_k`` of the draws of a bound, or of the weights of their times if
        that is larger; nan for an ODE, and for few draws.
    """

    values: Values
    terms: Columns
    unit: str
    nfe: Values
    population: Interval
    this_set: Interval
    sweeps: int = 1
    solver_error: Interval | None = None
    budget: float = math.inf
    prior_error: PriorError | None = None
    tail: float = math.nan

    @property
    def mean(self) -> float:
        """The mean of ``values``."""
        return self.population.mean

    @property
    def this_set_ci95(self) -> float:
        """The half-width of the 95% interval for this set of examples."""
        return self.this_set.ci95

    @property
    def converged(self) -> bool:
        """Whether all numbers of an ODE are finite and its solver's error is :func:`within` the
        budget; True for a bound."""
        error = self.solver_error
        return error is None or (within(error, self.budget) and not self.population.nonfinite)

    @property
    def heavy_tailed(self) -> bool:
        """Whether so few draws decide the mean of a bound that its intervals are too narrow."""
        return self.tail > intervals.HEAVY

    def __neg__(self) -> "Estimate":
        """The estimate of the negated numbers, such as log p for -log p."""

        def negative(interval: Interval) -> Interval:
            return interval._replace(mean=-interval.mean)

        return dataclasses.replace(
            self,
            values=-self.values,
            terms={name: -term for name, term in self.terms.items()},
            population=negative(self.population),
            this_set=negative(self.this_set),
            solver_error=None if self.solver_error is None else negative(self.solver_error),
        )

    def __str__(self) -> str:
        low, high = self.population.bounds
        return (
            f"{self.population.mean:.4f} {self.unit}, 95% interval [{low:.4f}, {high:.4f}], for "
            f"these examples +-{self.this_set_ci95:.4f}, n={self.population.n}{self._mark()}"
        ) + (self.prior_error.line(self.unit) if self.prior_error else "")

    def _mark(self) -> str:
        """Why the numbers are not converged or the intervals are too narrow; otherwise empty."""
        if self.heavy_tailed:
            return (
                f", HEAVY TAILS: Pareto's k of the draws is {self.tail:.2f}, above "
                f"{intervals.HEAVY:g}, so the intervals are too narrow; raise times_each, or "
                "improve the score where it is least accurate, such as near eps"
            )
        error = self.solver_error
        if error is None or self.converged:
            return ""
        if count := self.population.nonfinite:
            return f", NOT CONVERGED: {count} numbers are not finite"
        return (
            f", NOT CONVERGED: the solver's error is {error.mean:.2g} +- {error.ci95:.2g}, more "
            f"than the budget {self.budget:g}; lower rtol and atol"
        )


def within(gap: Interval, budget: float) -> bool:
    """Whether a solver's error is at most ``budget``: |mean| + half-width of its 95% interval.

    The half-width is included because errors of opposite signs cancel in the mean. If the error is
    not finite, the result is False.
    """
    return abs(gap.mean) + gap.ci95 <= budget


def total(columns: Columns, terms: Sequence[str]) -> Values:
    """The sum of the columns in ``terms``, ``(n,)``."""
    return np.sum([columns[name] for name in terms], axis=0)


# The largest tolerance of a reference solver. The solver's error at this tolerance is still larger
# than the rounding errors of float32.
STRICT = 2e-5


def reference(solver: Solver) -> Solver:
    """The solver whose results count as exact when the error of ``solver`` is measured.

    Its tolerances are a tenth of those of ``solver``, and at most ``STRICT``. If ``solver`` has
    fixed steps, they are a tenth of the default tolerances. All other settings are defaults, so
    that an error which comes from the method, the coordinate or the first step of ``solver`` is
    seen: with the same settings, the reference would have the error too.
    """
    if solver.fixed_steps is not None:
        return Solver().tighter(10)
    strict = solver.tighter(10)
    return Solver(rtol=min(strict.rtol, STRICT), atol=min(strict.atol, STRICT))


def solver_error(
    rows: Rows,
    ids: Ids,
    subset: Integer[np.ndarray, " m"],
    solver: Solver,
    terms: Sequence[str],
) -> Interval:
    """The mean over ``subset`` of the values by ``solver`` minus those by its :func:`reference`.

    Both use the draws of sweep 0. The interval is in the unit of the terms. It takes ``subset`` as
    a sample of more examples; if ``ids`` has one example only, its width is 0.
    """
    values, exact = (total(rows(subset, 0, s), terms) for s in (solver, reference(solver)))
    gap = intervals.mean_interval(values - exact)
    return gap._replace(stderr=0.0, ci95=0.0) if len(ids) == 1 else gap


def ode_estimate(
    rows: Rows,
    ids: Ids,
    subset: Integer[np.ndarray, " m"],
    solver: Solver,
    terms: Sequence[str],
    unit: str,
    gap: Interval,
    budget: float,
    prior_error: PriorError | None = None,
) -> Estimate:
    """The estimate of numbers that are computed by an ODE.

    Args:
      rows: a function of ids ``(n,)``, a sweep and a solver that gives the terms and ``nfe`` of
        these examples, each ``(n,)``, in float64.
      ids, subset: the sorted ids of all examples, and of those that are drawn again in sweep 1.
      solver, terms: how the ODE is solved, and the names of the terms.
      unit, budget, prior_error: as in :class:`Estimate`.
      gap: the :func:`solver_error`.
    """
    table = rows(ids, 0, solver)
    values = total(table, terms)
    again = total(rows(subset, 1, solver), terms)
    first = values[np.isin(ids, subset)]
    stderr, freedom = intervals.repeated_stderr(first, again, len(ids))
    return Estimate(
        values=values,
        terms={name: table[name] for name in terms},
        unit=unit,
        nfe=table["nfe"],
        population=intervals.mean_interval(values),
        this_set=_this_set(values, stderr, freedom),
        solver_error=gap,
        budget=budget,
        prior_error=prior_error,
    )


def bound_estimate(
    tables: Sequence[Columns], terms: Sequence[str], unit: str, tail: float = math.nan
) -> Estimate:
    """The estimate of a bound from the tables of its sweeps.

    Each table has the columns ``terms`` and ``nfe`` of all examples, each ``(n,)``. The result's
    values and terms are means over the sweeps, and its ``nfe`` are sums. ``tail`` is Pareto's k of
    the weights of the times (``bound.Reduction.tail``).
    """
    draws = np.array([total(table, terms) for table in tables])
    values = np.mean(draws, axis=0)
    return Estimate(
        values=values,
        terms={name: np.mean([table[name] for table in tables], axis=0) for name in terms},
        unit=unit,
        nfe=np.sum([table["nfe"] for table in tables], axis=0),
        population=intervals.mean_interval(values),
        this_set=_this_set(values, sweep_stderr(tables, terms), len(tables) - 1),
        sweeps=len(tables),
        tail=float(np.fmax(tail, intervals.pareto_k(draws - np.median(draws, axis=0)))),
    )


def sweep_stderr(tables: Sequence[Columns], terms: Sequence[str]) -> float:
    """sd(m_r) / sqrt(R), where m_r is the mean over all examples in sweep r of R.

    This is the standard error of the mean over sweeps. It is infinite for one sweep.
    """
    if len(tables) < 2:
        return math.inf
    means = [float(np.mean(total(table, terms))) for table in tables]
    return float(np.std(means, ddof=1)) / math.sqrt(len(means))


def _this_set(values: Values, stderr: float, freedom: float) -> Interval:
    """The mean of ``values`` with the noise of the random draws alone."""
    nonfinite = int(np.sum(~np.isfinite(values)))
    half = intervals.half_width(stderr, freedom)
    return Interval(float(np.mean(values)), stderr, half, len(values), nonfinite)
