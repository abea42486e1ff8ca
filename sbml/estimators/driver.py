"""From an estimator to a number for every example, and to their mean with error bars.

A row belongs to one (sweep, example). The seed, the sweep and the example determine its random
draws. The draws of different sweeps are independent. Within one sweep of a bound, the times of all
examples may be points of one lattice, which are not independent. Sweep 0 covers all examples. There
are two kinds of estimates, which measure the noise of the draws in different ways:

    ode      -log p by an ODE. A subset of the examples is solved again with the draws of sweep 0
             and the ``estimate.reference`` solver; the difference measures the solver's error. If
             there are random draws, sweep 1 covers the subset too, and the differences between its
             two draws measure the noise.
    bound    an expectation over times. Every sweep covers all examples. The value of an example is
             its mean over R sweeps, and the spread of the sweeps' means m_r measures the noise:
             the standard error is sd(m_r) / sqrt(R). If a few rare draws decide the mean, the
             intervals are too narrow. Pareto's k shows this. It is computed twice, from the draws,
             each minus the median of its example, and from the weights of their times; the larger
             one counts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from sbml import bits, intervals, pytrees, times
from sbml.bound import Reduction
from sbml.estimate import Columns, Estimate, Ids, Values, reference
from sbml.estimators.base import Estimator, Rows, Target, times_key
from sbml.intervals import Interval
from sbml.ode import Solver
from sbml.progress import Bar
from sbml.scalars import Number
from sbml.types import Array

# The terms that only integer data have.
TERMS_OF_INTEGERS = ("dequantization", "importance", "scale")

# ``target_se`` may stop an estimate only after this number of sweeps. With 2 or 3 sweeps the
# standard error is often far too small by chance. In 4,000 trials that stopped there, 90% of the
# intervals contained the true value. With at least 8 sweeps, 93% did.
FIRST_SWEEPS = 8


@functools.cache
def _compiled(draw: Callable[..., Array]) -> Callable[..., Array]:
    return jax.jit(draw, static_argnums=(1, 2))


@dataclasses.dataclass(kw_only=True, eq=False)
class Driver:
    """The numbers of the examples ``ids`` of ``data`` by one estimator.

    Each call of :meth:`rows` computes its rows again. A subclass can override it to store the rows,
    and compute them by :meth:`batches`.

    Attributes:
      estimator, target: what is estimated.
      data: all examples, ``(n, *s)``.
      condition: for a conditional score, a pytree of arrays ``(n, ...)``; otherwise None.
      ids: the sorted indices in ``data`` of the examples that are evaluated.
      subset: the indices of those examples that are solved again.
      compute: a function of a batch of ``Rows``, points u and options that gives the columns of
        ``base.rows`` on the host.
      place: a function that puts a tree of arrays, split along their first axis, on the devices.
      seed: the seed of all random draws.
      batch_size: the number of examples that are computed at once.
      multiple: each batch is padded to a multiple of this number, as several devices need it.
      check: whether the subset is solved again, so that the errors are measured.
      progress: the title of the progress bars. If it is empty, there are no bars.
      shown: a function that maps ids and their numbers to the numbers whose mean a bar shows.
      solver, budget: how an ODE is solved, and the largest error of a solve that counts as
        converged.
      last: the time at which the ODE ends; None for T.
      reduction, draw, n_times: the variance reduction of a bound; how its points are drawn, a name
        in ``times.DRAWS``; and the number of points for one example in one sweep.
      sweeps: the number of sweeps of a bound.
      target_se, max_sweeps: if ``target_se`` is not 0, more sweeps follow while the standard error
        of the draws is larger than ``target_se``, until there are ``max_sweeps``.
    """

    estimator: Estimator
    target: Target
    data: np.ndarray
    ids: Ids
    subset: Integer[np.ndarray, " m"]
    compute: Callable[[Rows, Any, Solver | Reduction], dict[str, Any]]
    place: Callable[[Any], Any] = lambda tree: tree
    condition: Any = None
    seed: int = 0
    batch_size: int = 64
    multiple: int = 1
    check: bool = True
    progress: str = ""
    shown: Callable[[Ids, Values], Values] = lambda ids, values: values
    solver: Solver = Solver()
    budget: float = math.inf
    last: Number | None = None
    reduction: Reduction = Reduction()
    draw: str = "lattice"
    n_times: int = 1
    sweeps: int = 1
    target_se: float = 0.0
    max_sweeps: int = 0

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms whose sum is the number."""
        absent = TERMS_OF_INTEGERS if self.target.levels is None else ()
        return tuple(name for name in self.estimator.terms if name not in absent)

    def total(self, columns: Columns) -> Values:
        """The sum of the terms, ``(n,)``."""
        return np.sum([columns[name] for name in self.terms], axis=0)

    def points(self, sweep: int) -> np.ndarray:
        """The points u in [0, 1) ``(n, n_times)`` that give the times of one sweep of a bound."""
        key = times_key(self.seed, sweep)
        return np.asarray(_compiled(times.DRAWS[self.draw])(key, len(self.data), self.n_times))

    def rows(
        self, ids: Ids, sweep: int, solver: Solver | None = None, bar: Bar | None = None
    ) -> Columns:
        """The terms and ``nfe`` of ``ids`` in ``sweep``, each ``(n,)``, in the order of ``ids``.

        An ODE is solved by ``solver``, or by the driver's solver if it is None. The progress is
        shown by ``bar``, or by a new bar if it is None.
        """
        size = min(self.batch_size, -(-len(ids) // self.multiple) * self.multiple)
        with nullcontext(bar) if bar else self.bar(len(ids), sweep, solver) as bar:
            bar.show()
            batches = []
            for chosen, columns in self.batches(ids, sweep, solver or self.solver, size):
                batches.append(columns)
                bar.add(self.shown(chosen, self.total(columns)))
        return {name: np.concatenate([each[name] for each in batches]) for name in batches[0]}

    def bar(self, count: int, sweep: int = 0, solver: Solver | None = None, sweeps: int = 0) -> Bar:
        """A progress bar that shows the mean of the numbers so far.

        It counts ``count`` rows, which ``solver`` computes in ``sweep``. If ``sweeps`` is not 0, it
        counts as many rows in each of ``sweeps`` sweeps.
        """
        stricter = solver not in (None, self.solver)
        note = ", stricter solver" if stricter else ", new draws" if sweep else ""
        integers = self.target.levels is not None
        return Bar(
            self.progress and self.progress + note,
            "image" if integers else "example",
            count,
            quantity="bits/dim" if integers else "nats",
            times=max(1, sweeps),
            compiles=not note,  # Otherwise the function is compiled already.
            leave=not note,
            wait=sweeps > 0,
        )

    def batches(
        self, ids: Ids, sweep: int, solver: Solver, size: int
    ) -> Iterator[tuple[Ids, Columns]]:
        """The ids and columns of :meth:`rows`, computed batch by batch of ``size``.

        The columns are in float64, so that the terms add up to the total.
        """
        shape = self.data.shape[1:]
        scale = bits.nats_to_bits(self.estimator.scale_nats(self.target, shape), shape)
        options: Solver | Reduction = self.reduction if self.estimator.is_bound else solver
        points = self.points(sweep) if self.estimator.is_bound else None

        def batch(ids: Ids) -> dict[str, Any]:
            sweeps = np.full(len(ids), sweep, np.int32)
            u = None if points is None else points[ids].astype(jnp.result_type(float))
            condition = jax.tree.map(lambda leaf: leaf[ids], self.condition)
            parts = self.data[ids], ids.astype(np.int32), sweeps, u, condition
            data, places, sweeps, u, condition = self.place(parts)
            rows = Rows(data, places, sweeps, np.uint32(self.seed), condition)
            return self.compute(rows, u, options)

        for chosen, found in pytrees.in_batches(batch, ids, size):
            terms = {k: found[k].astype(np.float64) for k in self.terms if k != "scale"}
            scales = np.full(len(chosen), scale)
            own = {name: found[name].astype(np.float64) for name in self.estimator.columns}
            yield chosen, {**terms, "scale": scales, "nfe": found["nfe"].astype(np.int64), **own}

    def estimate(self) -> Estimate:
        """The numbers of all ``ids``, with error bars."""
        return self._by_sweeps() if self.estimator.is_bound else self._solved()

    def solver_error(self, values: Values | None = None) -> Interval:
        """The numbers by ``solver`` minus those by its reference: the mean over the subset.

        ``values`` are the numbers of the subset by ``solver``; None computes them. Both solves use
        the draws of sweep 0. The interval treats the subset as a sample of all examples. If there
        is only one example, the width of the interval is 0.
        """
        if values is None:
            values = self.total(self.rows(self.subset, 0, self.solver))
        exact = self.total(self.rows(self.subset, 0, reference(self.solver)))
        gap = intervals.mean_interval(values - exact)
        return gap._replace(stderr=0.0, ci95=0.0) if len(self.ids) == 1 else gap

    @property
    def draws(self) -> bool:
        """Whether the numbers depend on random draws, of probes or of a dequantizer."""
        return self.target.levels is not None or not self.estimator.exact

    def _solved(self) -> Estimate:
        columns = self.rows(self.ids, 0)
        values = self.total(columns)[np.isin(self.ids, self.subset)]
        noise = 0.0, float(len(self.subset))
        if self.draws:
            noise = math.inf, 0.0
            if self.check:
                again = self.total(self.rows(self.subset, 1))
                noise = intervals.repeated_stderr(values, again, len(self.ids))
        return self._estimate(
            [columns],
            noise,
            solver_error=self.solver_error(values) if self.check else None,
            budget=self.budget,
            solver=self.solver,
            prior_error=self.target.prior_error(np.asarray(self.data[self.ids]), self.last),
        )

    def _by_sweeps(self) -> Estimate:
        tables: list[Columns] = []
        needed = max(self.sweeps, min(FIRST_SWEEPS, self.max_sweeps) if self.target_se else 1)
        with self.bar(len(self.ids), sweeps=needed) as bar:
            while len(tables) < needed:
                tables.append(self.rows(self.ids, len(tables), bar=bar))
                if self.target_se and len(tables) == needed < self.max_sweeps:
                    ratio = self.sweep_stderr(tables) / self.target_se
                    if ratio > 1:  # The standard error falls as 1 / sqrt(sweeps).
                        needed = math.ceil(min(self.max_sweeps, max(needed + 1, needed * ratio**2)))
                        bar.times = needed
        return self.of_sweeps(tables)

    def of_sweeps(self, tables: Sequence[Columns]) -> Estimate:
        """The estimate of a bound from the rows of its sweeps: values and terms are means over the
        sweeps, and ``nfe`` are sums."""
        draws = np.array([self.total(table) for table in tables])
        tail = self.reduction.tail(self.target.sde, self.target.eps)
        return self._estimate(
            tables,
            (self.sweep_stderr(tables), len(tables) - 1),
            sweeps=len(tables),
            tail=float(np.fmax(tail, intervals.pareto_k(draws - np.median(draws, axis=0)))),
        )

    def sweep_stderr(self, tables: Sequence[Columns]) -> float:
        """sd(m_r) / sqrt(R), where m_r is the mean over all examples in sweep r of R.

        This is the standard error of the mean over sweeps. It is infinite for one sweep.
        """
        if len(tables) < 2:
            return math.inf
        means = [float(np.mean(self.total(table))) for table in tables]
        return float(np.std(means, ddof=1)) / math.sqrt(len(means))

    def _estimate(
        self, tables: Sequence[Columns], noise: tuple[float, float], **fields: Any
    ) -> Estimate:
        """The means of ``tables``, where ``noise`` is the standard error of the random draws and
        its degrees of freedom."""
        values = np.mean([self.total(table) for table in tables], axis=0)
        stderr, freedom = noise
        population = intervals.mean_interval(values)
        half = intervals.half_width(stderr, freedom)
        return Estimate(
            values=values,
            terms={name: np.mean([t[name] for t in tables], axis=0) for name in self.terms},
            unit="nats" if self.target.levels is None else "bits/dim",
            eps=float(self.target.eps),
            latent=tables[0].get("latent"),
            nfe=np.sum([table["nfe"] for table in tables], axis=0),
            population=population,
            this_set=Interval(
                float(np.mean(values)), stderr, half, len(values), population.nonfinite
            ),
            **fields,
        )
