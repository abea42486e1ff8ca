"""Samples by the probability-flow ODE, solved from t = T down to eps.

    x(T) ~ N(0, S^2 I),      dx/dt = v(x, t)

S is the standard deviation of the prior, and v is the velocity of the ODE (``sbml.ode``). The map
from latent to sample is the inverse of the map of ``likelihood.ode_logp``.
"""

import jax.numpy as jnp

from sbml.door import checked
from sbml.ode import Solver, Stats, transport
from sbml.scalars import Number
from sbml.sdes import SDE
from sbml.types import Example, Key, Scalar, Score, deterministic, predictor


def denoise(score: Score, sde: SDE, x: Example, t: Scalar) -> Example:
    """Tweedie's E[x_0 | x_t] = (x_t + sigma^2 s(x_t, t)) / alpha, shape ``(*s)``."""
    return predictions(score, sde, x, t)[0]


@checked
def predictions(score: Score, sde: SDE, x: Example, t: Scalar) -> tuple[Example, Example]:
    """E[x_0 | x_t] and E[z | x_t] = -sigma s(x_t, t) for x_t = alpha x_0 + sigma z.

    Both have shape ``(*s)``; the score is called once.
    """
    both = predictor(score)
    if both is not None:
        return both(x, t)
    noise = -sde.std(t) * deterministic(score, x, t)
    return (x - sde.std(t) * noise) / sde.mean_coef(t), noise


@checked
def decode(
    score: Score,
    sde: SDE,
    z: Example,
    *,
    eps: Number,
    solver: Solver = Solver(),
    denoise_last: bool = False,
) -> tuple[Example, Stats]:
    """The sample ``(*s)`` of the latent ``z (*s)``: one example, in the scale of the data.

    Args:
      score: a score of one example, called deterministically.
      sde: the forward process.
      z: the latent at T.
      eps: the smallest time, where the solve ends.
      solver: how the ODE is solved.
      denoise_last: whether the sample is E[x_0 | x_eps] (:func:`denoise`) instead of x_eps.

    Returns:
      The sample, NaN if the solver gave up, and the solver's stats.

    Raises:
      ValueError: eps is not in (0, T), or the score's shape is not that of ``z``.
    """
    sde.check_time(eps)
    x, stats = transport(score, sde, z, sde.T, eps, solver)
    return (denoise(score, sde, x, jnp.asarray(eps, x.dtype)) if denoise_last else x), stats


@checked
def ode_sample(
    score: Score,
    sde: SDE,
    shape: tuple[int, ...],
    key: Key,
    *,
    eps: Number,
    solver: Solver = Solver(),
    denoise_last: bool = False,
) -> tuple[Example, Stats]:
    """One sample of shape ``shape`` (:func:`decode`); ``key`` draws its latent. vmap over keys."""
    z = sde.prior_sample(key, shape)
    return decode(score, sde, z, eps=eps, solver=solver, denoise_last=denoise_last)
