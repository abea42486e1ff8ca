"""The evidence bound on -log P(k) of integers k themselves, from noise at the smallest time eps.

Let q_eps(.|k) be what the bin of k looks like at time eps, in the model's scale with c = 2 (k +
1/2) / L - 1, q_t its diffusion, and s any score. With x_t = alpha c + sigma n, n ~ q_t, and the
noise prediction e = -sigma s,

    -log P(k) <= KL(q_T || pi) + 1/2 int E |z* - e(x_t, t)|^2 dlambda  [+ decoder],
    z* = -sigma grad log q_t(x_t | k).

    truncated_normal   q_eps = N(alpha c, sigma^2) kept inside the bin: P(k) is the integral of
                       p_eps over the bin, nothing else is paid
    categorical        q_eps = N(alpha c, sigma^2), and a decoder, -E log P(k | x_eps), where
                       P(k | x_eps) ~ N(x_eps; alpha c_k, sigma^2) over the L levels (VDM)

For the normal, n = z* ~ N(0, I). For the truncated normal e ~ TN(-tau, tau) and z ~ N(0, I) give

    n = a e + b z,    a^2 = exp(lambda(t) - lambda(eps)),    b^2 = 1 - a^2,
    z* = n + r,       r = a / b [phi((tau - a n) / b) - phi((tau + a n) / b)] / [Phi(..) - Phi(..)].

|r|^2 has infinite variance near eps, but its mean is closed form: by de Bruijn's identity the
integral of 1/2 E |z*|^2 dlambda is an entropy difference. So only |n - e|^2 / 2 - r e is sampled.

References: Song et al. 2021, appendix on dequantization; Kingma et al., VDM, 2021, section 3.3.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.stats import norm
from jaxtyping import Float

from sbml import bits, compiler, scalars, times
from sbml.bound import Bound, GaussianControl, Reduction, prior_kl
from sbml.scalars import Number
from sbml.sdes import SDE
from sbml.types import Array, Elementwise, Example, Key, Pixels, Scalar, Score, deterministic

Real = Float[Array, "..."]

Decoder = Callable[[Array, Array, Array], Array]


TAU = 3.0  # standard deviations of the noise in half a bin, at the smallest time


def bin_log_snr(levels: int, tau: float = TAU) -> float:
    """lambda(eps) at which the noise's ``tau`` standard deviations fill half a bin."""
    return -2 * math.log(1 / (levels * tau))


def truncated_normal(e: Elementwise, tau: Number) -> Elementwise:
    """N(0, 1) truncated to [-tau, tau] by a monotone map of standard normal ``e``, any shape."""
    low = 0.5 * scalars.erfc(tau / math.sqrt(2))
    # Halves are mapped by symmetry: a probability near 1 has lost its digits.
    magnitude = -ndtri(low + (1 - 2 * low) * jax.scipy.special.ndtr(-jnp.abs(e)))
    return jnp.clip(jnp.sign(e) * magnitude, -tau, tau)


def smallest_time(sde: SDE, levels: int, eps: Number, tau: float = TAU) -> Number:
    """Where ``tau`` standard deviations of the noise fill half a bin, but not below ``eps``.

    Below ``eps`` the network was never trained; where ``eps`` is the later one, less than ``tau``
    of them do, and the bound holds too. With ``tau`` infinite it is ``eps`` itself: the bound of a
    model that was trained with its decoder at ``eps``, as VDM is.
    """
    if math.isinf(tau):
        return eps
    target = bin_log_snr(levels, tau)
    found = scalars.evaluated(lambda: sde.time(jnp.asarray(target)))
    return jnp.maximum(found, eps) if scalars.traced(found) else max(found, eps)


def tau(sde: SDE, levels: int, eps: Number) -> Number:
    """Half a bin in standard deviations of the noise at ``eps``: h / rho."""
    return scalars.exp(0.5 * _log_snr(sde, eps)) / levels


def edge_score(n: Elementwise, a: Real, b: Real, tau: Number) -> Elementwise:
    """r, what truncation adds to the normal's z*, elementwise; zero far inside the bin."""
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


def edge_constant(sde: SDE, eps: Number, tau: Number) -> Number:
    """1/2 int (E |z*|^2 - E |n|^2) dlambda of one dimension, in nats."""
    snr_range = _snr_range(sde, eps)
    ratio = scalars.exp(-snr_range)  # a^2 at T
    v = _variance(tau)
    z = scalars.erf(tau / math.sqrt(2))
    # Entropies of n at T and of e at eps; at T, n is normal to within a^8.
    last = 0.5 * scalars.log(2 * math.pi * math.e * (1 - ratio * (1 - v)))
    first = scalars.log(z) + 0.5 * math.log(2 * math.pi) + 0.5 * v
    # H(x_T) - H(x_eps) less the drift's d log(alpha_T / alpha_eps) leaves log(rho_T / rho_eps).
    fisher = last - first + 0.5 * snr_range
    return fisher - 0.5 * (snr_range - (1 - v) * (1 - ratio))


def _log_snr(sde: SDE, t: Number) -> Number:
    return scalars.evaluated(lambda: sde.log_snr(jnp.asarray(t)))


def _snr_range(sde: SDE, eps: Number) -> Number:
    return _log_snr(sde, eps) - _log_snr(sde, sde.largest_time)


def decoder_nats(x: Example, pixels: Pixels, levels: int, rho: Scalar) -> Scalar:
    """-log P(k | x) of noisy data x = c + rho z, shape ``(*s)``, summed: nats, a scalar."""
    compiler.check()
    centres = bits.to_model(jnp.arange(levels), 0.5, levels)
    logits = -0.5 * ((x[..., None] - centres.reshape((1,) * x.ndim + (-1,))) / rho) ** 2
    chosen = jnp.take_along_axis(logits, pixels[..., None].astype(jnp.int32), -1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)


def reconstruction(
    sde: SDE, noise: "Categorical", pixels: Pixels, eps: Scalar, z: Example
) -> Scalar:
    """-log P(pixels | x_eps) by the decoder, x_eps = alpha c + sigma z: nats, a scalar."""
    rho = jnp.exp(-0.5 * sde.log_snr(eps))
    return noise.nats(bits.to_model(pixels, 0.5, noise.levels) + rho * z, eps, pixels, rho)


def _normals(key: Key, n: int, centre: Example) -> tuple[Float[Array, " n 2 *s"], Example]:
    """Standard normal draws: two for each of ``n`` times ``(n, 2, *s)``, and the decoder's."""
    keys = jax.random.split(key, n + 1)
    pairs = jax.vmap(lambda key: jax.random.normal(key, (2, *centre.shape), centre.dtype))
    return pairs(keys[:-1]), jax.random.normal(keys[-1], centre.shape, centre.dtype)


def _draw(
    score: Score,
    sde: SDE,
    centre: Example,
    t: Scalar,
    normals: Float[Array, " 2 *s"],
    first: Scalar,
    tau: Number | None,
    control: GaussianControl | None,
) -> Scalar:
    """1/2 |n - e|^2 - r e at one time, less the control's; ``tau`` None for the normal, r = 0."""
    z0, z = normals
    gap = jnp.minimum(sde.log_snr(t) - first, -1e-12)
    a, b = jnp.exp(0.5 * gap), jnp.sqrt(-jnp.expm1(gap))
    mean, std = sde.marginal(centre, t)
    plain = a * z0 + b * z
    n = plain if tau is None else a * truncated_normal(z0, tau) + b * z
    noise = -std * deterministic(score, mean + std * n, t)
    error = 0.5 * jnp.sum((n - noise) ** 2)
    if tau is not None:
        error = error - jnp.sum(edge_score(n, a, b, tau) * noise)
    if control is None:
        return error
    # The control sees the noise before truncation, for which its integral is exact.
    return error - 0.5 * jnp.sum((plain - control.noise(sde, mean + std * plain, t)) ** 2)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal:
    """Noise kept inside the bin: of ``levels`` levels."""

    levels: int


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Noise around the bin's centre, and a decoder.

    Attributes:
      levels: L.
      decoder: -log P(pixels | y) in nats of (y, eps, pixels) with y = x_eps / alpha; None for that
        of the noise alone, :func:`decoder_nats`.
    """

    levels: int
    decoder: Decoder | None = None

    def nats(self, y: Array, eps: Array, pixels: Array, rho: Array) -> Array:
        """-log P(pixels | y), nats, a scalar."""
        if self.decoder is None:
            return decoder_nats(y, pixels, self.levels, rho)
        return self.decoder(y, eps, pixels)


def elbo(
    score: Score,
    sde: SDE,
    pixels: Array,
    key: Key,
    *,
    eps: float,
    u: Array,
    noise: TruncatedNormal | Categorical,
    reduction: Reduction = Reduction(),
) -> Bound:
    """The bound on -log P(pixels) for one example, of the integers' own probability.

    Its terms, in nats, need no change of variables to be added.

    Args:
      score: a score of one example, called deterministically.
      sde: the forward process.
      pixels: integers ``(*s)`` in 0 .. levels - 1.
      key: draws all noise.
      eps: the smallest time, for which :func:`smallest_time` is a good choice.
      u: points ``(n,)`` in [0, 1), each a draw of the diffusion term.
      noise: what the integers look like at eps, and their number of levels.
      reduction: as in ``bound.elbo``; it changes the variance only.

    Returns:
      prior, diffusion and reconstruction (the decoder; zero for the truncated normal), in nats.

    Raises:
      ValueError: as ``bound.elbo``; for pixels that are no integers.
    """
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise ValueError(f"pixels are {pixels.dtype}: give integers; bound.elbo is of real x")
    control = reduction.control
    t, weight = times.drawn(sde, eps, u, reduction.density, reduction.proposal)
    centre = bits.to_model(pixels, 0.5, noise.levels)
    width = tau(sde, noise.levels, eps) if isinstance(noise, TruncatedNormal) else None
    first = sde.log_snr(jnp.asarray(eps, centre.dtype))

    def draw(t: Array, normals: Array) -> Array:
        return _draw(score, sde, centre, t, normals, first, width, control)

    pairs, last = _normals(key, u.size, centre)
    diffusion = jnp.mean(weight * jax.vmap(draw)(t, pairs))
    if control is not None:
        diffusion = diffusion + control.integral(sde, centre, eps)
    if isinstance(noise, TruncatedNormal):
        width = tau(sde, noise.levels, eps)
        diffusion = diffusion + centre.size * edge_constant(sde, eps, width)
        variance = 1 - scalars.exp(-_snr_range(sde, eps)) * (1 - _variance(width))
        return Bound(prior_kl(sde, centre, variance), diffusion, jnp.zeros((), centre.dtype))
    decoder = reconstruction(sde, noise, pixels, jnp.asarray(eps, centre.dtype), last)
    return Bound(prior_kl(sde, centre), diffusion, decoder)
