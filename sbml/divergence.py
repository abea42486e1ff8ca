"""The divergence of a vector field, div f(x) = tr J(x), exactly or by random probes.

Hutchinson's estimator v^T J v is unbiased for probes v with E[v v^T] = I. Forward mode (``jvp``)
gives J v beside f(x) in one pass; inside a solver's loop reverse mode is 6 times slower on CPU.

References: Hutchinson 1989; Grathwohl et al., FFJORD, ICLR 2019.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sbml.types import Array, Key

PROBES = ("rademacher", "gaussian")

# Directions at once: the exact trace of a 32x32x3 image has 3,072, too many to hold together.
CHUNK = 256


def probes(key: Key, shape: tuple[int, ...], count: int, kind: str = "rademacher") -> Array:
    """``(count, *shape)`` random probes.

    Rademacher has the least variance of all: none at all for a diagonal J, where a Gaussian probe's
    is 2 |J|^2.

    Raises:
      ValueError: for an unknown ``kind`` or a ``count`` below one.
    """
    if count < 1:
        raise ValueError(f"{count} probes: need at least one")
    if kind == "rademacher":
        return jax.random.rademacher(key, (count, *shape), dtype=float)
    if kind == "gaussian":
        return jax.random.normal(key, (count, *shape))
    raise ValueError(f"unknown probe distribution {kind!r}; choose from {PROBES}")


def basis(shape: tuple[int, ...]) -> Array:
    """The d unit vectors of ``shape``, as ``(d, *shape)``: with them the trace is exact."""
    size = 1
    for n in shape:
        size *= n
    return jnp.eye(size).reshape(size, *shape)


def quadratic_forms(f: Callable[[Array], Array], x: Array, vs: Array) -> tuple[Array, Array]:
    """f(x) of shape ``(*s)`` and v^T J(x) v for each v of ``vs (k, *s)``, shape ``(k,)``."""

    def one(v: Array) -> tuple[Array, Array]:
        y, jv = jax.jvp(f, (x,), (v,))
        return y, jnp.sum(v * jv)

    if len(vs) <= CHUNK:
        return jax.vmap(one, out_axes=(None, 0))(vs)
    forms = jax.lax.map(lambda v: one(v)[1], vs, batch_size=CHUNK)
    return f(x), forms


def exact(f: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """f(x) and tr J(x), at the price of d Jacobian-vector products."""
    y, forms = quadratic_forms(f, x, basis(x.shape).astype(x.dtype))
    return y, jnp.sum(forms)


def hutchinson(f: Callable[[Array], Array], x: Array, vs: Array) -> tuple[Array, Array]:
    """f(x) and the mean of v^T J(x) v over the probes ``vs (k, *s)``."""
    y, forms = quadratic_forms(f, x, vs)
    return y, jnp.mean(forms)


@dataclasses.dataclass(frozen=True)
class Trace:
    """How the divergence is computed.

    Attributes:
      kind: ``rademacher`` or ``gaussian`` probes, or ``exact``.
      probes: how many, for one solve (not used by ``exact``).
    """

    kind: str = "rademacher"
    probes: int = 1

    def __post_init__(self) -> None:
        choices = (*PROBES, "exact")
        if self.kind not in choices:
            raise ValueError(f"unknown trace {self.kind!r}; choose from {choices}")
        if self.probes < 1:
            raise ValueError(f"{self.probes} probes: need at least one")

    def directions(self, key: Key | None, shape: tuple[int, ...]) -> Array:
        """The directions ``(k, *shape)`` whose quadratic forms are summed."""
        if self.kind == "exact":
            return basis(shape)
        if key is None:
            raise ValueError(f"a {self.kind} trace draws probes: pass a key, or use kind='exact'")
        return probes(key, shape, self.probes, self.kind)

    def combined(self, forms: Array) -> Array:
        """The divergence ``()`` that the quadratic forms ``(k,)`` tell."""
        return jnp.sum(forms) if self.kind == "exact" else jnp.mean(forms)
