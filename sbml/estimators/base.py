"""What an estimator is, and the one place where its rows are computed.

Every draw of a row is keyed by (seed, sweep, id of the example): neither the batch nor the order of
the examples changes a row.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Integer, Num

from sbml import bits
from sbml.bound import Reduction
from sbml.ode import Solver
from sbml.scalars import Number
from sbml.sdes import SDE
from sbml.types import Array, Example, Key, Keys, Scalar, Score

Count = Integer[Array, ""] | int
Data = Num[Array, "*s"]  # one example of integers or, without levels, of numbers


@dataclasses.dataclass(frozen=True)
class Target:
    """What a number is of. Hashable: static under ``jit``.

    Attributes:
      sde: the forward process of the score.
      eps: the smallest time.
      levels: L of integer data; None for continuous data x, which are taken as they are.
      dequantizer: a ``Model`` of ``sbml.dequantizers``, for integers.
    """

    sde: SDE
    eps: Number
    levels: int | None = None
    dequantizer: Any = None

    def sample(self, params: Any, data: Data, key: Key) -> tuple[Example, Scalar]:
        """x ``(*s)`` of one example, as the score at eps sees it, and log q(u) in nats."""
        if self.levels is None:
            return data, jnp.zeros((), data.dtype)
        u, log_q = self.dequantizer.sample(params, data, key)
        x = bits.to_model(data, u, self.levels)
        if self.dequantizer.at_noise:
            x = self.sde.mean_coef(jnp.asarray(self.eps)) * x
        return x, log_q

    def scale_nats(self, shape: tuple[int, ...]) -> float:
        """What the change of variables from x to k + u adds to -log p(x), in nats."""
        if self.levels is None:
            return 0.0
        nats = bits.scale_nats(shape, self.levels)
        if self.dequantizer.at_noise:
            nats -= math.prod(shape) * math.log(float(self.sde.mean_coef(jnp.asarray(self.eps))))
        return nats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The examples of a batch and what keys their draws: arrays, or the shapes of a compilation.

    Attributes:
      data: ``(n, *s)`` integers, or numbers if the target has no levels.
      ids: ``(n,)``, a number that belongs to the example wherever it stands.
      sweeps: ``(n,)``, which of the independent draws of an example this is.
      seed: ``()``, of all draws.
    """

    data: Any
    ids: Any
    sweeps: Any
    seed: Any

    def keys(self) -> Keys:
        """A key for each row, ``(n,)``."""
        return jax.vmap(functools.partial(draw_key, self.seed))(self.sweeps, self.ids)


def draw_key(seed: ArrayLike, sweep: ArrayLike, i: ArrayLike) -> Key:
    """The key of all draws of example ``i`` in one sweep."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sweep), i)


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """A sum of named terms that equals or bounds -log p of one example.

    A subclass is a frozen dataclass (so hashable, static under ``jit``) with a default for each
    field. Its fields are filled, by name, from

        trace           how a divergence is computed, ``sbml.divergence.Trace``
        num_importance  K, the draws of the dequantizer in one logarithm

    Attributes:
      terms: the names of its terms; ``scale`` is added by the caller, in float64.
      is_bound: whether it is an expectation over times. Such a number is estimated by independent
        sweeps over the data set, whose spread is its noise; any other solves an ODE, whose error is
        measured by a stricter solve.
      reducible: whether a ``Reduction`` with a control and a density applies to it.
    """

    terms: ClassVar[tuple[str, ...]]
    is_bound: ClassVar[bool]
    reducible: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        """Whether it takes an exact trace, which holds many tangents of an example at once."""
        trace = getattr(self, "trace", None)
        return trace is not None and trace.kind == "exact"

    @classmethod
    def undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        """Why there is no number with this kind of dequantizer; empty if there is."""
        return ""

    @abc.abstractmethod
    def one(
        self,
        score: Score,
        params: Any,
        data: Data,
        key: Key,
        u: Any,
        given: Any,
        target: Target,
    ) -> tuple[dict[str, Scalar], Count]:
        """The terms ``()`` in nats of one example but ``scale``, and evaluations of the score.

        Args:
          score: a score of one example.
          params: the dequantizer's.
          data: one example ``(*s)``.
          key: of all its draws.
          u: of a bound, points ``(draws,)`` in [0, 1), one for each time; otherwise None.
          given: of a bound, a ``Reduction``; otherwise the ``Solver``.
          target: what the number is of.
        """

    def scale_nats(self, target: Target, shape: tuple[int, ...]) -> float:
        """The term ``scale`` in nats."""
        return target.scale_nats(shape)


@functools.partial(jax.jit, static_argnames=("estimator", "target"))
def rows(
    estimator: Estimator,
    target: Target,
    score: Score,
    params: Any,
    batch: Rows,
    u: ArrayLike | None,
    given: Solver | Reduction,
) -> dict[str, Num[Array, " n"]]:
    """The terms ``(n,)`` of a batch and ``nfe``: in bits/dim of integers, else in nats.

    Args:
      estimator, target: which number, and of what.
      score, params, given: as of ``Estimator.one``. A solver's tolerances may change without
        another compilation.
      batch: the examples.
      u: of a bound, ``(n, draws)`` in [0, 1); otherwise None.

    Raises:
      ValueError: the target's dequantizer has no such number (``Estimator.undefined``).
    """
    if target.levels is not None:
        reason = estimator.undefined(
            type(target.dequantizer), getattr(estimator, "num_importance", 1)
        )
        if reason:
            raise ValueError(f"{target.dequantizer}: {reason}")

    def one(data: Any, key: Key, u: Any) -> dict[str, Array]:
        terms, nfe = estimator.one(score, params, data, key, u, given, target)
        if target.levels is not None:
            terms = {name: bits.nats_to_bits(term, data.shape) for name, term in terms.items()}
        return {**terms, "nfe": jnp.asarray(nfe)}

    return jax.vmap(one)(batch.data, batch.keys(), u)
