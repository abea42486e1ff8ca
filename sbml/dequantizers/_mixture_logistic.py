"""The elementwise map of Flow++: the logit of a mixture of logistics' distribution function.

    y = logit F(x),   F(x) = sum_k w_k sigmoid((x - m_k) / s_k),   dy/dx = f / (F (1 - F))

F, 1 - F and the density f are computed as logarithms, so the tails keep their digits: with one
component the map is (x - m) / s for every x, however large.

Reference: Ho et al. 2019 (Flow++), section 3.2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import log_sigmoid, log_softmax, logsumexp

from sbml.core.types import Array

CLIP = 1e-7
LEAST_LOG_SCALE = -7.0  # The flow keeps components at least this wide: narrower ones are spikes.


class Mixture(NamedTuple):
    """A mixture of logistics for every element of ``x (*s)``; all of shape ``(*s, components)``."""

    logits: Array  # of the weights, up to a constant
    means: Array
    log_scales: Array


def logit_cdf(x: Array, mixture: Mixture, clipped: bool = False) -> tuple[Array, Array]:
    """y = logit F(x) and log dy/dx, elementwise, of the shape of ``x``.

    If ``clipped``, they are computed from F instead of log F, and clipped at 1e-7, as Song et al.
    do. This form is for parity with their numbers only, because it is not injective. In float32, y
    above 10 changes in visible steps and does not exceed 16, and log dy/dx is wrong by |y| - 16 in
    both tails. As in their code, F is the exponential of log F, with that rounding: near 1 its
    error is a few units in the last place.
    """
    log_w = log_softmax(mixture.logits)
    z = (x[..., None] - mixture.means) * jnp.exp(-mixture.log_scales)
    below, above = log_w + log_sigmoid(z), log_w + log_sigmoid(-z)
    density = below + log_sigmoid(-z) - mixture.log_scales
    log_f, log_1mf, log_density = (logsumexp(a, axis=-1) for a in (below, above, density))
    if not clipped:
        return log_f - log_1mf, log_density - log_f - log_1mf
    f = jnp.exp(log_f)
    y = -jnp.log(jnp.maximum(1.0 / f - 1.0, CLIP))
    return y, log_density - jnp.log(jnp.maximum(f, CLIP)) - jnp.log(jnp.maximum(1.0 - f, CLIP))
