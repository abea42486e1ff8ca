"""The divergence of a vector field, div f(x) = tr J(x), exactly or by random probes.

Hutchinson's estimator v^T J v is unbiased for probes v with E[v v^T] = I. Forward mode (``jvp``)
gives J v beside f(x) in one pass; inside a solver's loop reverse mode is 6 times slower on CPU.

Several Rademacher probes are one vector of random signs e, seen through the rows of a Hadamard
matrix H, each entry i of x by the column of its colour c_i:

    v_j = e * H[j, c],      1/k sum_j v_j^T J v_j = tr J + sum_{i != l} J_il e_i e_l r_k(c_i, c_l)

where r_k(a, b) = 1/k sum_{j < k} H[j, a] H[j, b] is 1 for the same colour and, if k is a power of
two, 0 for two of k colours: entries of different colours cancel, where independent probes leave
1 / k of all pairs' variance. Each v_j by itself is Rademacher's, so the mean is unbiased. In an
image neighbours, whose J_il are the largest, have different colours.

References: Hutchinson 1989; Grathwohl et al., FFJORD, ICLR 2019; Stathopoulos, Laeuchli, Orginos,
"Hierarchical probing for estimating the trace of the matrix inverse on toroidal lattices", 2013.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from sbml import compiler
from sbml.types import Array, Example, Key, Scalar

Field = Callable[[Example], Example]
Probes = Float[Array, "k *s"]
Signs = Integer[Array, "k *s"]
Forms = Float[Array, "k"]

PROBES = ("rademacher", "gaussian")

# Directions at once: the exact trace of a 32x32x3 image has 3,072, too many to hold together.
CHUNK = 256

# Tangents of an exact trace that are held at once: of networks for 32x32 images 8 MB each.
TANGENTS = 2048


def probes(key: Key, shape: tuple[int, ...], count: int, kind: str = "rademacher") -> Probes:
    """``(count, *shape)`` random probes: Rademacher's of one draw of signs, Gaussian independent.

    Rademacher has the least variance of all: none at all for a diagonal J, where a Gaussian probe's
    is 2 |J|^2; and none for any J with a power of two of probes above the largest colour.

    Raises:
      ValueError: for an unknown ``kind`` or a ``count`` below one.
    """
    if count < 1:
        raise ValueError(f"{count} probes: need at least one")
    if kind == "rademacher":
        signs = jax.random.rademacher(key, (1, *shape), dtype=float)
        return signs * hadamard(count, colours(shape)).astype(signs.dtype)
    if kind == "gaussian":
        return jax.random.normal(key, (count, *shape))
    raise ValueError(f"unknown probe distribution {kind!r}; choose from {PROBES}")


def colours(shape: tuple[int, ...]) -> np.ndarray:
    """A number for each entry: in an image (h, w, c), one whose last bits tell neighbours apart.

    The last bit of pixel (y, x) makes a checkerboard; the last two differ within 2x2 pixels, four
    within 4x4: bit 2 i is that of x ^ y's bit i, bit 2 i + 1 that of y's. 7 times the channel is
    added bit by bit (exclusive or), so the last two differ within a pixel too, and four in
    all channels of pixels side by side. Entries of other shapes are counted.
    """
    if len(shape) != 3:
        return np.arange(math.prod(shape)).reshape(shape)
    y, x, channel = np.indices(shape)
    bits = max(shape[:2]).bit_length()
    # Once more above the pixel's bits: no two entries have one number.
    colour = 7 * channel % 4**bits ^ channel << 2 * bits
    for bit in range(bits):
        colour ^= ((x ^ y) >> bit & 1) << 2 * bit | (y >> bit & 1) << 2 * bit + 1
    return colour


def hadamard(rows: int, columns: np.ndarray) -> Signs:
    """The first ``rows`` of Sylvester's matrix at ``columns``: (-1)^(ones of j & c), (rows, *s)."""
    j = jnp.arange(rows).reshape(-1, *(1,) * columns.ndim)
    return 1 - 2 * (jax.lax.population_count(j & columns[None]) & 1)


def basis(shape: tuple[int, ...]) -> Probes:
    """The d unit vectors of ``shape``, as ``(d, *shape)``: with them the trace is exact."""
    size = 1
    for n in shape:
        size *= n
    return jnp.eye(size).reshape(size, *shape)


def quadratic_forms(f: Field, x: Example, vs: Probes) -> tuple[Example, Forms]:
    """f(x) of shape ``(*s)`` and v^T J(x) v for each v of ``vs (k, *s)``, shape ``(k,)``.

    Raises:
      ValueError: ``vs`` are not directions of ``x``, or f(x) has another shape than ``x``.
    """
    compiler.check()
    if not vs.ndim or vs.shape[1:] != x.shape:
        raise ValueError(
            f"directions of shape {vs.shape} for x of shape {x.shape}: give (k, *x.shape), as of "
            "divergence.probes"
        )

    def one(v: Array) -> tuple[Array, Array]:
        y, jv = jax.jvp(f, (x,), (v,))
        if y.shape != x.shape:
            raise ValueError(
                f"f(x) has shape {y.shape} for x of shape {x.shape}: a vector field has the shape "
                "of x"
            )
        return y, jnp.sum(v * jv)

    if len(vs) <= CHUNK:
        return jax.vmap(one, out_axes=(None, 0))(vs)
    forms = jax.lax.map(lambda v: one(v)[1], vs, batch_size=CHUNK)
    return f(x), forms


def exact_batch(dims: int) -> int:
    """How many examples of ``dims`` dimensions an exact trace takes at once on one device."""
    return max(1, TANGENTS // min(CHUNK, dims))


def exact(f: Field, x: Example) -> tuple[Example, Scalar]:
    """f(x) and tr J(x), at the price of d Jacobian-vector products."""
    y, forms = quadratic_forms(f, x, basis(x.shape).astype(x.dtype))
    return y, jnp.sum(forms)


def hutchinson(f: Field, x: Example, vs: Probes) -> tuple[Example, Scalar]:
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

    def directions(self, key: Key | None, shape: tuple[int, ...]) -> Probes:
        """The directions ``(k, *shape)`` whose quadratic forms are summed."""
        if self.kind == "exact":
            return basis(shape)
        if key is None:
            raise ValueError(f"a {self.kind} trace draws probes: pass a key, or use kind='exact'")
        return probes(key, shape, self.probes, self.kind)

    def combined(self, forms: Forms) -> Scalar:
        """The divergence ``()`` that the quadratic forms ``(k,)`` tell."""
        return jnp.sum(forms) if self.kind == "exact" else jnp.mean(forms)
