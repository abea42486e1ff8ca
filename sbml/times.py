"""How diffusion times are drawn to estimate an integral over t in [eps, T].

Two independent choices. *Where*: a proposal maps u in [0, 1) to a time and a weight with

    E_u[ weight(u) h(t(u)) ] = integral_eps^T h(t) dt      for every h,

so any proposal gives an unbiased loss; ``importance`` is uniform in log-SNR, which for the
likelihood weighting g^2/sigma^2 makes every weight equal (Song et al. 2021, section 5).
*How*: the points u are independent (``iid``) or a randomly shifted lattice over the whole batch
(``lattice``), each point uniform by itself, the set evenly spread (Kingma et al., VDM, 2021).
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from sbml.sdes import SDE
from sbml.types import Array, Key


def iid(key: Key, n: int, draws: int = 1) -> Array:
    """``(n, draws)`` independent uniform points in [0, 1)."""
    return jax.random.uniform(key, (n, draws))


def lattice(key: Key, n: int, draws: int = 1) -> Array:
    """``(n, draws)`` points u_ij = (j + (pi(i) + U) / n) / draws in [0, 1).

    Column j is uniform on [j, j + 1) / draws, so a row's mean estimates an integral without bias.
    One point falls in each of the n x draws cells, and ``draws`` evenly spaced ones belong to each
    example i; the random permutation pi makes the assignment independent of the batch's order.
    """
    shift_key, order_key = jax.random.split(key)
    row = (jax.random.permutation(order_key, n) + jax.random.uniform(shift_key)) / n
    u = (jnp.arange(draws)[None] + row[:, None]) / draws
    # (n - 1 + U) / n can round up to 1 in float32, which lies outside [0, 1).
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


DRAWS = {"iid": iid, "lattice": lattice}


@dataclasses.dataclass(frozen=True)
class Proposal(abc.ABC):
    """A distribution of times on [eps, T] for ``sde``.

    Raises:
      ValueError: if not 0 < eps < T.
    """

    sde: SDE
    eps: float

    def __post_init__(self) -> None:
        self.sde.check_time(self.eps)

    @abc.abstractmethod
    def at(self, u: Array) -> tuple[Array, Array]:
        """Times and weights (1 / density), each of the shape of ``u`` in [0, 1)."""


@dataclasses.dataclass(frozen=True)
class Uniform(Proposal):
    """t uniform on [eps, T]; every weight is T - eps."""

    def at(self, u: Array) -> tuple[Array, Array]:
        length = self.sde.T - self.eps
        return self.eps + length * u, jnp.full_like(u, length)


@dataclasses.dataclass(frozen=True)
class Importance(Proposal):
    """Uniform in log-SNR: p(t) = g^2 / (Z sigma^2), Z = lambda(eps) - lambda(T)."""

    @property
    def normaliser(self) -> Array:
        """Z, the integral of g^2 / sigma^2 over [eps, T]."""
        ends = jnp.asarray([self.eps, self.sde.T], float)
        return -jnp.diff(jax.vmap(self.sde.log_snr)(ends))[0]

    def at(self, u: Array) -> tuple[Array, Array]:
        largest = self.sde.log_snr(jnp.asarray(self.eps, u.dtype))
        t = self.sde.time(largest - self.normaliser * u)
        # The inverse may leave the interval by a rounding error.
        t = jnp.clip(t, self.eps, self.sde.T)
        return t, self.normaliser * (self.sde.std(t) / self.sde.diffusion(t)) ** 2


PROPOSALS: dict[str, type[Proposal]] = {"uniform": Uniform, "importance": Importance}
