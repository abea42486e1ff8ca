"""A measurement: a number for every example, and their mean with error bars.

A measurement has an estimator, a density, data, and a store of rows. A row belongs to one (sweep,
example). The seed, the sweep and the example determine its random draws. The draws of different
sweeps are independent. Within one sweep of a bound, the times of all examples may be points of one
lattice, which are not independent. Sweep 0 covers all examples. There are two kinds of estimates,
which measure the noise of the draws in different ways:

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

Evaluation, validation, classifier, the bound of the codec and ``Density`` are measurements with
other arguments, whose error bars are made here. A posterior and importance weights are functions of
several solves, so ``sbml.posterior`` makes theirs of the solves of this file.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from sbml.core import bits, fingerprint, pytrees, streams
from sbml.core.progress import Bar
from sbml.core.scalars import Number
from sbml.density.estimate import Columns, Estimate, Ids, Values, reference
from sbml.density.estimators.base import Estimator, Rows, Target
from sbml.likelihood.ode import Solver
from sbml.statistics import intervals
from sbml.statistics.intervals import Interval

# The terms that only integer data have.
TERMS_OF_INTEGERS = ("dequantization", "importance", "scale")

# ``target_se`` may stop an estimate only after this number of sweeps. With 2 or 3 sweeps the
# standard error is often far too small by chance. In 4,000 trials that stopped there, 90% of the
# intervals contained the true value. With at least 8 sweeps, 93% did.
FIRST_SWEEPS = 8


class Store(Protocol):
    """Rows that are kept, by (sweep, example)."""

    def read(self, sweep: int) -> Columns:
        """The rows of ``sweep``, sorted by ``id``; {} if there are none."""

    def write(self, columns: Columns) -> None:
        """Add rows; the columns ``sweep`` and ``id`` identify a row."""

    def flush(self) -> None:
        """Make all rows readable by all processes."""


class Memory:
    """A ``Store`` of rows in memory."""

    def __init__(self) -> None:
        self._tables: dict[int, list[Columns]] = {}

    def read(self, sweep: int) -> Columns:
        tables = self._tables.get(sweep, [])
        if not tables:
            return {}
        table = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
        order = np.argsort(table["id"], kind="stable")
        return {name: column[order] for name, column in table.items()}

    def write(self, columns: Columns) -> None:
        self._tables.setdefault(int(columns["sweep"][0]), []).append(columns)

    def flush(self) -> None:
        """They are readable at once."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Measurement:
    """The numbers of the examples ``ids`` of ``data`` by one estimator.

    Attributes:
      estimator, target: what is estimated.
      data: all examples, ``(n, *s)``.
      condition: for a conditional score, a pytree of arrays ``(n, ...)``; otherwise None.
      ids: the sorted indices in ``data`` of the examples that are evaluated.
      subset: the indices of those examples that are solved again.
      compute: a function of an estimator, a batch of ``Rows`` and points u that gives the columns
        of ``base.rows``.
      place: a function that puts a tree of arrays, split along their first axis, on the devices.
      gather: a function that brings the columns of ``compute`` to the host.
      store: a function of a fingerprint that gives the store of the rows with this fingerprint;
        None to keep the rows in memory.
      about: what the rows depend on apart from the estimator, the target, the seed and the
        condition, as plain JSON values: the score with its parameters, and the data.
      seed: the seed of all random draws.
      batch_size: the number of examples that are computed at once.
      multiple: each batch is padded to a multiple of this number: the number of devices, or the
        batch size, so that few rows need no program of their own.
      check: whether the subset is solved again, so that the errors are measured.
      progress: the title of the progress bars. If it is empty, there are no bars.
      shown: a function that maps ids and their numbers to the numbers whose mean a bar shows.
      budget: the largest error of a solve that counts as converged.
      last: the time at which the ODE ends; None for T.
      sweeps: the number of sweeps of a bound.
      target_se, max_sweeps: if ``target_se`` is not 0, more sweeps follow while the standard error
        of the draws is larger than ``target_se``, until there are ``max_sweeps``.
    """

    estimator: Estimator
    target: Target
    data: np.ndarray
    ids: Ids
    subset: Integer[np.ndarray, " m"]
    compute: Callable[[Estimator, Rows, Any], dict[str, Any]]
    place: Callable[[Any], Any] = lambda tree: tree
    gather: Callable[[Any], Any] = lambda tree: tree
    store: Callable[[dict[str, Any]], Store] | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    condition: Any = None
    seed: int = 0
    batch_size: int = 64
    multiple: int = 1
    check: bool = True
    progress: str = ""
    shown: Callable[[Ids, Values], Values] = lambda ids, values: values
    budget: float = math.inf
    last: Number | None = None
    sweeps: int = 1
    target_se: float = 0.0
    max_sweeps: int = 0

    def __post_init__(self) -> None:
        self._stores: dict[Solver | None, Store] = {}

    @property
    def solver(self) -> Solver | None:
        """The solver of the estimator; None if it solves no ODE."""
        return getattr(self.estimator, "solver", None)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms whose sum is the number."""
        absent = TERMS_OF_INTEGERS if self.target.levels is None else ()
        return tuple(name for name in self.estimator.terms if name not in absent)

    def total(self, columns: Columns) -> Values:
        """The sum of the terms, ``(n,)``."""
        return np.sum([columns[name] for name in self.terms], axis=0)

    def fingerprint(self, solver: Solver | None = None) -> dict[str, Any]:
        """Everything that a row depends on, as plain JSON values. The batch size and the numbers of
        examples and sweeps do not change a row."""
        return {
            "estimator": fingerprint.of(self._with(solver)),
            "terms": list(self.terms),
            "target": fingerprint.of(self.target),
            "condition": fingerprint.of(self.condition),
            "seed": self.seed,
            "streams": streams.VERSION,
            "precision": jax.config.jax_default_matmul_precision,
            **self.about,
        }

    def _with(self, solver: Solver | None) -> Estimator:
        """The estimator with another solver; with its own if ``solver`` is None."""
        options: dict[str, Any] = {} if solver is None else {"solver": solver}
        return dataclasses.replace(self.estimator, **options)

    def stored(self, solver: Solver | None = None) -> Store:
        """The store of the rows by ``solver``, or by the estimator's own if it is None."""
        solver = solver or self.solver
        if solver not in self._stores:  # Kept, because checksums of parameters take time.
            store = self.store
            self._stores[solver] = store(self.fingerprint(solver)) if store else Memory()
        return self._stores[solver]

    def rows(
        self, ids: Ids, sweep: int = 0, solver: Solver | None = None, bar: Bar | None = None
    ) -> Columns:
        """The rows of ``ids (n,)`` in ``sweep``, sorted by id: the columns ``id``, ``sweep``,
        ``nfe`` and the terms, each ``(n,)``. Rows that are not in the store are computed.

        An ODE is solved by ``solver``, or by the estimator's solver if it is None. The progress is
        shown by ``bar``, or by a new bar if it is None.
        """
        store = self.stored(solver)
        found, entered = store.read(sweep), bar
        bar = bar or self.bar(len(ids), sweep, solver)
        if found:
            known = {name: column[np.isin(found["id"], ids)] for name, column in found.items()}
            bar.add(self.shown(known["id"], self.total(known)), stored=True)
        missing = np.setdiff1d(ids, found.get("id", []))
        if missing.size:
            size = min(self.batch_size, -(-len(ids) // self.multiple) * self.multiple)
            with nullcontext() if entered else bar:
                bar.show()
                for chosen, columns in self.batches(missing, sweep, solver, size):
                    store.write({"id": chosen, "sweep": np.full_like(chosen, sweep), **columns})
                    bar.add(self.shown(chosen, self.total(columns)))
            store.flush()
            found = store.read(sweep)
        return {name: column[np.isin(found["id"], ids)] for name, column in found.items()}

    def bar(self, count: int, sweep: int = 0, solver: Solver | None = None) -> Bar:
        """A progress bar of ``count`` rows, which ``solver`` computes in ``sweep``; it shows the
        mean of the numbers so far."""
        stricter = solver not in (None, self.solver)
        note = ", stricter solver" if stricter else ", new draws" if sweep else ""
        integers = self.target.levels is not None
        return Bar(
            self.progress and self.progress + note,
            "image" if integers else "example",
            count,
            quantity="bits/dim" if integers else "nats",
            compiles=not note,  # Otherwise the function is compiled already.
            leave=not note,
        )

    def batches(
        self, ids: Ids, sweep: int, solver: Solver | None, size: int
    ) -> Iterator[tuple[Ids, Columns]]:
        """The ids and columns of :meth:`rows`, computed batch by batch of ``size``.

        The columns are in float64, so that the terms add up to the total.
        """
        shape = self.data.shape[1:]
        scale = bits.nats_to_bits(self.estimator.scale_nats(self.target, shape), shape)
        estimator = self._with(solver)
        points = estimator.points(self.seed, sweep, len(self.data))

        def batch(ids: Ids) -> dict[str, Any]:
            sweeps = np.full(len(ids), sweep, np.int32)
            u = None if points is None else points[ids].astype(jnp.result_type(float))
            condition = jax.tree.map(lambda leaf: leaf[ids], self.condition)
            parts = self.data[ids], ids.astype(np.int32), sweeps, u, condition
            data, places, sweeps, u, condition = self.place(parts)
            rows = Rows(data, places, sweeps, np.uint32(self.seed), condition)
            found: dict[str, Any] = self.gather(self.compute(estimator, rows, u))
            return found

        for chosen, found in pytrees.in_batches(batch, ids, size):
            terms = {k: found[k].astype(np.float64) for k in self.terms if k != "scale"}
            scales = np.full(len(chosen), scale)
            own = {name: found[name].astype(np.float64) for name in self.estimator.columns}
            yield chosen, {**terms, "scale": scales, "nfe": found["nfe"].astype(np.int64), **own}

    def estimate(self) -> Estimate:
        """The numbers of all ``ids``, with error bars."""
        return self._by_sweeps() if self.estimator.is_bound else self._solved()

    @property
    def draws(self) -> bool:
        """Whether the numbers depend on random draws, of probes or of a dequantizer."""
        return self.target.levels is not None or not self.estimator.exact

    def solves(self) -> tuple[Columns, Values, Values | None, Values | None]:
        """Rows and numbers of all ``ids`` by an ODE, and those of the subset that measure errors.

        Returns:
          The columns of the rows; the numbers ``(n,)``; those of the subset ``(m,)`` by the
          ``estimate.reference`` solver, with the draws of sweep 0, or None if they are not measured
          or the estimator has no solver; and those of the subset with new draws ``(m,)``, or None
          without a check or without draws.
        """
        columns = self.rows(self.ids)
        again = strict = None
        if self.check and self.draws:
            again = self.total(self.rows(self.subset, 1))
        if self.check and self.solver is not None:
            strict = self.total(self.rows(self.subset, 0, reference(self.solver)))
        return columns, self.total(columns), strict, again

    def solver_error(self) -> Interval:
        """The numbers by the solver minus those by its reference: the mean over the subset.

        Both solves use the draws of sweep 0. The interval treats the subset as a sample of all
        examples. If there is only one example, the width of the interval is 0.
        """
        assert self.solver is not None
        strict = self.total(self.rows(self.subset, 0, reference(self.solver)))
        return self._solver_error(self.total(self.rows(self.subset)), strict)

    def _solver_error(self, values: Values, exact: Values) -> Interval:
        gap = intervals.mean_interval(values - exact)
        return gap._replace(stderr=0.0, ci95=0.0) if len(self.ids) == 1 else gap

    def _solved(self) -> Estimate:
        columns, values, strict, again = self.solves()
        values = values[np.isin(self.ids, self.subset)]
        noise = math.inf, 0.0
        if again is not None:
            noise = intervals.repeated_stderr(values, again, len(self.ids))
        elif not self.draws:
            noise = 0.0, float(len(self.subset))
        own: dict[str, Any] = {}
        if self.solver is not None:
            own = {
                "solver_error": None if strict is None else self._solver_error(values, strict),
                "budget": self.budget,
                "solver": self.solver,
                "prior_error": self.target.prior_error(np.asarray(self.data[self.ids]), self.last),
            }
        return self._estimate([columns], noise, **own)

    def _by_sweeps(self) -> Estimate:
        tables: list[Columns] = []
        needed = max(self.sweeps, min(FIRST_SWEEPS, self.max_sweeps) if self.target_se else 1)
        with closing(self.bar(len(self.ids) * needed)) as bar:
            while len(tables) < needed:
                tables.append(self.rows(self.ids, len(tables), bar=bar))
                if self.target_se and len(tables) == needed < self.max_sweeps:
                    ratio = self.sweep_stderr(tables) / self.target_se
                    if ratio > 1:  # The standard error falls as 1 / sqrt(sweeps).
                        needed = math.ceil(min(self.max_sweeps, max(needed + 1, needed * ratio**2)))
                        bar.total = len(self.ids) * needed
        return self.of_sweeps(tables)

    def of_sweeps(self, tables: Sequence[Columns]) -> Estimate:
        """The estimate of a bound from the rows of its sweeps: values and terms are means over the
        sweeps, and ``nfe`` are sums."""
        draws = np.array([self.total(table) for table in tables])
        tail = self.estimator.tail(self.target)
        return self._estimate(
            tables,
            (self.sweep_stderr(tables), len(tables) - 1),
            sweeps=len(tables),
            target_se=self.target_se,
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
        its degrees of freedom. Its interval is at most the population's, which covers it too."""
        values = np.mean([self.total(table) for table in tables], axis=0)
        stderr, freedom = noise
        population = intervals.mean_interval(values)
        half = intervals.half_width(stderr, freedom)
        half = min(half, population.ci95) if half < math.inf else half
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
