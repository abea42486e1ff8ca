"""Denoising score matching.

With x_t = alpha x + sigma z, z ~ N(0, I), a score s defines a noise prediction -sigma s, and

    loss(x, t, z) = 1/2 w(t) |sigma(t) s(x_t, t) + z|^2

which is summed over dimensions, in nats. There are two weightings; the paper writes sigma^2 w as
lambda(t):

    likelihood   w = g^2 / sigma^2    lambda = g^2: the integral over t bounds -log p(x), up to
                                      terms that do not depend on the score
    original     w = 1                lambda = sigma^2: the weighting of DDPM, for sample quality

A training loss is the mean over a batch of weight * loss(x, t, z), where t and its weight, the
inverse of the density of t, are from ``sbml.times``.

Reference: Song, Durkan, Murray, Ermon, "Maximum Likelihood Training of Score-Based Diffusion
Models", NeurIPS 2021, equations 7 and 8.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import nonempty, one_of
from sbml.core.streams import stream
from sbml.core.types import (
    AnyArray,
    Batch,
    Elementwise,
    Example,
    Key,
    Keys,
    Scalar,
    Score,
    Time,
    Times,
    Vector,
    at_least_float32,
    batch_score,
    of_shape,
)
from sbml.sdes import Kernel

Signs = Annotated[
    Num[AnyArray, " n"],
    condition("of +1 and -1", lambda signs: np.all(np.abs(np.asarray(signs)) == 1)),
]

WEIGHTINGS = ("likelihood", "original")
Weighting = Annotated[str, one_of(*WEIGHTINGS)]


@typed
def weight(sde: Kernel, t: Elementwise | float, weighting: Weighting) -> Elementwise:
    """The weight w(t) of the squared noise-prediction error, elementwise. Discrete noise levels
    have no likelihood weighting."""
    sde.check_times(t)
    # A Python number is a time too.
    return sde.rate(t) if weighting == "likelihood" else jnp.ones_like(t)  # type: ignore[arg-type]


@checked
def perturb(sde: Kernel, x: Example, t: Time, z: Example) -> Example:
    """x_t = alpha(t) x + sigma(t) z for one example, shape ``(*s)``."""
    mean, std = sde.marginal(x, t)
    return mean + std * z


@checked
def residual(sde: Kernel, score_xt: Example, t: Time, z: Example, weighting: Weighting) -> Scalar:
    """1/2 w(t) |sigma(t) s + z|^2 in nats, a scalar."""
    error = sde.std(t) * score_xt + z
    return 0.5 * weight(sde, t, weighting) * jnp.sum(error**2)


@checked
def dsm(
    score: Score,
    sde: Kernel,
    x: Example,
    t: Scalar,
    key: Key,
    *,
    weighting: Weighting = "likelihood",
) -> Scalar:
    """The denoising score matching loss of one example at one time.

    Args:
      score: any score of one example.
      sde: the forward process. With ``sde.levels(n)`` and the original weighting this is the loss
        of DDPM or SMLD at level i = (n - 1) t.
      x: one example, ``(*s)``.
      t: scalar time.
      key: for the draw of z; a key made from it goes to the score's stochastic layers.
      weighting: ``likelihood`` or ``original``.

    Returns:
      1/2 w(t) |sigma(t) s(x_t, t) + z|^2, summed over dimensions, in nats.
    """
    x = at_least_float32(x)
    z = _noise(key, x)
    s = of_shape(score(perturb(sde, x, t, z), t, stream(key, "dropout")), x)
    return residual(sde, s, t, z, weighting)


@checked
def dsm_batch(
    score: Score,
    sde: Kernel,
    x: Annotated[Batch, nonempty],
    t: Times,
    keys: Keys,
    *,
    weighting: Weighting = "likelihood",
    signs: Signs | None = None,
) -> Vector:
    """:func:`dsm` for ``x (n, *s)``, ``t (n,)``, ``keys (n,)``: n losses, one call of the score.

    The mathematics is written for one example and vmapped, and every example draws its noise from
    its own key. Only the network is called on the whole batch, because in reverse mode this is
    cheaper than a vmapped network (see ``sbml.types``). Without stochastic layers the result is
    that of ``vmap(dsm)``.

    ``signs (n,)`` of +1 and -1 multiply the noises. Two rows that differ in the sign only are
    antithetic: the gradient of their mean has less variance than that of two independent rows.
    """
    x = at_least_float32(x)
    z = jax.vmap(_noise)(keys, x)
    if signs is not None:
        z = jax.vmap(jnp.multiply)(signs, z)
    x_t = jax.vmap(lambda x, t, z: perturb(sde, x, t, z))(x, t, z)
    scores = batch_score(score)(x_t, t, stream(keys[0], "dropout"))
    return jax.vmap(lambda s, t, z: residual(sde, s, t, z, weighting))(scores, t, z)


def _noise(key: Key, x: Example) -> Example:
    """The noise z ``(*s)`` of a loss of the example ``x (*s)`` with this key."""
    return jax.random.normal(stream(key, "noise"), x.shape, x.dtype)
