"""The density of data under a score: log-likelihoods, bounds, bits/dim, samples and latents.

    density = Density(score, sde, shape=(32, 32, 3), levels=256)

    density.bits_per_dim(pixels)   of integers, by the ODE with uniform dequantization
    density.logp(x)                log p_eps(x) of continuous data in nats, by the ODE
    density.bound(x)               the evidence bound on -log p(x) in nats
    density.sample(key, n)         n samples by the ODE
    density.latent(x)              where the ODE carries x to;  density.decode(z): and back

Numbers come with their error bars (:class:`Estimate`). Draws are keyed by an example's place in the
data set, so neither the batch size nor the number of calls changes a result.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml import bits, bound, estimators, intervals, likelihood, ode, sampling, times
from sbml.dequantizers import uniform
from sbml.divergence import Trace, exact_batch
from sbml.intervals import Interval
from sbml.ode import Solver
from sbml.sdes import SDE
from sbml.types import Array, Key, Score

# Examples that are solved again, for the solver's error and the noise of the draws.
SUBSET = 32

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number for every example, and what its mean is worth.

    Attributes:
      values: of each example, ``(n,)``, in ``unit``.
      terms: the parts that add up to ``values``, each ``(n,)``.
      unit: "nats" or "bits/dim".
      nfe: evaluations of the score for each example, ``(n,)``.
      population: mean of ``values`` and its 95% interval for data like these.
      this_set_ci95: half-width of the 95% interval for these very examples: the noise of probes,
        times and dequantization. 0 where nothing is drawn.
      solver_error: mean difference to a solve with a tenth of the tolerances, on some examples;
        None for a bound, which solves no ODE.
      budget: the largest ``solver_error`` of a number that counts as converged.
    """

    values: np.ndarray
    terms: Columns
    unit: str
    nfe: np.ndarray
    population: Interval
    this_set_ci95: float
    solver_error: Interval | None = None
    budget: float = math.inf

    @property
    def converged(self) -> bool:
        """Whether the solver's error, its own 95% interval included, is within the budget."""
        gap = self.solver_error
        return gap is None or abs(gap.mean) + gap.ci95 <= self.budget

    def __str__(self) -> str:
        low, high = self.population.bounds
        mark = "" if self.converged else f", NOT CONVERGED: solver error {self.solver_error}"
        return (
            f"{self.population.mean:.4f} {self.unit}, 95% interval [{low:.4f}, {high:.4f}], for "
            f"these examples +-{self.this_set_ci95:.4f}, n={self.population.n}{mark}"
        )


@dataclasses.dataclass(frozen=True)
class Density:
    """The density whose score at time t is ``score(x, t, key)``.

    Attributes:
      score: a score of one example (``sbml.types``); it is called without a key.
      sde: the forward process that the score belongs to.
      shape: of one example.
      levels: of integer data, for ``bits_per_dim`` and ``sample``; None for continuous data.
      eps: the smallest time; None for the SDE's own.
      trace: how the divergence is computed; None for the exact trace up to 64 dimensions, and two
        Rademacher probes above.
      solver: of the ODE.
      batch_size: examples that are computed at once.
      seed: of all draws but those of ``sample``.
      budget: the largest solver error of a converged number, in the number's unit for each
        dimension: bits/dim, or nats per dimension.

    Raises:
      ValueError: a shape, levels, batch size or smallest time that cannot be, or an SDE of arrays.
    """

    score: Score
    sde: SDE
    shape: tuple[int, ...]
    levels: int | None = None
    eps: float | None = None
    trace: Trace | None = None
    solver: Solver = Solver(rtol=2e-4, atol=2e-4)
    batch_size: int = 64
    seed: int = 0
    budget: float = 1e-3

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise ValueError(f"shape={self.shape}: give the positive sizes of one example")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels={self.levels}: need at least 2, or None for continuous data")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: need at least 1")
        try:
            hash(self.sde)
        except TypeError:
            raise ValueError(
                f"sde={self.sde} is of arrays, which cannot be a constant of compiled functions: "
                "give jax.tree.map(float, sde)"
            ) from None
        self.sde.check_time(self._eps)

    @property
    def dims(self) -> int:
        """The number of dimensions of one example."""
        return math.prod(self.shape)

    def logp(self, x: Any) -> Estimate:
        """log p_eps(x) in nats of ``x (n, *shape)``, by the probability-flow ODE.

        Terms: ``prior``, ``divergence`` and ``correction``, see ``likelihood.Likelihood``. They
        belong to the prior N(0, s^2 I) at t = T, which stands for p_T.
        """
        x = self._continuous(x)

        def rows(ids: np.ndarray, sweep: int, solver: Solver) -> Columns:
            return _logp(
                *(self._partial, x[ids], ids, sweep, self.seed, solver),
                **{"sde": self.sde, "eps": self._eps, "trace": self._trace},
            )

        return self._solved(rows, len(x), "nats", ("prior", "divergence", "correction"), self.dims)

    def bits_per_dim(self, pixels: Any) -> Estimate:
        """Bits/dim of integers ``pixels (n, *shape)``, by the ODE and uniform dequantization.

        The score is of x = 2 (k + u) / levels - 1 with u in [0, 1), see ``sbml.bits``. Terms are
        those of the estimator ``ode``, see ``sbml.estimators``.
        """
        k, levels = self._integers(pixels)
        cell, eps = estimators.Cell("ode", "uniform"), self._eps
        fixed = {"dequantizer": uniform.Model(), "sde": self.sde, "levels": levels, "eps": eps}
        scale = estimators.scale(cell, self.sde, eps, False, self.shape, levels)

        def rows(ids: np.ndarray, sweep: int, solver: Solver) -> Columns:
            sweeps, seed = np.full(len(ids), sweep, np.int32), np.uint32(self.seed)
            found = estimators.ode(
                *(self._partial, {}, k[ids], ids, sweeps, seed, solver), **fixed, trace=self._trace
            )
            return {**found, "scale": np.full(len(ids), scale)}

        return self._solved(rows, len(k), "bits/dim", cell.terms, 1)

    def bound(self, x: Any, *, sweeps: int = 8, times_each: int = 2) -> Estimate:
        """The evidence bound on -log p(x), in nats, of ``x (n, *shape)``.

        Terms: ``prior``, ``diffusion`` and ``reconstruction``, see ``sbml.bound``.

        Args:
          x: continuous data.
          sweeps: independent passes over the data; the spread of their means is the noise.
          times_each: draws of the diffusion term for an example in one sweep.
        """
        x = self._continuous(x)
        names = ("prior", "diffusion", "reconstruction")
        if sweeps < 2 or times_each < 1:
            raise ValueError(
                f"sweeps={sweeps}, times_each={times_each}: need at least 2 sweeps, for an error "
                "bar, and 1 time"
            )

        def swept(sweep: int) -> Columns:
            key = jax.random.fold_in(jax.random.key(self.seed), sweep)
            u = np.asarray(times.lattice(key, len(x), times_each))

            def rows(ids: np.ndarray) -> Columns:
                fixed = {"sde": self.sde, "eps": self._eps}
                return _bound(self._partial, x[ids], ids, sweep, self.seed, u[ids], **fixed)

            return self._batched(rows, np.arange(len(x)))

        tables = [swept(sweep) for sweep in range(sweeps)]
        terms = {name: np.mean([t[name] for t in tables], axis=0) for name in names}
        values = np.sum([terms[name] for name in names], axis=0)
        means = [np.sum([t[name] for name in names]) / len(x) for t in tables]
        stderr = float(np.std(means, ddof=1)) / math.sqrt(sweeps)
        return Estimate(
            values=values,
            terms=terms,
            unit="nats",
            nfe=np.full(len(x), sweeps * (times_each + 1)),
            population=intervals.mean_interval(values),
            this_set_ci95=intervals.half_width(stderr, sweeps - 1),
        )

    def sample(self, key: Key, n: int) -> np.ndarray:
        """``n`` samples ``(n, *shape)``: integers if there are ``levels``, otherwise numbers."""
        if n < 1:
            raise ValueError(f"n={n}: draw at least one sample")
        keys = jax.random.split(key, n)
        rows = self._batched(
            lambda ids: {
                "x": _sample(
                    self._partial,
                    keys[ids],
                    self.solver,
                    sde=self.sde,
                    eps=self._eps,
                    shape=self.shape,
                )
            },
            np.arange(n),
        )
        if self.levels is None:
            return rows["x"]
        return np.asarray(bits.to_pixels(jnp.asarray(rows["x"]), self.levels))

    def latent(self, x: Any) -> np.ndarray:
        """Where the ODE carries ``x (n, *shape)`` from t = eps to T."""
        return self._carried(self._continuous(x), self._eps, self.sde.T)

    def decode(self, z: Any) -> np.ndarray:
        """Where the ODE carries ``z (n, *shape)`` from t = T to eps: the inverse of ``latent``."""
        return self._carried(self._continuous(z), self.sde.T, self._eps)

    @property
    def _eps(self) -> float:
        return self.sde.smallest_time if self.eps is None else self.eps

    @property
    def _trace(self) -> Trace:
        if self.trace is not None:
            return self.trace
        return Trace("exact") if self.dims <= 64 else Trace("rademacher", 2)

    @property
    def _partial(self) -> Score:
        """The score as a pytree that ``jit`` knows again."""
        plain = jax.tree_util.all_leaves([self.score])
        return jax.tree_util.Partial(self.score) if plain else self.score

    def _continuous(self, x: Any) -> np.ndarray:
        found = np.asarray(x)
        if not np.issubdtype(found.dtype, np.floating):
            raise ValueError(
                f"x is of {found.dtype}: give floating-point numbers in the scale of the score, or "
                "integers to bits_per_dim"
            )
        return self._shaped(found)

    def _integers(self, pixels: Any) -> tuple[np.ndarray, int]:
        found = np.asarray(pixels)
        if self.levels is None:
            raise ValueError("bits/dim are of integers: give Density the number of their levels")
        if not np.issubdtype(found.dtype, np.integer):
            raise ValueError(f"pixels are of {found.dtype}: give integers 0 .. {self.levels - 1}")
        found = self._shaped(found)
        if found.min() < 0 or found.max() >= self.levels:
            raise ValueError(
                f"pixels lie in {found.min()} .. {found.max()}: give integers 0 .. "
                f"{self.levels - 1}, or another number of levels"
            )
        return found, self.levels

    def _shaped(self, found: np.ndarray) -> np.ndarray:
        if found.shape[1:] != self.shape or not len(found):
            raise ValueError(
                f"data of shape {found.shape}: give (n, {', '.join(map(str, self.shape))}) with n "
                "at least 1"
            )
        return found

    def _solved(
        self,
        rows: Callable[[np.ndarray, int, Solver], Columns],
        n: int,
        unit: str,
        names: tuple[str, ...],
        dims: int,
    ) -> Estimate:
        """All examples by the ODE; some again, by other draws and by smaller tolerances."""
        some = np.unique(np.linspace(0, n - 1, min(n, SUBSET)).astype(int))

        def table(ids: np.ndarray, sweep: int, solver: Solver) -> Columns:
            return self._batched(lambda ids: rows(ids, sweep, solver), ids)

        def total(columns: Columns) -> np.ndarray:
            return np.sum([columns[name] for name in names], axis=0)

        found = table(np.arange(n), 0, self.solver)
        values = total(found)
        strict = total(table(some, 0, self.solver.tighter(10)))
        again = total(table(some, 1, self.solver))
        stderr, freedom = intervals.repeated_stderr(values[some], again, n)
        return Estimate(
            values=values,
            terms={name: found[name] for name in names},
            unit=unit,
            nfe=found["nfe"].astype(int),
            population=intervals.mean_interval(values),
            this_set_ci95=intervals.half_width(stderr, freedom),
            solver_error=intervals.mean_interval(values[some] - strict),
            budget=self.budget * dims,
        )

    def _carried(self, x: np.ndarray, t0: float, t1: float) -> np.ndarray:
        def rows(ids: np.ndarray) -> Columns:
            return {"x": _carry(self._partial, x[ids], self.solver, sde=self.sde, t0=t0, t1=t1)}

        return self._batched(rows, np.arange(len(x)))["x"]

    def _batched(self, rows: Callable[[np.ndarray], Any], ids: np.ndarray) -> Columns:
        """The columns of ``rows`` for all ``ids``, some at a time; the last batch is padded."""
        size = min(self.batch_size, len(ids))
        if self._trace.kind == "exact":
            size = min(size, exact_batch(self.dims))
        parts = []
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            padded = np.concatenate([batch, np.full(size - len(batch), batch[0])])
            found = jax.device_get(rows(padded.astype(np.int32)))
            parts.append({name: np.asarray(v)[: len(batch)] for name, v in found.items()})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {
            name: column.astype(np.float64) if np.issubdtype(column.dtype, np.floating) else column
            for name, column in columns.items()
        }


def _jit(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda f: jax.jit(f, static_argnames=static)


@_jit("sde", "eps", "trace")
def _logp(
    score: Score,
    x: Array,
    ids: Array,
    sweep: Array,
    seed: Array,
    solver: Solver,
    *,
    sde: SDE,
    eps: float,
    trace: Trace,
) -> Columns:
    def one(x: Array, i: Array) -> Columns:
        key = estimators.draw_key(seed, sweep, i)
        found = likelihood.ode_logp(score, sde, x, key, eps=eps, trace=trace, solver=solver)
        terms = {name: getattr(found, name) for name in ("prior", "divergence", "correction")}
        return {**terms, "nfe": found.stats.nfe}

    return jax.vmap(one)(x, ids)


@_jit("sde", "eps")
def _bound(
    score: Score, x: Array, ids: Array, sweep: Array, seed: Array, u: Array, *, sde: SDE, eps: float
) -> Columns:
    def one(x: Array, i: Array, u: Array) -> Columns:
        key = estimators.draw_key(seed, sweep, i)
        return bound.elbo(score, sde, x, key, eps=eps, u=u)._asdict()

    return jax.vmap(one)(x, ids, u.astype(x.dtype))


@_jit("sde", "eps", "shape")
def _sample(
    score: Score, keys: Key, solver: Solver, *, sde: SDE, eps: float, shape: tuple[int, ...]
) -> Array:
    def one(key: Key) -> Array:
        x, _ = sampling.ode_sample(
            score, sde, shape, key, eps=eps, solver=solver, denoise_last=True
        )
        return x

    return jax.vmap(one)(keys)


@_jit("sde", "t0", "t1")
def _carry(score: Score, x: Array, solver: Solver, *, sde: SDE, t0: float, t1: float) -> Array:
    return jax.vmap(lambda x: ode.transport(score, sde, x, t0, t1, solver)[0])(x)
