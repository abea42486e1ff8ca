"""The evidence bound on -log P(k) of the integers k themselves, in nats.

Let c = 2 (k + 1/2) / L - 1 be the centre of k's bin in the model's scale, q_eps(.|k) a distribution
of noise around alpha c at the smallest time eps, q_t its diffusion to time t, and s any score. With
x_t = alpha c + sigma n distributed as q_t, and the noise prediction e = -sigma s,

    -log P(k) <= KL(q_T || pi) + 1/2 int E |z* - e(x_t, t)|^2 dlambda  [+ decoder],
    z* = -sigma grad log q_t(x_t | k).

    truncated_normal   q_eps = N(alpha c, sigma^2) truncated to the bin. P(k) is the integral of
                       p_eps over the bin, so there is no further term.
    categorical        q_eps = N(alpha c, sigma^2). The further term is the decoder's,
                       -E log P(k | x_eps), where P(k | x_eps) is proportional to
                       N(x_eps; alpha c_k, sigma^2) over the L levels, as in VDM.

For the normal, n = z* ~ N(0, I). For the truncated normal e ~ TN(-tau, tau) and z ~ N(0, I) give

    n = a e + b z,    a^2 = exp(lambda(t) - lambda(eps)),    b^2 = 1 - a^2,
    z* = n + r,       r = a / b [phi((tau - a n) / b) - phi((tau + a n) / b)] / [Phi(..) - Phi(..)].

|r|^2 has infinite variance near eps, but its mean has a closed form: by de Bruijn's identity the
integral of 1/2 E |z*|^2 dlambda is a difference of two entropies. So the integral of
1/2 (|z*|^2 - |n|^2) is added as a constant (:func:`edge_constant`), and only the rest of
1/2 |z* - e|^2, which is 1/2 |n - e|^2 - r e, is sampled.

References: Song et al. 2021, appendix on dequantization; Kingma et al., VDM, 2021, section 3.3.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.stats import norm
from jaxtyping import Float

from sbml.core import bits, scalars
from sbml.core.door import checked, shown, typed
from sbml.core.scalars import Number, above_0, at_least
from sbml.core.streams import stream
from sbml.core.types import (
    Array,
    Elementwise,
    Example,
    Key,
    Pixels,
    Real,
    Scalar,
    Score,
    Vector,
    deterministic,
)
from sbml.likelihood.bound import Bound, Reduction, Steps, mean_over_times, prior_kl
from sbml.sdes import SDE

Levels = Annotated[int, at_least(2)]
Tau = Annotated[Number, above_0]
Decoder = Callable[[Array, Array, Array], Array]  # (y, eps, pixels) -> nats, see Categorical

TAU = 3.0  # half a bin at the smallest time, in standard deviations of the noise


@checked
def bin_log_snr(levels: Levels, tau: Tau = TAU) -> Number:
    """The log-SNR at which half a bin is ``tau`` standard deviations of the noise wide."""
    return 2 * scalars.log(levels * tau)


@checked
def truncated_normal(e: Elementwise, tau: Tau) -> Elementwise:
    """Map standard normal ``e`` monotonically to N(0, 1) truncated to [-tau, tau]; any shape."""
    low = 0.5 * scalars.erfc(tau / math.sqrt(2))
    # The positive half is mapped by symmetry, since a probability near 1 has lost its digits.
    magnitude = -ndtri(low + (1 - 2 * low) * jax.scipy.special.ndtr(-jnp.abs(e)))
    return jnp.clip(jnp.sign(e) * magnitude, -tau, tau)


@checked
def smallest_time(sde: SDE, levels: Levels, eps: Number, tau: Tau = TAU) -> Number:
    """The time at which half a bin is ``tau`` standard deviations of the noise, at least ``eps``.

    Below ``eps`` the network was not trained. If ``eps`` is the larger of the two times, half a bin
    is narrower than ``tau`` standard deviations at the result, and the bound is still valid. With
    infinite ``tau`` the result is ``eps`` itself. This fits a model whose decoder was trained at
    ``eps``, such as VDM.
    """
    sde.check_time(eps)
    target = bin_log_snr(levels, tau)
    return scalars.maximum(scalars.constant(lambda: sde.time(jnp.asarray(target))), eps)


@checked
def tau(sde: SDE, levels: Levels, eps: Number) -> Number:
    """The width of half a bin in standard deviations of the noise at ``eps``: h / rho."""
    sde.check_time(eps)
    return scalars.exp(0.5 * _log_snr(sde, eps)) / levels


@checked
def edge_score(n: Elementwise, a: Real, b: Real, tau: Tau) -> Elementwise:
    """r = z* - n, the part of z* that truncation causes, elementwise; 0 far inside the bin."""
    m = jnp.abs(a * n)
    near, far = (tau - m) / b, (tau + m) / b
    hazard = jnp.exp(norm.logpdf(near) - log_ndtr(near))
    opposite = jnp.exp(log_ndtr(-far) - log_ndtr(near))
    both = -jnp.expm1(-2 * tau * m / b**2)
    return jnp.sign(n) * (a / b) * hazard * both / (1 - opposite)


def _variance(tau: Number) -> Number:
    """The variance of N(0, 1) truncated to [-tau, tau]."""
    z = scalars.erf(tau / math.sqrt(2))
    return 1 - 2 * tau * scalars.exp(-(tau**2) / 2) / (math.sqrt(2 * math.pi) * z)


@checked
def edge_constant(sde: SDE, eps: Number, tau: Tau) -> Number:
    """1/2 int (E |z*|^2 - E |n|^2) dlambda for one dimension, in nats."""
    sde.check_time(eps)
    snr_range = _snr_range(sde, eps)
    ratio = scalars.exp(-snr_range)  # a^2 at T
    v = _variance(tau)
    z = scalars.erf(tau / math.sqrt(2))
    # The entropies of n at T and of e at eps. At T, n is normal up to a term of order a^8.
    last = 0.5 * scalars.log(2 * math.pi * math.e * (1 - ratio * (1 - v)))
    first = scalars.log(z) + 0.5 * math.log(2 * math.pi) + 0.5 * v
    # H(x_T) - H(x_eps) minus the drift's log(alpha_T / alpha_eps) leaves log(rho_T / rho_eps).
    fisher = last - first + 0.5 * snr_range
    return fisher - 0.5 * (snr_range - (1 - v) * (1 - ratio))


def _log_snr(sde: SDE, t: Number) -> Number:
    return scalars.constant(lambda: sde.log_snr(jnp.asarray(t, jnp.result_type(t, float))))


def _snr_range(sde: SDE, eps: Number) -> Number:
    return _log_snr(sde, eps) - _log_snr(sde, sde.largest_time)


@checked
def decoder_nats(
    x: Example, pixels: Pixels, levels: Levels, rho: Annotated[Scalar, above_0]
) -> Scalar:
    """-log P(k | x), summed over the integers k of an image, where x = c + rho z ``(*s)`` and c are
    the centres of their bins: nats, a scalar."""
    bits.check_pixels(pixels, levels)
    log_p = decoder_log_p(x, levels, rho)
    return -jnp.sum(jnp.take_along_axis(log_p, pixels[..., None].astype(jnp.int32), -1))


@checked
def decoder_log_p(
    x: Example, levels: Levels, rho: Annotated[Scalar, above_0]
) -> Float[Array, "*s {levels}"]:
    """log P(k | x) of all levels k for noisy data x = c + rho z, ``(*s, levels)``, in nats."""
    centres = bits.to_model(jnp.arange(levels), 0.5, levels)
    logits = -0.5 * ((x[..., None] - centres.reshape((1,) * x.ndim + (-1,))) / rho) ** 2
    return jax.nn.log_softmax(logits, axis=-1)


@checked
def reconstruction(
    sde: SDE, noise: "Categorical", pixels: Pixels, eps: Scalar, z: Example
) -> Scalar:
    """-log P(pixels | x_eps) by the decoder, x_eps = alpha c + sigma z: nats, a scalar."""
    sde.check_time(eps)
    rho = jnp.exp(-0.5 * sde.log_snr(eps))
    y = bits.to_model(pixels, 0.5, noise.levels) + rho * z
    if noise.decoder is None:
        return decoder_nats(y, pixels, noise.levels, rho)
    return noise.decoder(y, eps, pixels)


@typed
@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
    """Normal noise truncated to the bin of an integer that has ``levels`` levels."""

    levels: Levels


@typed
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Normal noise around the bin's centre, and a decoder.

    Attributes:
      levels: the number of levels L.
      decoder: a function of (y, eps, pixels) with y = x_eps / alpha that gives -log P(pixels | y)
        in nats; None for :func:`decoder_nats`, which needs no network.
    """

    levels: Levels
    decoder: Decoder | None = None


def _normals(key: Key, n: int, centre: Example) -> tuple[Float[Array, " n 2 *s"], Example]:
    """Standard normal draws: two for each of ``n`` times ``(n, 2, *s)``, one for the decoder."""
    pairs = jax.random.normal(stream(key, "noise"), (n, 2, *centre.shape), centre.dtype)
    last = jax.random.normal(stream(key, "reconstruction"), centre.shape, centre.dtype)
    return pairs, last


@checked
def elbo(
    score: Score,
    sde: SDE,
    pixels: Pixels,
    key: Key,
    *,
    eps: Number,
    u: Vector,
    noise: TruncatedNormal | Categorical,
    reduction: Reduction = Reduction(),
    steps: int | Steps | None = None,
) -> Bound:
    """The bound on -log P(pixels), a probability of integers, for one example; vmap over more.

    The sum of its terms bounds -log P(pixels) itself, without a change of variables.

    Args:
      score, sde, u, reduction: as in ``bound.elbo``.
      pixels: integers ``(*s)`` in 0 .. levels - 1.
      key: for all random draws.
      eps: the smallest time, for which :func:`smallest_time` is a good choice.
      noise: the distribution q_eps of the noise at eps, and the number of levels.
      steps: as in ``bound.elbo``, the bound of a chain in discrete time, for the categorical noise.

    Returns:
      prior, diffusion and reconstruction (the decoder; zero for the truncated normal), in nats.
    """
    control = reduction.control
    if steps is not None and isinstance(noise, TruncatedNormal):
        raise ValueError(
            f"steps={shown(steps)} with {noise}: the bound in discrete time is for Categorical "
            "noise; give that, or no steps"
        )
    centre = bits.to_model(pixels, 0.5, noise.levels)
    width = tau(sde, noise.levels, eps) if isinstance(noise, TruncatedNormal) else None
    log_snr_eps = sde.log_snr(jnp.asarray(eps, centre.dtype))

    def draw(t: Scalar, normals: Float[Array, " 2 *s"]) -> Scalar:
        """1/2 |n - e|^2 - r e at one time, where r = 0 for the normal that is not truncated, minus
        the control's error if there is a control."""
        z0, z = normals
        gap = jnp.minimum(sde.log_snr(t) - log_snr_eps, -1e-12)
        a, b = jnp.exp(0.5 * gap), jnp.sqrt(-jnp.expm1(gap))
        mean, std = sde.marginal(centre, t)
        plain = a * z0 + b * z
        n = plain if width is None else a * truncated_normal(z0, width) + b * z
        e = -std * deterministic(score, mean + std * n, t)
        error = 0.5 * jnp.sum((n - e) ** 2)
        if width is not None:
            error = error - jnp.sum(edge_score(n, a, b, width) * e)
        if control is None:
            return error
        # The control takes the noise before truncation, for which its integral is exact.
        return error - control.error(sde, mean + std * plain, t, plain)

    pairs, last = _normals(key, u.size, centre)
    diffusion = mean_over_times(draw, pairs, sde, centre, eps, u, reduction, steps)
    if isinstance(noise, TruncatedNormal):
        assert width is not None
        diffusion = diffusion + centre.size * edge_constant(sde, eps, width)
        variance = 1 - scalars.exp(-_snr_range(sde, eps)) * (1 - _variance(width))
        return Bound(prior_kl(sde, centre, variance), diffusion, jnp.zeros((), centre.dtype))
    decoder = reconstruction(sde, noise, pixels, jnp.asarray(eps, centre.dtype), last)
    return Bound(prior_kl(sde, centre), diffusion, decoder)
