"""The elementwise map of Flow++: the logit of a mixture of logistics' distribution function.

    y = logit F(x),   F(x) = sum_k w_k sigmoid((x - m_k) / s_k),   dy/dx = f / (F (1 - F))

F, 1 - F and the density f are formed in logarithms, so tails keep their digits: with one component
the map is exactly (x - m) / s, however far out. Reference: Ho et al. 2019 (Flow++), section 3.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.nn import log_sigmoid, log_softmax, logsumexp

from sbml.types import Array

BISECTIONS = 64  # halvings of the bracket: below the spacing of float64 in any bracket of use
CLIP = 1e-7
LEAST_LOG_SCALE = -7.0  # of a component: narrower ones would be spikes


class Mixture(NamedTuple):
    """A mixture of logistics for every element of ``x (*s)``; all of shape ``(*s, components)``."""

    logits: Array  # of the weights, up to a constant
    means: Array
    log_scales: Array


def _log_cdf(x: Array, mixture: Mixture) -> tuple[Array, Array, Array]:
    """log F, log(1 - F) and log f of ``x (*s)``, each of shape ``(*s)``."""
    log_w = log_softmax(mixture.logits)
    z = (x[..., None] - mixture.means) * jnp.exp(-mixture.log_scales)
    below, above = log_w + log_sigmoid(z), log_w + log_sigmoid(-z)
    density = below + log_sigmoid(-z) - mixture.log_scales
    return logsumexp(below, axis=-1), logsumexp(above, axis=-1), logsumexp(density, axis=-1)


def logit_cdf(x: Array, mixture: Mixture) -> tuple[Array, Array]:
    """y = logit F(x) and log dy/dx, elementwise, of the shape of ``x``."""
    log_f, log_1mf, log_density = _log_cdf(x, mixture)
    return log_f - log_1mf, log_density - log_f - log_1mf


def clipped_logit_cdf(x: Array, mixture: Mixture) -> tuple[Array, Array]:
    """``logit_cdf`` through the float value of F, clipped at 1e-7 in y and in log dy/dx.

    So Song et al. have it. In float32, y above 10 moves in visible steps and ends at 16, and
    log dy/dx is off by |y| - 16 in both tails: not injective, and for parity only. As theirs, F is
    the exponential of its logarithm and rounded as that: near 1 by a few units in the last place.
    """
    log_f, _, log_density = _log_cdf(x, mixture)
    f = jnp.exp(log_f)
    y = -jnp.log(jnp.maximum(1.0 / f - 1.0, CLIP))
    return y, log_density - jnp.log(jnp.maximum(f, CLIP)) - jnp.log(jnp.maximum(1.0 - f, CLIP))


def inverse_logit_cdf(y: Array, mixture: Mixture) -> Array:
    """x with logit F(x) = y, by bisection, elementwise, of the shape of ``y``.

    Component k alone would give m_k + s_k y. F lies between its components' distribution
    functions, so the least and the greatest of these bracket the root.
    """
    alone = mixture.means + jnp.exp(mixture.log_scales) * y[..., None]

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + 0.5 * (high - low)
        too_low = logit_cdf(middle, mixture)[0] < y
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    low, high = lax.fori_loop(0, BISECTIONS, halve, (alone.min(-1), alone.max(-1)))
    return low + 0.5 * (high - low)
