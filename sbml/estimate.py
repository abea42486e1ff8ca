"""A number for every example, and the error bars of its mean.

Rows of numbers are asked for by (ids, sweep): sweep 0 covers all examples, and every further sweep
draws the randomness of an example anew.

    solved      -log p by an ODE. Some examples in sweep 1 tell the noise of the draws; some again,
                by the same draws and a reference solver, tell the solver's error.
    swept       a bound, an expectation over times. Every sweep covers all examples; a value is the
                mean over sweeps, and the spread of the sweeps' means tells the noise.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Integer, Num

from sbml import intervals
from sbml.intervals import Interval
from sbml.ode import Solver

Ids = Integer[np.ndarray, "n"]
Values = Num[np.ndarray, "n"]
Columns = dict[str, Values]
Rows = Callable[[Ids, int, Solver], Columns]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number for every example, and what its mean is worth.

    Attributes:
      values: of each example, ``(n,)``, in ``unit``.
      terms: the parts that add up to ``values``, each ``(n,)``.
      unit: "nats" or "bits/dim".
      nfe: evaluations of the score for each example, ``(n,)``.
      population: mean of ``values`` and its 95% interval for data like these.
      this_set: the same mean with its 95% interval for these very examples: the noise of probes,
        times and dequantization. 0 where nothing is drawn.
      sweeps: how many draws of every example, of a bound; otherwise 1.
      solver_error: mean difference to the solve of :func:`reference`, on some examples; None for a
        bound, which solves no ODE.
      budget: the largest ``solver_error`` of a number that counts as converged.
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

    @property
    def this_set_ci95(self) -> float:
        """Half-width of the 95% interval for these very examples."""
        return self.this_set.ci95

    @property
    def converged(self) -> bool:
        """Whether the solver's error, its own 95% interval included, is within the budget."""
        return self.solver_error is None or within(self.solver_error, self.budget)

    def __neg__(self) -> "Estimate":
        """The estimate of the opposite numbers, log p for -log p."""

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
        mark = "" if self.converged else f", NOT CONVERGED: solver error {self.solver_error}"
        return (
            f"{self.population.mean:.4f} {self.unit}, 95% interval [{low:.4f}, {high:.4f}], for "
            f"these examples +-{self.this_set_ci95:.4f}, n={self.population.n}{mark}"
        )


def within(gap: Interval, budget: float) -> bool:
    """Whether a solver's error is at most ``budget``; False if it is not finite.

    Its 95% interval counts: large errors of either sign must not pass for none.
    """
    return abs(gap.mean) + gap.ci95 <= budget


def total(columns: Columns, terms: Sequence[str]) -> Values:
    """The sum of the terms, ``(n,)``."""
    return np.sum([columns[name] for name in terms], axis=0)


# Tolerance of a solve that counts as exact, however loose the one that is compared with it. The
# errors of float32 are below those that it leaves.
STRICT = 2e-5


def reference(solver: Solver) -> Solver:
    """What ``solver`` is compared with: a solve by a tenth of its tolerances, ``STRICT`` at most.

    All else is the default: a method, a coordinate or a first step that lets errors pass must not
    be compared with itself. Beside fixed steps, the default's own tenth.
    """
    if solver.fixed_steps is not None:
        return Solver().tighter(10)
    strict = solver.tighter(10)
    return Solver(rtol=min(strict.rtol, STRICT), atol=min(strict.atol, STRICT))


def solver_error(rows: Rows, subset: Ids, solver: Solver, terms: Sequence[str]) -> Interval:
    """The mean of ``solver``'s values less those of its :func:`reference`, by the same draws."""
    ours, exact = (total(rows(subset, 0, how), terms) for how in (solver, reference(solver)))
    return intervals.mean_interval(ours - exact)


def ode_estimate(
    rows: Rows,
    ids: Ids,
    subset: Integer[np.ndarray, " m"],
    solver: Solver,
    terms: Sequence[str],
    unit: str,
    gap: Interval,
    budget: float,
) -> Estimate:
    """The estimate of an ODE's numbers.

    Args:
      rows: the terms and ``nfe`` of ids in a sweep by a solver, each ``(n,)``, in float64.
      ids, subset: all examples, sorted, and those of them that are drawn again.
      solver, terms, unit, budget: as in ``Estimate``.
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
    )


def bound_estimate(tables: Sequence[Columns], terms: Sequence[str], unit: str) -> Estimate:
    """The estimate of a bound from the tables of its sweeps, each of all examples."""
    values = np.mean([total(table, terms) for table in tables], axis=0)
    return Estimate(
        values=values,
        terms={name: np.mean([table[name] for table in tables], axis=0) for name in terms},
        unit=unit,
        nfe=np.sum([table["nfe"] for table in tables], axis=0),
        population=intervals.mean_interval(values),
        this_set=_this_set(values, sweep_stderr(tables, terms), len(tables) - 1),
        sweeps=len(tables),
    )


def sweep_stderr(tables: Sequence[Columns], terms: Sequence[str]) -> float:
    """The standard error of the mean over sweeps of the data set's mean; infinite for one sweep."""
    if len(tables) < 2:
        return math.inf
    means = [float(np.mean(total(table, terms))) for table in tables]
    return float(np.std(means, ddof=1)) / math.sqrt(len(means))


def _this_set(values: Values, stderr: float, freedom: float) -> Interval:
    nonfinite = int(np.sum(~np.isfinite(values)))
    half = intervals.half_width(stderr, freedom)
    return Interval(float(np.mean(values)), stderr, half, len(values), nonfinite)
