"""The base class of estimators, and the function that computes their terms for a batch.

    bits/dim = sum of the named terms of one example / (d log 2)

The key of every random draw for an example depends on (seed, sweep, id of the example) only. So its
terms depend neither on the batch nor on the order of the examples.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Integer, Num

from sbml import likelihood
from sbml.core import bits
from sbml.core.pytrees import Static, mapped
from sbml.core.scalars import Number
from sbml.core.streams import stream
from sbml.core.types import (
    AnyArray,
    Array,
    Example,
    Key,
    Keys,
    PyTree,
    Scalar,
    Score,
    Vector,
    conditioned,
)
from sbml.likelihood import PriorError
from sbml.likelihood.ode import check_precision
from sbml.sdes import SDE
from sbml.statistics import moments

Evaluations = Integer[Array, ""] | int  # of the score
Points = Vector | None  # a row of ``Estimator.points``
OneExample = Num[Array, "*s"]  # one example of integers or, without levels, of real numbers


@dataclasses.dataclass(frozen=True)
class Target:
    """The quantity that is estimated: -log p_eps of continuous data, or of dequantized integers.

    It is hashable, so it can be static under ``jit``.

    Attributes:
      sde: the forward process of the score.
      eps: the smallest time.
      levels: the number of levels L of integer data; None for continuous data x, which are used
        unchanged.
      dequantizer: a ``Model`` of ``sbml.dequantizers``, for integers.
    """

    sde: SDE
    eps: Number
    levels: int | None = None
    dequantizer: Any = None

    def sample(self, params: PyTree, data: OneExample, key: Key | None) -> tuple[Example, Scalar]:
        """One example x ``(*s)``, in the scale of the score at eps, and log q(u) in nats; ``key``
        may be None for continuous data."""
        if self.levels is None:
            return data, jnp.zeros((), data.dtype)
        u, log_q = self.dequantizer.sample(params, data, key)
        x = bits.to_model(data, u, self.levels)
        if self.dequantizer.at_noise:
            x = self.sde.mean_coef(jnp.asarray(self.eps)) * x
        return x, log_q

    def prior_error(
        self, data: np.ndarray, last: Number | None, weights: np.ndarray | None = None
    ) -> PriorError:
        """The error of the ODE's number because the prior takes the place of p_T, from the mean and
        the variances of ``data (n, *s)``; in bits/dim for integers, and otherwise in nats.

        The ODE ends at ``last``; None for T. The examples have ``weights (n,)``; None if equal.
        """
        mean = moments.mean(data, weights)
        variances = moments.variances(data, mean, weights)
        if self.levels is None:
            return likelihood.prior_error(self.sde, mean, variances, last)
        mean = np.asarray(bits.to_model(jnp.asarray(mean), 0.5, self.levels))
        variances = (2 / self.levels) ** 2 * (variances + 1 / 12)
        nats = likelihood.prior_error(self.sde, mean, variances, last)
        return PriorError(*(bits.nats_to_bits(each, data.shape[1:]) for each in nats))

    def scale_nats(self, shape: tuple[int, ...]) -> float:
        """The nats that the change of variables from x to k + u adds to -log p(x)."""
        if self.levels is None:
            return 0.0
        nats = bits.scale_nats(shape, self.levels)
        if self.dequantizer.at_noise:
            nats -= math.prod(shape) * math.log(float(self.sde.mean_coef(jnp.asarray(self.eps))))
        return nats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The examples of a batch, and the numbers that determine the keys of their random draws.

    The fields are arrays, or only their shapes where a program is compiled ahead of time.

    Attributes:
      data: ``(n, *s)`` integers, or real numbers if the target has no levels.
      ids: ``(n,)``, a number for each example that does not depend on its place in the batch.
      sweeps: ``(n,)``, the number of the sweep: an example has independent draws in each sweep.
      seed: ``()``, the seed of all draws.
      condition: for a conditional score, a pytree of arrays ``(n, ...)``; otherwise None.
    """

    data: Any
    ids: Any
    sweeps: Any
    seed: Any
    condition: PyTree = None

    def keys(self) -> Keys:
        """A key for each row, ``(n,)``."""
        return jax.vmap(functools.partial(draw_key, self.seed))(self.sweeps, self.ids)


def draw_key(seed: ArrayLike, sweep: ArrayLike, i: ArrayLike) -> Key:
    """The key of all draws of example ``i`` in one sweep, except for the points u of a bound."""
    key = stream(jax.random.key(seed), "evaluation")
    return jax.random.fold_in(jax.random.fold_in(key, sweep), i)


def times_key(seed: ArrayLike, sweep: ArrayLike) -> Key:
    """The key of the points u of all examples in one sweep of a bound."""
    return jax.random.fold_in(stream(jax.random.key(seed), "sweep times"), sweep)


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """A sum of named terms that estimates, or bounds from above, -log p of one example.

    A subclass is a frozen dataclass with a default for each field. It is a pytree: its fields are
    static under ``jit``, except for dataclasses with arrays or numbers of their own, such as a
    ``Solver``. It may have these fields, which an evaluation sets by name:

        trace           how a divergence is computed, ``sbml.divergence.Trace``
        num_importance  K, the number of draws of the dequantizer in one logarithm
        solver          how an ODE is solved, ``sbml.ode.Solver``; its error is then measured
        n_times, draw   the number of times of an expectation for one example in one sweep, and how
                        their points are drawn, a name in ``times.DRAWS``
        reduction       how the variance of an expectation is reduced, ``sbml.bound.Reduction``

    Attributes:
      terms: the names of its terms; ``scale`` is added by the caller, in float64.
      columns: the names of further numbers that it computes, which are not terms.
      is_bound: whether it is an expectation over times, which is estimated by independent sweeps
        over the data set. Their spread gives its error bar.
      reducible: whether its ``reduction`` may have a control and a density.
    """

    terms: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]] = ()
    is_bound: ClassVar[bool]
    reducible: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))

    @property
    def exact(self) -> bool:
        """Whether its trace is exact, which needs memory for many tangents of one example."""
        trace = getattr(self, "trace", None)
        return trace is not None and trace.kind == "exact"

    @classmethod
    def reason_undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        """The reason why this kind of dequantizer gives no number, or "" if it gives one."""
        return ""

    @abc.abstractmethod
    def one(
        self, score: Score, params: PyTree, data: OneExample, key: Key, u: Points, target: Target
    ) -> tuple[dict[str, Scalar], Evaluations]:
        """The terms ``()`` in nats of one example, without ``scale``, and the score evaluations.

        Args:
          score: a score of one example.
          params: the parameters of the dequantizer.
          data: one example ``(*s)``.
          key: for all its random draws.
          u: the row of ``points`` of this example, or None.
          target: the quantity that is estimated.
        """

    def scale_nats(self, target: Target, shape: tuple[int, ...]) -> float:
        """The term ``scale`` in nats: that of the change from pixels to x (``sbml.estimators``)."""
        return target.scale_nats(shape)

    def points(self, seed: int, sweep: int, n: int) -> np.ndarray | None:
        """Points in [0, 1), ``(n, draws)``, which ``n`` examples share in one sweep; or None."""
        return None

    def tail(self, target: Target) -> float:
        """Pareto's k of the weights of its times, which no draw shows; nan if they are equal."""
        return math.nan

    def check(self, score: Score, sde: SDE, shape: tuple[int, ...]) -> None:
        """Raise a ValueError if it solves an ODE, and ``score`` computes in half precision."""
        if hasattr(self, "solver"):
            check_precision(score, sde, shape)


def _flatten(estimator: Estimator) -> tuple[tuple[PyTree, ...], Static]:
    values = {f.name: getattr(estimator, f.name) for f in dataclasses.fields(estimator)}
    nodes = {name: v for name, v in values.items() if _is_node(v)}
    rest = tuple((name, v) for name, v in values.items() if name not in nodes)
    return tuple(nodes.values()), (tuple(nodes), rest)


def _unflatten(cls: type[Estimator], static: Static, nodes: Iterable[PyTree]) -> Estimator:
    estimator: Estimator = object.__new__(cls)
    for name, value in (*zip(static[0], nodes, strict=True), *static[1]):
        object.__setattr__(estimator, name, value)
    return estimator


def _is_node(value: PyTree) -> bool:
    """Whether ``value`` is a dataclass that JAX knows as a pytree."""
    structure = jax.tree.structure(value)
    return dataclasses.is_dataclass(value) and not jax.tree_util.treedef_is_leaf(structure)


def each(
    f: Callable[..., PyTree],
    score: Score,
    rows: tuple[PyTree, ...],
    conditions: PyTree,
    size: int | None = None,
) -> PyTree:
    """``f(score, *row)`` of every row, with the score under the row's condition, at most ``size``
    of them at once; ``rows`` and ``conditions`` are trees of arrays ``(n, ...)``, or None."""

    def one(row: PyTree) -> PyTree:
        own, condition = row
        return f(conditioned(score, condition), *own)

    return mapped(one, (rows, conditions), size)


def rows(
    estimator: Estimator,
    target: Target,
    score: Score,
    params: PyTree,
    batch: Rows,
    u: AnyArray | None,
) -> dict[str, Num[Array, " n"]]:
    """The terms ``(n,)`` of a batch, and the score evaluations ``nfe``.

    The terms are in bits/dim for integers, and in nats for continuous data.

    Args:
      estimator, target: the estimator, and the quantity that it estimates.
      score, params: as in ``Estimator.one``.
      batch: the examples.
      u: the rows of ``Estimator.points`` of these examples, or None.
    """
    if target.levels is not None:
        draws = getattr(estimator, "num_importance", 1)
        reason = estimator.reason_undefined(type(target.dequantizer), draws)
        if reason:
            raise ValueError(f"{target.dequantizer}: {reason}")

    def one(score: Score, data: OneExample, key: Key, u: Points) -> dict[str, Array]:
        terms, nfe = estimator.one(score, params, data, key, u, target)
        if unnamed := set(terms) - {*estimator.terms, *estimator.columns}:
            raise ValueError(
                f"{type(estimator).__name__} computes {sorted(unnamed)}, which would not be added "
                "to the number: name them in its class attribute terms"
            )
        if target.levels is not None:
            terms = {name: bits.nats_to_bits(term, data.shape) for name, term in terms.items()}
        return {**terms, "nfe": jnp.asarray(nfe)}

    found: dict[str, Array] = each(one, score, (batch.data, batch.keys(), u), batch.condition)
    return found
