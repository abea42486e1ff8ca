"""Second-order denoising score matching: training the divergence that the ODE's likelihood needs.

With x_t = alpha x + sigma z, the true score of any linear SDE has

    sigma^2 div s(x_t) + d = tr Cov[z | x_t] = E[ |sigma s(x_t) + z|^2 | x_t ],

so that, for the true score,

    r = sigma^2 div s(x_t) + d - |sigma s(x_t) + z|^2      has      E[r | x_t] = 0.

The log-likelihood of the probability-flow ODE contains the integral of 1/2 sigma^2 div s over
log-SNR. For any score s and the true score s*,

    E[r | x_t] = sigma^2 div(s - s*) - sigma^2 |s - s*|^2,

so up to a term of second order, r is twice the error of this integrand, plus noise. The loss of one
example of d entries is

    1 / (2 d) w(t) r^2,      where |sigma s + z|^2 in r is held constant,

with the weight w of ``sbml.losses``. The division lets it grow like d, as the first-order loss
does. An error of the score that oscillates fast in x changes this loss more than the first-order
one.

*Velocity.* For alpha^2 + sigma^2 = 1 and the prediction F^ of F = alpha z - sigma x this is the
form of i-DODE, which adds 0.1 times this loss to the first-order one: w alpha^2 is the weight of
|F - F^|^2, and r = -alpha [sigma div F^ - alpha (d - |F - F^|^2)].

*Probes.* With one probe v for div s ~ v^T J v, the expectation of r^2 has one term more, which for
random signs and a symmetric J is 2 sigma^4 sum_{i != j} J_ij^2. So at the minimum, the entries of J
off the diagonal would be too small. The product r_1 r_2 of two independent probes has the
expectation of the exact r^2.

References: Lu et al., "Maximum Likelihood Training for Score-Based Diffusion ODEs by High-Order
Denoising Score Matching", ICML 2022; Zheng et al., "Improved Techniques for Maximum Likelihood
Estimation for Diffusion ODEs", ICML 2023 (one probe).
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from sbml import losses
from sbml.core.door import checked
from sbml.core.scalars import Count, nonempty
from sbml.core.streams import stream
from sbml.core.types import (
    Batch,
    Example,
    Key,
    Keys,
    Scalar,
    Score,
    Times,
    Vector,
    at_least_float32,
    batch_score,
    of_shape,
)
from sbml.losses import Signs, Weighting
from sbml.score import divergence
from sbml.score.divergence import Probes
from sbml.sdes import Kernel


@checked
def residuals(sde: Kernel, score_xt: Example, forms: Vector, t: Scalar, z: Example) -> Vector:
    """r for each estimate of div s in ``forms (k,)``, shape ``(k,)``.

    The gradient treats |sigma s + z|^2 in r as a constant.
    """
    std = sde.std(t)
    error = jnp.sum((std * score_xt + z) ** 2)
    return std**2 * forms + (z.size - jax.lax.stop_gradient(error))


@checked
def squared_residual(r: Annotated[Vector, nonempty]) -> Scalar:
    """An estimate of the exact r^2 from the residuals ``r (k,)`` of k probes, a scalar.

    It is r_1^2 for k = 1, and otherwise r_1 r_2, where r_2 is the mean of all residuals but the
    first. The gradient is 2 r_2 grad r_1. Its expectation is that of grad (r_1 r_2), because the
    residuals are independent and have the same expectation.
    """
    r = jnp.asarray(r)
    other = jax.lax.stop_gradient(jnp.mean(r[1:]) if r.size > 1 else r[0])
    return 2 * r[0] * other - jax.lax.stop_gradient(r[0] * other)


@checked
def loss(
    score: Score,
    sde: Kernel,
    x: Example,
    t: Scalar,
    key: Key,
    vs: Batch,
    *,
    weighting: Weighting = "likelihood",
) -> Scalar:
    """w(t) r^2 / (2 d) of one example of d entries at one time, in the unit of ``losses.dsm``.

    Args:
      score: any score of one example.
      sde: the forward process.
      x: one example, ``(*s)``.
      t: scalar time.
      key: as in ``losses.dsm``, which draws the same z from the same key, and gives the same key to
        the score's stochastic layers.
      vs: the probes ``(k, *s)``, independent of each other. With two or more, the expectation is
        that of the loss with the exact divergence.
      weighting: ``likelihood`` or ``original``.
    """
    x = at_least_float32(x)
    z, score_key = losses.draw_noise(key, x), stream(key, "dropout")
    x_t = losses.perturb(sde, x, t, z)
    vs = jnp.asarray(vs, x_t.dtype)  # x may have been given in a lower precision.
    s, forms = divergence.quadratic_forms(lambda x: of_shape(score(x, t, score_key), x), x_t, vs)
    weight = losses.weight(sde, t, weighting)
    return weight * squared_residual(residuals(sde, s, forms, t, z)) / (2 * x.size)


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
    probes: Count = 2,
) -> tuple[Vector, Vector]:
    """The losses of first and second order, each ``(n,)``, by one call of the network.

    The first are those of ``losses.dsm_batch``, with the same draws. The second are
    w(t) r^2 / (2 d), with ``probes`` independent Rademacher probes for each example, which are
    drawn from its key.
    """
    x_t, z, score_key = losses.noisy_batch(sde, x, t, keys, signs)
    network = batch_score(score)
    scores, tangent = jax.linearize(lambda x: network(x, t, score_key), x_t)
    vs = jax.vmap(lambda key: _signs(key, probes, x_t[0]), out_axes=1)(keys)
    forms = [jax.vmap(jnp.vdot)(v, tangent(v)) for v in vs]
    # ``squared_residual`` needs no gradient of these. If it is stopped here, it is not computed.
    forms[1:] = map(jax.lax.stop_gradient, forms[1:])

    def orders(s: Example, forms: Vector, t: Scalar, z: Example) -> tuple[Scalar, Scalar]:
        r2 = squared_residual(residuals(sde, s, forms, t, z))
        first = losses.residual(sde, s, t, z, weighting)
        return first, losses.weight(sde, t, weighting) * r2 / (2 * z.size)

    return jax.vmap(orders)(scores, jnp.stack(forms, axis=1), t, z)


def _signs(key: Key, count: int, like: Example) -> Probes:
    """``(count, *s)`` independent random signs, which are independent of the noise from ``key``."""
    return jax.random.rademacher(stream(key, "probes"), (count, *like.shape), like.dtype)
