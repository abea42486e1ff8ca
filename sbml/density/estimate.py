"""A number for every example, and the mean of these numbers with its error bars."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Num

from sbml.core.scalars import notation
from sbml.likelihood import PriorError, ode
from sbml.likelihood.ode import Solver
from sbml.statistics import intervals
from sbml.statistics.intervals import Interval

Ids = Integer[np.ndarray, "n"]
Values = Num[np.ndarray, "n"]
Columns = dict[str, Values]


@dataclasses.dataclass(frozen=True, repr=False)
class Estimate:
    """A number for every example, and the mean of these numbers with its error bars.

    Attributes:
      values: the numbers of the examples, ``(n,)``, in ``unit``.
      terms: the terms whose sum is ``values``, each ``(n,)``.
      unit: "nats" or "bits/dim".
      eps: the smallest time, at which the density is taken. Another eps gives other numbers.
      nfe: the number of evaluations of the score for each example, ``(n,)``.
      population: the mean of ``values`` with its 95% interval for the population from which the
        examples come; with a control variate (:meth:`with_control`) for a gap.
      this_set: the mean with its 95% interval for this set of examples. It contains the noise of
        the random draws only (probes, times and dequantization), so its width is 0 without draws.
      sweeps: the number of sweeps of a bound; 1 for an ODE.
      latent: for continuous data and an ODE, its solutions at T, ``(n, *s)``; otherwise None.
      solver_error: the mean difference from a solve by :func:`reference`, on a subset of the
        examples, with its 95% interval; None for a bound, which solves no ODE, and if it was not
        measured.
      budget: the largest solver error that counts as converged, in ``unit``.
      solver: how the ODE was solved; None for a bound.
      prior_error: the error that comes from using the prior in place of p_T, in ``unit``; None for
        a bound, which contains it.
      dequantization: how integers were dequantized, in words; "" for continuous data.
      target_se: the standard error of a bound's draws that was asked for; 0 for none.
      tail: ``intervals.pareto_k`` of the draws of a bound, or of the weights of their times if
        that is larger; nan for an ODE, and for few draws.
    """

    values: Values
    terms: Columns
    unit: str
    eps: float
    nfe: Values
    population: Interval
    this_set: Interval
    sweeps: int = 1
    latent: np.ndarray | None = None
    solver_error: Interval | None = None
    budget: float = math.inf
    solver: Solver | None = None
    prior_error: PriorError | None = None
    target_se: float = 0.0
    tail: float = math.nan
    dequantization: str = ""

    @property
    def mean(self) -> float:
        """The mean of ``population``."""
        return self.population.mean

    @property
    def converged(self) -> bool:
        """Whether all numbers of an ODE are finite and its solver's error is :func:`within` the
        budget; True for a bound, and False if the error was not measured."""
        error = self.solver_error
        if self.solver is None:
            return True
        known = error is not None and within(error, self.budget)
        return known and not self.population.nonfinite

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

    def with_term(self, name: str, term: Values) -> "Estimate":
        """The estimate with the known ``term (n,)`` added to the numbers, such as the
        log-determinant of a change of variables."""
        values = self.values + term
        shift = float(np.mean(term))
        return dataclasses.replace(
            self,
            values=values,
            terms={**self.terms, name: term},
            population=intervals.mean_interval(values),
            this_set=self.this_set._replace(mean=self.this_set.mean + shift),
        )

    def with_control(self, control: Values) -> "Estimate":
        """The estimate whose ``population`` is that of the numbers plus ``control (n,)``, which has
        the expectation 0, if this at least halves the interval; otherwise itself."""
        found = intervals.mean_interval(self.values + control, skewed=True)
        halved = found.ci95 <= 0.5 * self.population.ci95
        return dataclasses.replace(self, population=found) if halved else self

    def __repr__(self) -> str:
        text = line(self.row(), self.unit, "examples", self.dequantization)
        if self.solver is not None and self.solver_error is None:
            text += f", {self.unconverged()}"
        elif not self.converged:
            text += f", NOT CONVERGED: {self.unconverged()}"
        if self.heavy_tailed:
            text += f", {self._about_tail('')}"
        text += self.prior_error.line(self.unit) if self.prior_error else ""
        return "\n".join(filter(None, [text, self.about_outliers()]))

    def row(self, ids: Ids | None = None, section: str = "") -> dict[str, Any]:
        """The number as plain values, as a row of ``report.json``.

        The value is ``bits_per_dim``, or ``log_p`` in nats; errors are in the same unit. An
        ``interval`` has the ends of a 95% interval, of which ``ci95`` is half the width. ``terms``
        are means. ``prior_error_each`` is the approximate error for one example
        (``likelihood.PriorError``), and ``solver_images`` is the number of examples on which the
        solver's error was measured. A bound has ``sweeps``, ``target_se`` and ``tail`` in place of
        the solver's errors. A value that is not known is left out.

        Args:
          ids: the numbers of the examples in ``outliers``, ``(n,)``; None to count them from 0.
          section: as for :meth:`unconverged`.
        """
        values, population, this_set = self.values, self.population, self.this_set
        gap, without, prior = self.solver_error, self.without_outliers, self.prior_error
        ids = np.arange(len(values)) if ids is None else ids
        found = {
            "n": population.n,
            value_of(self.unit): population.mean,
            "stderr": population.stderr,
            "ci95": population.ci95,
            "interval": list(population.bounds),
            "this_set_stderr": this_set.stderr,
            "this_set_ci95": this_set.ci95,
            "this_set_interval": list(this_set.bounds),
            "converged": self.converged if gap else None,
            "solver_error": gap.mean if gap else None,
            "solver_error_ci95": gap.ci95 if gap else None,
            "solver_images": gap.n if gap else None,
            "unconverged": self.unconverged(section) or None if gap else None,
            "prior_error": prior.mean if prior else None,
            "prior_error_each": prior.each if prior else None,
            "sweeps": None if gap else self.sweeps,
            "tail": None if gap or math.isnan(self.tail) else self.tail,
            "target_se": None if gap else self.target_se,
            "nonfinite": population.nonfinite,
            "min": float(values.min()),
            "max": float(values.max()),
            "median": self.median,
            "outliers": [[int(ids[i]), float(values[i])] for i in self.outliers],
            "without_outliers": without and without.mean,
            "without_outliers_interval": without and list(without.bounds),
            "terms": {name: float(term.mean()) for name, term in self.terms.items()},
            "smallest_time": self.eps,
            "nfe_mean": float(self.nfe.mean()),
            "nfe_max": int(self.nfe.max()),
        }
        return {name: value for name, value in found.items() if value is not None}

    def warnings(self, section: str = "", names: Sequence[str] | None = None) -> list[str]:
        """Warnings about numbers that are not finite or outliers, draws with a heavy tail, a
        ``target_se`` that was not reached, and an ODE that did not converge.

        ``section`` is as for :meth:`unconverged`, and ``names`` are the names of the examples.
        """
        lost, stderr = self.population.nonfinite, self.this_set.stderr
        missed = ""
        if self.target_se and not stderr <= self.target_se:
            missed = (
                f"standard error {notation(stderr, '.2g')} after {self.sweeps} sweeps "
                f"({section}max_sweeps), above {section}target_se={notation(self.target_se)}"
            )
        found = [
            f"{lost} of {len(self.values)} numbers are not finite" if lost else "",
            self.about_outliers(names),
            self._about_tail(section) if self.heavy_tailed else "",
            missed,
            "" if self.converged else f"NOT CONVERGED: {self.unconverged(section)}",
        ]
        return list(filter(None, found))

    def _about_tail(self, section: str) -> str:
        about = intervals.about_tail(self.tail, "draws or of the weights of their times")
        remedy = (
            "raise times_each, or improve the score where it is least accurate, such as near eps"
        )
        if section:
            remedy = f"use the default of {section}importance_sampling, or raise {section}n_times"
        return f"HEAVY TAILS: {about}, so the intervals are too narrow; {remedy}"

    def about_outliers(self, names: Sequence[str] | None = None) -> str:
        """A line about the outliers, which may dominate the mean; "" if there are none.

        It names the first five by their ``names``, or else by their indices.
        """
        if (without := self.without_outliers) is None:
            return ""
        low, high = without.bounds
        shown = ", ".join(
            f"{names[i] if names else i} ({self.values[i]:z.3f})" for i in self.outliers[:5]
        )
        return (
            f"{len(self.outliers)} of {self.population.n} numbers are more than 6 robust standard "
            f"deviations from the median {self.median:z.4f}: {shown}. They are included in the "
            f"mean; without them it is {without.mean:z.4f} {self.unit}, 95% interval [{low:z.4f}, "
            f"{high:z.4f}]"
        )

    @property
    def outliers(self) -> Ids:
        """The indices of the outliers (``intervals.outliers``): first those of numbers that are not
        finite, then the others, the farthest from the median first."""
        found = intervals.outliers(self.values)
        distance = np.abs(self.values[found] - self.median)
        return found[np.argsort(-np.where(np.isfinite(distance), distance, np.inf), kind="stable")]

    @property
    def median(self) -> float:
        """The median of the finite numbers; NaN if there are none."""
        finite = self.values[np.isfinite(self.values)]
        return float(np.median(finite)) if len(finite) else math.nan

    @property
    def without_outliers(self) -> Interval | None:
        """The ``population`` without the outliers; None if no number or every number is one."""
        kept = np.delete(self.values, self.outliers)
        return intervals.mean_interval(kept) if 0 < len(kept) < len(self.values) else None

    def unconverged(self, section: str = "") -> str:
        """What is known of the solver's error, and the remedy; "" if the numbers have converged.

        ``section`` is put before the names of the settings, such as "eval.ode." for a config.
        """
        error, solver = self.solver_error, self.solver
        if solver is None or self.converged:
            return ""
        if error is None:
            return "the solver's error was not measured; leave out check=False"
        lost, tolerances = ~np.isfinite(self.values), f"{section}rtol and {section}atol"
        precision = jnp.finfo(jnp.result_type(float))
        rounding = float(precision.eps) * np.max(np.abs(self.values), initial=0.0, where=~lost)
        remedy = f"raise {section}max_steps={solver.max_steps}"
        advice = "give x in the scale of the score, or compute in float64 (jax_enable_x64)"
        if section:  # A command scales the images itself, and its checkpoints are in float32.
            advice = f"raise {section}solver_budget"
        too_large = (
            f"{precision.dtype} rounds the largest numbers by {notation(rounding, '.1g')}: {advice}"
        )
        if lost.any():
            most = int(np.max(self.nfe[lost]))
            known = (
                f"{lost.sum()} of {len(lost)} numbers are not finite, after up to {most} "
                "evaluations of the score"
            )
            remedy += (
                ", or leave out those that lie far outside the data: there the rounding of "
                f"{precision.dtype} looks like an error of every step"
            )
            if solver.fixed_steps is None and most < ode.most_evaluations(solver):
                remedy = (
                    "neither more steps nor other tolerances help, because the score is not "
                    "finite or changes too fast there"
                )
        elif error.nonfinite:
            strict = reference(solver)
            known = (
                f"a stricter solve (rtol={notation(strict.rtol, 'g')}, "
                f"atol={notation(strict.atol, 'g')}) gave up for "
                f"{error.nonfinite} of {error.n} numbers, so the solver's error is not known"
            )
            remedy = too_large if rounding > self.budget else remedy
        else:
            known, room = excess(error, self.budget), self.budget - abs(error.mean)
            if rounding > self.budget:
                remedy = too_large
            # The interval of a mean over all examples would be narrow enough.
            elif room > 0 and error.ci95 * math.sqrt(error.n / len(self.values)) <= room:
                needed = math.ceil(error.n * (error.ci95 / room) ** 2)
                remedy = f"raise {section}subset={error.n} to about {needed}"
            else:
                finer = solver.tighter(10)
                rtol, atol = (notation(value, ".2g") for value in (finer.rtol, finer.atol))
                flags = f"--config.{section}rtol={rtol} --config.{section}atol={atol}"
                flags = flags if section else f"solver=Solver(rtol={rtol}, atol={atol})"
                remedy = f"lower {tolerances}, as in {flags}"
        if solver.fixed_steps is not None and not error.nonfinite:
            remedy = f"raise {section}fixed_steps={solver.fixed_steps}"
        elif solver.rtol + solver.atol < precision.eps:
            remedy = f"raise {tolerances}, which are below the rounding of {precision.dtype}"
        return f"{known}; {remedy}"


def contradiction(by_ode: Estimate, bound: Estimate, most: float) -> str:
    """A warning if -log p by the ODE is significantly more than ``most`` above the ``bound`` of the
    same examples, or significantly more than ``most`` below it and four times that in the mean; ""
    if it is neither. ``by_ode`` is ``bits_per_dim``, or minus ``logp``.

    The bound is on the likelihood of the SDE, and the ODE has another one. With an accurate score
    the two are nearly equal, and the bound is the larger number. A score of 0, such as that of a
    network which takes each time for the first step, has a bound about 0.45 nats/dim above the ODE.
    """
    gap = intervals.mean_interval(by_ode.values - bound.values)
    above = f"{abs(gap.mean):.3f} +- {gap.ci95:.3f} {bound.unit} above"
    why = "the ODE and the SDE of this score have very different likelihoods, so the score is not"
    if gap.mean - gap.ci95 > most:
        return (
            f"the number of the ODE is {above} the bound: {why} accurate. Train longer, or report "
            "the bound"
        )
    if -gap.mean > max(4 * most, most + gap.ci95):
        return (
            f"the bound is {above} the number of the ODE: {why} accurate. Train longer, or check "
            "which times the network takes and what it predicts"
        )
    return ""


def value_of(unit: str) -> str:
    """The name of the value of a number in ``unit`` in its row."""
    return "bits_per_dim" if unit == "bits/dim" else "log_p"


def line(row: Mapping[str, Any], unit: str, examples: str, about: str = "", of: str = "") -> str:
    """The number of a ``row`` (:meth:`Estimate.row`) with its error bars, for a terminal.

    ``examples`` is what they are called; ``about`` stands after the unit and ``of`` after the time.
    """
    (low, high), own = row["interval"], row.get("this_set_ci95")
    at = f" at t={notation(row['smallest_time'], '.3g')}" if "smallest_time" in row else ""
    text = f"{row[value_of(unit)]:z.4f} {unit}{about}{at}{of}, "
    text += f"95% interval [{low:z.4f}, {high:z.4f}]"
    if own is not None:
        text += f", for these {examples} +-"
        text += f"{own:.4f}" if own < math.inf else " not measured"
    return f"{text}, n={row['n']}"


def within(gap: Interval, budget: float) -> bool:
    """Whether a solver's error is at most ``budget``: |mean| + half-width of its 95% interval.

    The half-width is included because errors of opposite signs cancel in the mean. If the error is
    not finite, the result is False.
    """
    return abs(gap.mean) + gap.ci95 <= budget


def excess(gap: Interval, budget: float) -> str:
    """What is known of a solver's error that is not :func:`within` the budget."""
    mean, half, most = (notation(v, ".3g") for v in (gap.mean, gap.ci95, abs(gap.mean) + gap.ci95))
    return (
        f"the solver's error is {mean} +- {half} on {gap.n} numbers, so up to {most}, above the "
        f"budget {notation(budget, 'g')}"
    )


# The largest tolerance of a reference solver. The solver's error at this tolerance is still larger
# than the rounding errors of float32.
STRICT = 2e-5


def reference(solver: Solver) -> Solver:
    """The solver whose results count as exact when the error of ``solver`` is measured.

    Its tolerances are a tenth of those of ``solver``, and at most ``STRICT``. If ``solver`` has
    fixed steps, they are a tenth of the default tolerances. It may take at least as many steps as
    ``solver``, and has its ``adjoint``. All other settings are defaults, so that an error which
    comes from the method, the coordinate or the first step of ``solver`` is seen: with the same
    settings, the reference would have the error too.
    """
    if solver.fixed_steps is not None:
        return Solver(adjoint=solver.adjoint).tighter(10)
    strict = solver.tighter(10)
    rtol, atol = min(strict.rtol, STRICT), min(strict.atol, STRICT)
    most = max(solver.max_steps, ode.MAX_STEPS)
    return Solver(rtol=rtol, atol=atol, max_steps=most, adjoint=solver.adjoint)
