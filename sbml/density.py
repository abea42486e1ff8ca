"""The density of data under a score: log-likelihoods, bounds, bits/dim, samples and latents.

    density = Density(score, sde, shape=(32, 32, 3), levels=256)

    density.bits_per_dim(pixels)   of integers, by the ODE with uniform dequantization
    density.logp(x)                log p_eps(x) of continuous data in nats, by the ODE
    density.bound(x)               the evidence bound on -log p(x) in nats
    density.sample(key, n)         n samples by the ODE
    density.latent(x)              the ODE's solution at T from x;  density.decode(z): the inverse

The first three return a number for each example and its mean with error bars
(:class:`~sbml.estimate.Estimate`). The random draws for an example depend only on ``seed``, on
the example's place in the data and, for ``bound``, on the number of examples. So a result depends
neither on the batch size nor on earlier calls.

A score with arrays among its leaves, such as ``jax.tree_util.Partial(f, params)`` or a module, is
compiled once for each method. Any other function is compiled in each call, because the weights that
it reads may have changed since the last one (``sbml.pytrees.as_argument``).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from sbml import bits, ode, pytrees, samplers
from sbml.dequantizers import uniform
from sbml.divergence import Trace, exact_batch
from sbml.door import checked, typed
from sbml.estimate import Estimate
from sbml.estimators import Reduction, Rows, Target, bound, rows
from sbml.estimators import ode as ode_estimator
from sbml.estimators.base import Estimator
from sbml.estimators.driver import Driver
from sbml.ode import Solver
from sbml.scalars import Count, Number, at_least, between
from sbml.sdes import SDE
from sbml.types import (
    Array,
    Batch,
    Example,
    Key,
    Keys,
    Score,
    check_function,
)

Sweeps = Annotated[int, at_least(2)]  # One gives no error bar.
Examples = Num[np.ndarray, "n *s"]


@typed
@dataclasses.dataclass(frozen=True)
class Density:
    """The density whose score at time t is ``score(x, t, key)``.

    Attributes:
      score: a score of one example (``sbml.types``); it is called without a key.
      sde: the forward process that the score belongs to.
      shape: the shape of one example.
      levels: the number of levels of integer data, for ``bits_per_dim`` and ``sample``; None for
        continuous data.
      eps: the smallest time; None for the SDE's ``smallest_time``.
      trace: how the divergence is computed; None for the exact trace up to 64 dimensions, and two
        Rademacher probes above.
      solver: how the ODE is solved. For ``logp`` and ``bits_per_dim`` the tolerances are at least
        1e-6 in float32, because a solve with a tenth of them measures the solver's error.
      batch_size: the number of examples that are computed at once.
      seed: the seed of all random draws, except those of ``sample``.
      budget: the largest solver error that counts as converged, in bits/dim or in nats per
        dimension; at most 1.
      subset: the number of examples for which the ODE is solved again: once with a stricter solver,
        to measure the solver's error, and once with new random draws, to measure their noise.

    Raises:
      ValueError: for an impossible shape or smallest time, an SDE of arrays, a score that cannot be
        called with ``x``, ``t`` and ``key``, or one that :func:`~sbml.score.from_prediction` made
        for another SDE.
    """

    score: Score
    sde: SDE
    shape: tuple[int, ...]
    levels: Annotated[int, between(2, bits.MOST_LEVELS)] | None = None
    eps: Number | None = None
    trace: Trace | None = None
    solver: Solver = Solver(rtol=2e-4, atol=2e-4)
    batch_size: Count = 64
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    budget: Annotated[float, between(0, 1)] = 1e-3  # Any error would be within one of infinity.
    subset: Count = 32

    def __post_init__(self) -> None:
        check_function(self.score, "score", "x", "t", "key")
        bits.dims(self.shape)
        if self.eps is not None:
            object.__setattr__(self, "eps", float(self.eps))  # An array is not hashable.
        try:
            hash(self.sde)
        except TypeError:
            raise ValueError(
                f"sde={self.sde} contains arrays or lists, so it cannot be a constant of compiled "
                "functions: give floats, as by jax.tree.map(float, sde), or tuples of floats"
            ) from None
        self.sde.check_time(self._eps)
        other: Any = getattr(self.score, "sde", None)
        if hasattr(other, "log_snr"):  # A score of other code may have another attribute "sde".
            self._check_sde_of_score(other)

    def _check_sde_of_score(self, other: SDE) -> None:
        """Raise a ValueError if ``other``, the SDE that the score was made for, is not ``sde``."""
        try:
            differs = other != self.sde
        except (TypeError, ValueError):  # As of an array of several numbers and a tuple.
            raise ValueError(
                f"the sde={other} of the score contains arrays, which cannot be compared with the "
                "numbers of Density's sde: give the score an SDE of floats or tuples of floats"
            ) from None
        if differs:
            raise ValueError(
                f"the score was made for sde={other}, and Density has sde={self.sde}: give both "
                "the same SDE"
            )

    @property
    def dims(self) -> int:
        """The number of dimensions of one example."""
        return bits.dims(self.shape)

    def logp(self, x: Any) -> Estimate:
        """log p_eps(x) in nats of ``x (n, *shape)``, by the probability-flow ODE.

        The terms are ``prior``, ``divergence`` and ``correction``, see ``likelihood.Likelihood``.
        The prior N(0, sde.prior_std^2 I) stands for p_T.

        Raises:
          ValueError: if ``x`` are not floating-point numbers of that shape, or the score computes
            in half precision, whose rounding errors the check of convergence does not see.
        """
        return -self._solve(self._continuous(x), Target(self.sde, self._eps), self.dims)

    def bits_per_dim(self, pixels: Any) -> Estimate:
        """Bits/dim of integers ``pixels (n, *shape)``, by the ODE and uniform dequantization.

        The score must belong to data x = 2 (k + u) / L - 1, where k is a pixel, L = ``levels`` and
        u is uniform in [0, 1). For an example of d dimensions

            bits/dim = (-log p_eps(x) + d log(L / 2)) / (d log 2),

        see ``sbml.bits``. The terms are those of the estimator ``ode``, see ``sbml.estimators``.

        Raises:
          ValueError: if ``pixels`` are not integers 0 .. levels - 1 of that shape, ``levels`` is
            None, or the score computes in half precision, as for ``logp``.
        """
        k, levels = self._integers(pixels)
        target = Target(self.sde, self._eps, levels, uniform.Model())
        return self._solve(k, target, 1)

    @checked
    def bound(self, x: Any, *, sweeps: Sweeps = 8, times_each: Count = 2) -> Estimate:
        """The evidence bound on -log p(x), in nats, of ``x (n, *shape)``.

        The terms are ``prior``, ``diffusion`` and ``reconstruction``, see ``sbml.bound``.

        Args:
          x: continuous data.
          sweeps: the number of independent passes over the data. The error bar of the random draws
            is estimated from the spread of their means.
          times_each: the number of draws of the diffusion term for one example in one sweep.

        Raises:
          ValueError: if ``x`` are not floating-point numbers of that shape.
        """
        x = self._continuous(x)
        how = {"sweeps": sweeps, "n_times": times_each}
        return self._driver(bound.Estimator(), Target(self.sde, self._eps), x, **how).estimate()

    @checked
    def sample(self, key: Key, n: Count) -> Examples:
        """``n`` samples ``(n, *shape)``: uint8 integers if there are ``levels``, else floats.

        Raises:
          ValueError: there are more than 256 levels, or a sample of integers is not finite, because
            the solver gave up.
        """
        if self.levels is not None:
            bits.check_levels(self.levels, 256)
        draw = self._compiled(_sample, "sde", "eps", "shape")
        keys = jax.random.split(key, n)
        x = self._in_batches(
            lambda ids: draw(keys[ids], self.solver, sde=self.sde, eps=self._eps, shape=self.shape),
            n,
        )
        if self.levels is None:
            return x
        if failed := int(np.sum(~np.isfinite(x).reshape(n, -1).all(axis=1))):
            raise ValueError(
                f"{failed} of {n} samples are not finite, with solver={self.solver}: give a solver "
                "with larger max_steps, or with another tolerance"
            )
        return np.asarray(bits.to_pixels(jnp.asarray(x), self.levels))

    def latent(self, x: Any) -> Examples:
        """The latents ``(n, *shape)``: the ODE's solutions at T from ``x`` at t = eps."""
        return self._transport(self._continuous(x), self._eps, self.sde.T)

    def decode(self, z: Any) -> Examples:
        """The data ``(n, *shape)`` at t = eps of latents ``z`` at T: the inverse of ``latent``."""
        return self._transport(self._continuous(z), self.sde.T, self._eps)

    @property
    def _eps(self) -> float:
        return self.sde.smallest_time if self.eps is None else float(self.eps)

    @property
    def _trace(self) -> Trace:
        if self.trace is not None:
            return self.trace
        return Trace("exact") if self.dims <= 64 else Trace("rademacher", 2)

    def _compiled(self, f: Callable[..., Any], *static: str) -> Callable[..., Any]:
        """``f`` with its first argument, the score, compiled; ``static`` are names of arguments."""
        argument = pytrees.as_argument(self.score)
        if argument is not None:
            return functools.partial(_jit(f, *static), argument)
        return jax.jit(functools.partial(f, self.score), static_argnames=static)

    def _continuous(self, x: Any) -> Examples:
        data = np.asarray(x)
        if not jnp.issubdtype(data.dtype, jnp.floating):
            raise ValueError(
                f"x is of {data.dtype}: give floating-point numbers in the scale of the score, or "
                "integers to bits_per_dim"
            )
        self._check_shape(data)
        data = data.astype(jnp.result_type(float))
        lost = np.flatnonzero(~np.isfinite(data).reshape(len(data), -1).all(axis=1))
        if len(lost):
            raise ValueError(
                f"{len(lost)} of {len(data)} examples have values that are NaN, infinite or too "
                f"large for {data.dtype}: leave them out. Their indices are {_some(lost)}"
            )
        return data

    def _integers(self, pixels: Any) -> tuple[Examples, int]:
        data = np.asarray(pixels)
        if self.levels is None:
            raise ValueError(
                "levels=None: bits/dim are defined for integers only; give Density the number of "
                "their levels"
            )
        bits.check_pixels(data, self.levels)
        self._check_shape(data)
        return data, self.levels

    def _check_shape(self, data: np.ndarray) -> None:
        if data.ndim == 0 or data.shape[1:] != self.shape or not len(data):
            expected = "".join(f", {size}" for size in self.shape)
            raise ValueError(f"data of shape {data.shape}: give (n{expected}) with n at least 1")

    def _driver(
        self, estimator: Estimator, target: Target, data: Examples, **options: Any
    ) -> Driver:
        compiled = self._compiled(_terms_of, "estimator", "target")
        size, n = self.batch_size, len(data)
        return Driver(
            estimator=estimator,
            target=target,
            data=data,
            ids=np.arange(n),
            subset=np.linspace(0, n - 1, min(n, self.subset)).astype(int),
            compute=functools.partial(compiled, estimator=estimator, target=target),
            seed=self.seed,
            batch_size=min(size, exact_batch(self.dims)) if estimator.exact else size,
            solver=self.solver,
            **options,
        )

    def _solve(self, data: Examples, target: Target, dims: int) -> Estimate:
        # A solve with a tenth of the tolerances measures the solver's error.
        ode.check_tolerances(self.solver, jnp.result_type(float), "solver.", factor=10)
        estimator = ode_estimator.Estimator(self._trace)
        return self._driver(estimator, target, data, budget=self.budget * dims).estimate()

    def _transport(self, x: Examples, t0: float, t1: float) -> Examples:
        solve = self._compiled(_transport, "sde", "t0", "t1")

        def batch(ids: np.ndarray) -> Batch:
            return solve(x[ids], self.solver, sde=self.sde, t0=t0, t1=t1)

        return self._in_batches(batch, len(x))

    def _in_batches(self, f: Callable[[np.ndarray], Batch], n: int) -> Examples:
        """The rows of ``f`` for the ids 0 .. n - 1, in float64."""
        batches = pytrees.in_batches(f, np.arange(n), min(self.batch_size, n))
        return np.concatenate([rows for _, rows in batches]).astype(np.float64)


def _some(indices: np.ndarray) -> str:
    """The first ten of ``indices`` as text."""
    shown = ", ".join(map(str, indices[:10]))
    return shown + (", ..." if len(indices) > 10 else "")


@functools.cache
def _jit(f: Callable[..., Any], *static: str) -> Callable[..., Any]:
    return jax.jit(f, static_argnames=static)


def _terms_of(
    score: Score,
    batch: Rows,
    u: Any,
    options: Solver | Reduction,
    *,
    estimator: Estimator,
    target: Target,
) -> dict[str, Num[Array, " n"]]:
    if not estimator.is_bound:
        ode.check_precision(score, target.sde, batch.data.shape[1:])
    # Without the compilation of ``rows`` itself, because ``score`` may be no argument of ``jit``.
    return inspect.unwrap(rows)(estimator, target, score, {}, batch, u, options)


def _sample(
    score: Score, keys: Keys, solver: Solver, *, sde: SDE, eps: float, shape: tuple[int, ...]
) -> Batch:
    def one(key: Key) -> Example:
        x, _ = samplers.ode_sample(
            score, sde, shape, key, eps=eps, solver=solver, denoise_last=True
        )
        return x

    return jax.vmap(one)(keys)


def _transport(score: Score, x: Batch, solver: Solver, *, sde: SDE, t0: float, t1: float) -> Batch:
    return jax.vmap(lambda x: ode.transport(score, sde, x, t0, t1, solver)[0])(x)
