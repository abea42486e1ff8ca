"""Truncated-normal dequantization: the diffusion's own noise at time eps, kept inside the bin.

Let c = 2 (k + 1/2) / L - 1 be the bin's centre, h = 1 / L its half-width and rho = sigma / alpha at
eps. Then

    x = c + rho e,    e ~ N(0, 1) truncated to [-tau, tau],    tau = h / rho.

The distribution of alpha x is nearly that of c diffused to time eps, so the density to evaluate is
p_eps. The position in the bin is u = 1/2 + e / (2 tau), and per dimension, with
Z = erf(tau / sqrt(2)),

    log q(u) = log(2 tau) - e^2 / 2 - log(2 pi) / 2 - log Z,
    E log q(u) = log(2 tau) - (1 + log 2 pi) / 2 - log Z + tau exp(-tau^2 / 2) / (sqrt(2 pi) Z).

This dequantizer has no parameters: tau = 3 and the number of levels determine eps.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from sbml.core import scalars
from sbml.core.door import checked, typed
from sbml.core.scalars import Number, positive
from sbml.core.types import Example, Key, Pixels, PyTree, Scalar, Score
from sbml.dequantizers.base import AtNoise
from sbml.likelihood import discrete


@typed
@dataclasses.dataclass(frozen=True)
class Model(AtNoise):
    """The dequantizer; ``tau`` is half the bin's width in standard deviations of the noise."""

    tau: Annotated[Number, positive] = discrete.TAU

    @checked
    def sample(self, params: PyTree, pixels: Pixels, key: Key) -> tuple[Example, Scalar]:
        """u of the shape of one example ``pixels (*s)``, and log q(u | pixels) in nats."""
        e = discrete.truncated_normal(jax.random.normal(key, pixels.shape), self.tau)
        u = jnp.clip(0.5 + e / (2 * self.tau), 0.0, 1 - jnp.finfo(e.dtype).epsneg)
        z = scalars.erf(self.tau / math.sqrt(2))
        at_centre = scalars.log(2 * self.tau / z) - 0.5 * math.log(2 * math.pi)
        return u, e.size * at_centre - 0.5 * jnp.sum(e**2)

    def noise(self, score: Score, levels: int) -> discrete.TruncatedNormal:
        """Noise that stays in the bin; its tau follows from eps and ``levels`` alone."""
        return discrete.TruncatedNormal(levels)
