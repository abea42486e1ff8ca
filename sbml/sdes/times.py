"""How diffusion times are drawn to estimate an integral over t in [eps, T].

T stands for ``sde.largest_time``, which is less than ``sde.T`` if the signal vanishes at ``sde.T``.
There are three independent choices.

*The proposal* maps a point u in [0, 1) to a time and a weight with

    E_u[ weight(u) h(t(u)) ] = integral_eps^T h(t) dt      for every h,

so every proposal gives an unbiased loss. ``uniform`` is uniform in t. ``importance`` is uniform in
log-SNR, so that for the likelihood weighting g^2/sigma^2 all draws have the same total weight (Song
et al. 2021, section 5). ``velocity`` does the same for the error of the velocity instead of the
error of the noise (Zheng et al., "Improved Techniques for Maximum Likelihood Estimation for
Diffusion ODEs", ICML 2023).

*The points* u are independent (``iid``), or a randomly shifted lattice over the whole batch
(``lattice``, low-discrepancy sampling): each point by itself is uniform, and together they are
evenly spread (Kingma et al., VDM, 2021).

*The density of the points* q can be any piecewise-constant density. :func:`warp` moves the points
first, u -> (v, 1/q(v)), so that they have this density, and

    E_u[ 1/q(v) weight(v) h(t(v)) ] = integral_eps^T h(t) dt.

The variance is least if q(v) is proportional to the root mean square of weight * h at v (or of the
part of it that the lattice leaves random). :func:`tally` keeps running means of its square in bins,
and :func:`with_floor` makes a density of their roots. The estimate stays unbiased if q depends on
earlier draws only; it would not if q depended on the draws that it is used for.
"""

import abc
import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from sbml.core import scalars
from sbml.core.door import checked, typed
from sbml.core.scalars import Count, Number, above_0, at_least, at_most, between, nonempty, one_of
from sbml.core.streams import stream
from sbml.core.types import Array, Elementwise, Key, Scalar, Vector
from sbml.sdes import SDE

# Random draws are below 1, but a caller may also give the end u = 1.
Points = Annotated[Elementwise, between(0, 1)]
Bins = Float[Array, " bins"]
Counts = Float[Array, "2 bins"]
AnyBins = Annotated[Real[Array | np.ndarray, " bins"], nonempty]
AnyCounts = Annotated[Real[Array | np.ndarray, "2 bins"], nonempty]
Draws = Float[Array, "n draws"]


def _uniform(key: Key, shape: tuple[int, ...] = ()) -> Elementwise:
    """Uniform numbers that are rounded to the nearest floating-point number in [0, 1].

    JAX's uniform numbers are multiples of eps = 2^-23, also near 0, where floating-point numbers
    are much denser. A second number, times eps, adds the missing digits.
    """
    coarse, fine = jax.random.uniform(key, (2, *shape))
    return coarse + jnp.finfo(coarse.dtype).eps * fine


def _below_one(u: Draws) -> Draws:
    """``u`` in [0, 1): rounding can give 1."""
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


@checked
def iid(key: Key, n: Count, draws: Count = 1) -> Draws:
    """``(n, draws)`` independent uniform points in [0, 1)."""
    return _below_one(_uniform(key, (n, draws)))


@checked
def lattice(key: Key, n: Count, draws: Count = 1) -> Draws:
    """``(n, draws)`` points u_ij = (j + (pi(i) + U) / n) / draws in [0, 1).

    U is uniform in [0, 1) and pi is a random permutation of 0 .. n - 1. Each point of column j is
    uniform on [j, j + 1) / draws, so the mean over a row estimates an integral without bias. Of the
    n * draws equal cells of [0, 1), each has one point. Each example i has ``draws`` evenly spaced
    points, and pi makes them independent of the place of the example in the batch.
    """
    order, shift = stream(key, "order"), _uniform(stream(key, "shift"))
    row = (jax.random.permutation(order, n) + shift) / n
    return _below_one((jnp.arange(draws)[None] + row[:, None]) / draws)


DRAWS = {"iid": iid, "lattice": lattice}


@checked
def warp(u: Points, density: AnyBins) -> tuple[Elementwise, Elementwise]:
    """Points v of a piecewise-constant density q on [0, 1), and 1/q(v), of the shape of ``u``:

        E_u[ h(v) / q(v) ] = integral_0^1 h(v) dv      for u uniform and every h.

    v(u) is the inverse of q's distribution function, so it increases with u: if n points are evenly
    spread in u, the intervals between the points v each have the mass 1/n.

    Args:
      u: points in [0, 1), any shape.
      density: q on ``bins`` equal bins, ``(bins,)``, positive; scaled here to a mean of 1.
    """
    # No point falls into a bin of density 0, or into one with so small a part of the sum that
    # rounding takes it away: its part of the integral would be lost.
    if not scalars.is_traced(density):
        host = np.asarray(density)
        if not np.all((host > 0) & np.isfinite(host)):
            raise ValueError(
                f"density lies in [{host.min():g}, {host.max():g}]: give positive, finite "
                "numbers, such as times.with_floor returns"
            )
        kinds = jnp.result_type(density, 1.0), dtypes.canonicalize_dtype(u.dtype)
        coarser = max(kinds, key=lambda kind: jnp.finfo(kind).eps)
        share, least = host.min() / host.sum(dtype=float), 4 * jnp.finfo(coarser).eps
        if share < least:
            raise ValueError(
                f"density has a bin with {share:.2g} of its sum, which the rounding of {coarser} "
                f"can take away: give every bin at least {least:.2g} of the sum, by a larger floor "
                "(times.with_floor) or fewer bins"
            )
    bins = density.size
    below = jnp.cumsum(density / jnp.sum(density))
    # XLA may sum in pieces, so that rounding makes a sum decrease, or the last one differ from 1.
    # But every u < 1 must lie in a bin.
    below = jax.lax.cummax(jnp.minimum(below, 1)).at[-1].set(1)
    edges = jnp.concatenate([jnp.zeros_like(below[:1]), below]).astype(u.dtype)
    # The masses are those of the rounded edges, so that weights and points agree to the last digit.
    mass = jnp.diff(edges)
    k = jnp.searchsorted(edges[1:], u, side="right")
    v = (k + (u - edges[k]) / mass[k]) / bins
    return jnp.clip(v, 0, 1 - jnp.finfo(v.dtype).epsneg), 1 / (bins * mass[k])


@checked
def with_floor(scale: AnyBins, floor: Annotated[Number, above_0, at_most(1)] = 0.1) -> Bins:
    """The density q = (1 - floor) scale / mean(scale) + floor ``(bins,)``, for :func:`warp`.

    No weight 1/q exceeds 1 / floor. So however wrong ``scale`` is, the second moment of an estimate
    is at most 1 / floor times that with the uniform density.

    Args:
      scale: numbers of at least 0 to which the density is nearly proportional, ``(bins,)``. A bin
        without a finite value, such as one that no draw has visited, is given the mean of the
        others. If all are 0 or not finite, the density is uniform.
      floor: the part of the draws that stays uniform, in (0, 1].
    """
    valid = jnp.isfinite(scale) & (scale >= 0)
    largest = jnp.max(jnp.where(valid, scale, 0))
    # The values are divided by the largest first, because their sum could overflow.
    relative = jnp.where(valid, scale, 0) / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(relative) / jnp.maximum(jnp.sum(valid), 1)
    shape = jnp.where(valid, relative, mean)
    return (1 - floor) * jnp.where(mean > 0, shape / mean, 1) + floor


@checked
def tally(
    counts: AnyCounts,
    v: Annotated[Vector, between(0, 1)],
    values: Real[Array | np.ndarray, " n"],
    decay: Annotated[Number, between(0, 1)],
) -> Counts:
    """New ``counts (2, bins)``, of which ``counts[1] / counts[0]`` is the mean in each bin of v.

        counts <- decay counts + sum over the batch of (1, value) in the bin of v

    Both rows decay alike, so the mean of a bin does not decay between visits. A bin without a visit
    has the mean nan, which :func:`with_floor` replaces. Values that are not finite do not count.

    Args:
      counts: ``(2, bins)``, zeros at the start.
      v: points in [0, 1), ``(n,)``, from :func:`warp`.
      values: the number to average at each point, ``(n,)``, without the weight 1/q(v).
      decay: the weight of the past; the memory is 1 / (1 - decay) batches.
    """
    counts, values = jnp.asarray(counts), jnp.asarray(values)
    bins = counts.shape[1]
    bin_of_v = jnp.minimum(jnp.floor(v * bins), bins - 1)
    inside = (bin_of_v[:, None] == jnp.arange(bins)[None]) & jnp.isfinite(values)[:, None]
    # A masked sum always adds in the same order, but a scatter may not. So a resumed run stays
    # bitwise equal.
    sums = jnp.sum(jnp.where(inside, values[:, None], 0), axis=0)
    return decay * counts + jnp.stack([jnp.sum(inside, axis=0).astype(sums.dtype), sums])


@typed
@dataclasses.dataclass(frozen=True)
class Proposal(abc.ABC):
    """A distribution of times on [eps, T] for ``sde``."""

    sde: SDE
    eps: Number

    def __post_init__(self) -> None:
        self.sde.check_time(self.eps)

    @abc.abstractmethod
    def at(self, u: Elementwise) -> tuple[Elementwise, Elementwise]:
        """Times and weights (1 / density), each of the shape of ``u`` in [0, 1)."""

    def over_log_snr(
        self, u: Points, density: AnyBins | None = None
    ) -> tuple[Elementwise, Elementwise]:
        """Times and weights for an integral over lambda = log SNR, of the shape of ``u``:

            E_u[ weight h(t) ] = integral h dlambda from lambda(T) to lambda(eps).

        If there is a ``density (bins,)``, :func:`warp` moves the points first, and ``weight``
        contains the factor 1/q(v).
        """
        v, inverse = (u, 1.0) if density is None else warp(u, density)
        t, weight = self.at(v)
        return t, inverse * weight * self.sde.rate(t)


class Uniform(Proposal):
    """t uniform on [eps, T]; every weight is T - eps. T is ``sde.largest_time``."""

    @checked
    def at(self, u: Points) -> tuple[Elementwise, Elementwise]:
        length = self.sde.largest_time - self.eps
        return self.eps + length * u, jnp.full_like(u, length)


class Importance(Proposal):
    """Uniform in log-SNR: p(t) = g^2 / (Z sigma^2), Z = lambda(eps) - lambda(T)."""

    @property
    def normaliser(self) -> Scalar:
        """Z = lambda(eps) - lambda(T)."""
        ends = jnp.asarray([self.eps, self.sde.largest_time], float)
        first, last = jax.vmap(self.sde.log_snr)(ends)
        return first - last

    @checked
    def at(self, u: Points) -> tuple[Elementwise, Elementwise]:
        largest = self.sde.log_snr(jnp.asarray(self.eps, u.dtype))
        t = self.sde.time(largest - self.normaliser * u)
        # The inverse may leave the interval by a rounding error.
        t = jnp.clip(t, self.eps, self.sde.largest_time)
        return t, self.normaliser / self.sde.rate(t)


@typed
@dataclasses.dataclass(frozen=True)
class Grid:
    """The times i / (n - 1) of ``n`` noise levels, i = 0 .. n - 1, all equally likely.

    The weight is 1, so a weighted mean over draws estimates the mean over the levels.
    """

    n: Annotated[int, at_least(2)]

    @checked
    def at(self, u: Points) -> tuple[Elementwise, Elementwise]:
        """Times and weights, each of the shape of ``u`` in [0, 1)."""
        level = jnp.minimum(jnp.floor(u * self.n), self.n - 1)
        return level / (self.n - 1), jnp.ones_like(u)


PROPOSALS: dict[str, type[Proposal]] = {"uniform": Uniform, "importance": Importance}


@checked
def draw(
    sde: SDE,
    eps: Number,
    u: Annotated[Vector, between(0, 1), nonempty],
    density: ArrayLike | None,
    proposal: Annotated[str, one_of(*PROPOSALS)],
) -> tuple[Vector, Vector]:
    """Times and weights for an integral over log-SNR, each ``(n,)``, of one example's ``u (n,)``.

    ``density`` is as in :meth:`Proposal.over_log_snr`, and ``proposal`` a name in ``PROPOSALS``.
    """
    bins = None if density is None else jnp.asarray(density)
    return PROPOSALS[proposal](sde, eps).over_log_snr(u, bins)
