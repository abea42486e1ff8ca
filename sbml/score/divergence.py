"""The divergence of a vector field, div f(x) = tr J(x), exactly or by random probes.

Hutchinson's estimator v^T J v is unbiased for probes v with E[v v^T] = I. Forward mode (``jvp``)
gives J v together with f(x) in one pass. Inside a solver's loop, reverse mode is 6 times slower on
CPU.

Several Rademacher probes are made from one vector of random signs e and the rows of a Hadamard
matrix H. Every entry i of x has a colour c_i, which chooses a column of H:

    v_j = e * H[j, c],      1/k sum_j v_j^T J v_j = tr J + sum_{i != l} J_il e_i e_l r_k(c_i, c_l)

where r_k(a, b) = 1/k sum_{j < k} H[j, a] H[j, b] is 1 for a = b. If k is a power of two, it is 0
for colours that differ modulo k, and 1 for all others. So pairs of entries whose colours differ
modulo k add no variance, while k independent probes leave 1 / k of the variance of every pair. Each
v_j by itself is a Rademacher probe, so the mean is unbiased. In an image, neighbours have colours
that differ in the last bits, because their J_il are the largest.

References: Hutchinson 1989; Grathwohl et al., FFJORD, ICLR 2019; Stathopoulos, Laeuchli, Orginos,
"Hierarchical probing for estimating the trace of the matrix inverse on toroidal lattices", 2013.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from sbml.core.door import checked, typed
from sbml.core.scalars import Count, Draws, nonempty, one_of
from sbml.core.types import Array, Batch, Example, Key, Scalar

Field = Callable[[Example], Example]
Probes = Float[Array, "k *s"]
Signs = Integer[Array, "k *s"]
Forms = Float[Array, "k"]

PROBES = ("rademacher", "gaussian")

# Directions that are computed at once. The exact trace of a 32x32x3 image has 3,072, which is too
# many for the memory.
CHUNK = 256

# Tangents of an exact trace that are in memory at once, over all examples of a batch. For networks
# of 32x32 images a tangent takes 8 MB.
TANGENTS = 2048


@checked
def probes(
    key: Key,
    shape: tuple[int, ...],
    count: Count,
    kind: Annotated[str, one_of(*PROBES)] = "rademacher",
) -> Probes:
    """``(count, *shape)`` random probes.

    Rademacher probes share one draw of signs; Gaussian probes are independent. One Rademacher probe
    has the least variance of all probes with independent entries. For a diagonal J its variance is
    0, while that of a Gaussian probe is 2 sum_i J_ii^2. The variance of ``count`` Rademacher probes
    is 0 for any J if ``count`` is a power of two that is larger than the largest colour.
    """
    if kind == "rademacher":
        signs = jax.random.rademacher(key, (1, *shape), dtype=float)
        return signs * hadamard(count, colours(shape)).astype(signs.dtype)
    return jax.random.normal(key, (count, *shape))


def colours(shape: tuple[int, ...]) -> np.ndarray:
    """A colour, an integer, for each entry of ``shape``, as an array of that shape.

    In an image (h, w, c), the last bits of the colours of neighbours differ. The last bit of the
    pixels (y, x) is a checkerboard, the last two bits differ between all pixels of a 2x2 block, and
    the last four between all pixels of a 4x4 block: bit 2 i is bit i of x ^ y, and bit 2 i + 1 is
    bit i of y. The exclusive or with 7 times the channel makes the last two bits differ between
    the channels of a pixel too, and the last four between all channels of adjacent pixels. In any
    other shape, the colours are 0, 1, 2, ...
    """
    if len(shape) != 3:
        return np.arange(math.prod(shape)).reshape(shape)
    y, x, channel = np.indices(shape)
    bits = max(shape[:2]).bit_length()
    # The channel stands once more above the pixel's bits, so all entries have different colours.
    colour = 7 * channel % 4**bits ^ channel << 2 * bits
    for bit in range(bits):
        colour ^= ((x ^ y) >> bit & 1) << 2 * bit | (y >> bit & 1) << 2 * bit + 1
    return colour


@typed
def hadamard(rows: Count, columns: np.ndarray) -> Signs:
    """The first ``rows`` rows of Sylvester's matrix at ``columns (*s)``, shape ``(rows, *s)``.

    Its entry in row j and column c is (-1)^n, where n is the number of ones in the bits of j & c.
    """
    j = jnp.arange(rows).reshape(-1, *(1,) * columns.ndim)
    return 1 - 2 * (jax.lax.population_count(j & columns[None]) & 1)


def basis(shape: tuple[int, ...]) -> Probes:
    """The d unit vectors ``(d, *shape)``; the sum of their quadratic forms is the exact trace."""
    size = math.prod(shape)
    return jnp.eye(size).reshape(size, *shape)


@checked
def quadratic_forms(f: Field, x: Example, vs: Annotated[Batch, nonempty]) -> tuple[Example, Forms]:
    """f(x), shape ``(*s)``, and v^T J(x) v for each probe v in ``vs (k, *s)``, shape ``(k,)``."""

    def one(v: Array) -> tuple[Array, Array]:
        y, jv = jax.jvp(f, (x,), (v,))
        if y.shape != x.shape:
            raise ValueError(
                f"f(x) has shape {y.shape} for x of shape {x.shape}: return the shape of x"
            )
        return y, jnp.sum(v * jv)

    if len(vs) <= CHUNK:
        return jax.vmap(one, out_axes=(None, 0))(vs)
    forms = jax.lax.map(lambda v: one(v)[1], vs, batch_size=CHUNK)
    return f(x), forms


@typed
def exact_batch(dims: Count) -> int:
    """The number of examples of ``dims`` dimensions for one exact trace on one device at once."""
    return max(1, TANGENTS // min(CHUNK, dims))


@checked
def exact(f: Field, x: Example) -> tuple[Example, Scalar]:
    """f(x), shape ``(*s)``, and tr J(x), a scalar, at the cost of d Jacobian-vector products."""
    y, forms = quadratic_forms(f, x, basis(x.shape).astype(x.dtype))
    return y, jnp.sum(forms)


def hutchinson(f: Field, x: Example, vs: Batch) -> tuple[Example, Scalar]:
    """f(x), shape ``(*s)``, and the mean of v^T J(x) v over the probes ``vs (k, *s)``, a scalar."""
    y, forms = quadratic_forms(f, x, vs)
    return y, jnp.mean(forms)


@typed
@dataclasses.dataclass(frozen=True)
class Trace:
    """How the divergence is computed.

    Attributes:
      kind: ``rademacher`` or ``gaussian`` probes, or ``exact``.
      probes: the number of probes for one solve (not used by ``exact``).
    """

    kind: Annotated[str, one_of(*PROBES, "exact")] = "rademacher"
    probes: Draws = 1

    @checked
    def directions(self, key: Key | None, shape: tuple[int, ...]) -> Probes:
        """The directions ``(k, *shape)`` whose quadratic forms give the divergence."""
        if self.kind == "exact":
            return basis(shape)
        if key is None:
            raise ValueError(
                f"key=None with a {self.kind} trace, which draws probes: pass a key, or use the "
                "exact trace, Trace('exact')"
            )
        return probes(key, shape, self.probes, self.kind)

    def combined(self, forms: Forms) -> Scalar:
        """The divergence ``()``: the sum of the forms ``(k,)`` if exact, otherwise their mean."""
        return jnp.sum(forms) if self.kind == "exact" else jnp.mean(forms)
