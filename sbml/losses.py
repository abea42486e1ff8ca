"""Denoising score matching.

With x_t = alpha x + sigma z, z ~ N(0, I), a score s defines a noise prediction -sigma s, and

    loss(x, t, z) = 1/2 w(t) || sigma(t) s(x_t, t) + z ||^2

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

import jax
import jax.numpy as jnp
import numpy as np

from sbml import scalars
from sbml.sdes import Kernel
from sbml.streams import stream
from sbml.types import (
    Anything,
    Batch,
    Elementwise,
    Example,
    Key,
    Keys,
    Scalar,
    Score,
    Vector,
    at_least_float32,
    batch_score,
    check_example,
    check_floating,
    check_key,
    of_shape,
)

WEIGHTINGS = ("likelihood", "original")


def weight(sde: Kernel, t: Elementwise, weighting: str) -> Elementwise:
    """The weight w(t) of the squared noise-prediction error, elementwise.

    Raises:
      ValueError: for an unknown ``weighting``, the likelihood weighting with discrete noise levels
        (``sdes.Levels``), or times that are not floating-point numbers in (0, T].
    """
    sde.check_times(t)
    if weighting == "likelihood":
        return sde.rate(t)
    if weighting == "original":
        return jnp.ones_like(t)
    raise ValueError(f"unknown weighting {weighting!r}; choose from {WEIGHTINGS}")


def perturb(sde: Kernel, x: Example, t: Scalar, z: Example) -> Example:
    """x_t = alpha(t) x + sigma(t) z for one example, shape ``(*s)``.

    Raises:
      ValueError: if ``t`` is not a scalar, ``z`` has another shape than ``x``, or one of them is
        not of floating-point numbers.
    """
    check_example(x, t, z=z)
    mean, std = sde.marginal(x, t)
    return mean + std * z


def residual(sde: Kernel, score_xt: Anything, t: Scalar, z: Example, weighting: str) -> Scalar:
    """1/2 w(t) ||sigma(t) score + z||^2 in nats, a scalar.

    Raises:
      ValueError: if the score's shape is not that of ``z``, or ``t`` is not a scalar.
    """
    check_example(z, t, name="z")
    error = sde.std(t) * of_shape(score_xt, z) + z
    return 0.5 * weight(sde, t, weighting) * jnp.sum(error**2)


def dsm(
    score: Score, sde: Kernel, x: Example, t: Scalar, key: Key, *, weighting: str = "likelihood"
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
      1/2 w(t) ||sigma s(x_t, t) + z||^2, summed over dimensions, in nats.

    Raises:
      ValueError: if ``t`` is not a scalar, which would give wrong losses by broadcasting, if ``x``
        or ``t`` are not of floating-point numbers, if ``key`` is not a typed key, if the weighting
        is unknown, or if the score's shape is not that of ``x``.
    """
    check_example(x, t)
    x = at_least_float32(x)
    check_key(key)
    z = draw_noise(key, x)
    return residual(sde, score(perturb(sde, x, t, z), t, stream(key, "dropout")), t, z, weighting)


def dsm_batch(
    score: Score,
    sde: Kernel,
    x: Batch,
    t: Vector,
    keys: Keys,
    *,
    weighting: str = "likelihood",
    signs: Vector | None = None,
) -> Vector:
    """:func:`dsm` for ``x (n, *s)``, ``t (n,)``, ``keys (n,)``: n losses, one call of the score.

    The mathematics is written for one example and vmapped, and every example draws its noise from
    its own key. Only the network is called on the whole batch, because in reverse mode this is
    cheaper than a vmapped network (see ``sbml.types``). Without stochastic layers the result is
    that of ``vmap(dsm)``.

    ``signs (n,)`` of +1 and -1 multiply the noises. Two rows that differ in the sign only are
    antithetic: the gradient of their mean has less variance than that of two independent rows.

    Raises:
      ValueError: if there is no example, or not one scalar time, one key and one sign for each of
        them, ``x`` or ``t`` are not of floating-point numbers, a time is not in [0, T], or a sign
        is neither +1 nor -1. Values are not checked inside ``jit``. At time 0 the loss may not be
        finite.
    """
    x_t, z, score_key = noisy_batch(sde, x, t, keys, signs)
    scores = batch_score(score)(x_t, t, score_key)
    return jax.vmap(lambda s, t, z: residual(sde, s, t, z, weighting))(scores, t, z)


def draw_noise(key: Key, x: Example) -> Example:
    """The noise z ``(*s)`` of a loss of the example ``x (*s)`` with this key."""
    return jax.random.normal(stream(key, "noise"), x.shape, x.dtype)


def noisy_batch(
    sde: Kernel, x: Batch, t: Vector, keys: Keys, signs: Vector | None
) -> tuple[Batch, Batch, Key]:
    """The perturbed batch x_t and its noises z, each ``(n, *s)``, and the key of the score.

    Raises:
      ValueError: as in :func:`dsm_batch`.
    """
    _check_rows(x, t, keys, signs)
    sde.check_times(t)
    x = at_least_float32(x)
    z = jax.vmap(draw_noise)(keys, x)
    if signs is not None:
        z = jax.vmap(jnp.multiply)(signs, z)
    return jax.vmap(lambda x, t, z: perturb(sde, x, t, z))(x, t, z), z, stream(keys[0], "dropout")


def _check_rows(x: Batch, t: Anything, keys: Anything, signs: Anything | None) -> None:
    """Check that each of ``x (n, *s)`` has one time, key and sign; ``vmap`` would accept more axes.

    Raises:
      ValueError: if one of them has another shape, or other numbers.
    """
    check_example(x)
    check_floating(t, "t")
    if not x.ndim or jnp.shape(t) != (len(x),):
        raise ValueError(
            f"x has shape {x.shape}, t {jnp.shape(t)}: give a batch (n, *s) and its times (n,)"
        )
    if not len(x):
        raise ValueError(f"x has shape {x.shape}: give at least one example")
    check_key(keys, len(x))
    if signs is None:
        return
    if not hasattr(signs, "dtype") or signs.shape != (len(x),):
        kind = f"shape {signs.shape}" if hasattr(signs, "dtype") else f"type {type(signs).__name__}"
        raise ValueError(
            f"signs have {kind} for {len(x)} examples: give an array ({len(x)},) of +1 and -1"
        )
    if not scalars.is_traced(signs) and not np.all(np.abs(np.asarray(signs, float)) == 1):
        raise ValueError(f"signs are {np.asarray(signs)}: give +1 and -1")
