"""Integer denoising: a network predicts the levels of the pixels, and Bayes' rule gives the noise.

An entry of an image is an integer k of L levels. Its bin has the centre c_k = (2 k + 1) / L - 1 and
the half-width h = 1 / L. At time t the entry is observed with noise, as y = x_t / alpha = x + rho z
with rho = sigma / alpha. The network gives log-weights l_k of the levels, which play the part of a
prior that is computed from the other entries. The likelihood p(y | k) has a closed form, so

    p(k | y) = softmax_k [ l_k + log p(y | k) ],    x^ = sum_k p(k | y) m_k,    e^ = (y - x^) / rho,

where m_k = E[x | y, k], x^ is the prediction of x and e^ that of the noise z. For data at bin
centres (``centre``), and for data spread evenly over their bins (``uniform``),

    centre     log p(y | k) = -(c_k - y)^2 / (2 rho^2)                      m_k = c_k
    uniform    log p(y | k) = log [Phi(b_k) - Phi(a_k)]                     m_k = y + rho r_k,
               a_k, b_k = (c_k -+ h - y) / rho,
               r_k = [phi(a_k) - phi(b_k)] / [Phi(b_k) - Phi(a_k)]

up to terms that do not depend on k. Here phi and Phi are the density and the distribution function
of N(0, 1), and for ``uniform`` m_k is the mean of N(y, rho^2) truncated to the bin. If rho is far
smaller than a bin, p(k | y) puts all mass on one level, whatever the network says. If rho is far
larger, the network decides. At the smallest time p(k | y) is a decoder.

For few levels the network's outputs are the l_k themselves. For many levels they are the
log-weights w_j, shifts o_j and scales v_j (before a softplus) of a few normal distributions. Their
means and scales are relative to the posterior of x given y for data N(0, V), V = 1/4, which has the
mean kappa y and the standard deviation sqrt(V) u:

    l_k = log sum_j e^w_j N(c_k; mu_j, s_j^2),    kappa = V / (V + rho^2),    u = sqrt(1 - kappa),
    mu_j = kappa y + u (d_j + o_j),    s_j = 2 / L + 0.4 u log(1 + e^(v_j + 1/2)),

with the constants d_j = -0.8, -0.4, 0, 0.4, 0.8. So the outputs keep their size at every noise. If
rho is smaller than a bin, only the levels around y matter for x^. If it is larger, the sum over k
is replaced by an integral over [-1, 1], which has a closed form, so the memory does not grow with
L. The two differ for entries at the lowest or highest level: e^ by up to 0.2 for ``centre`` and by
up to 0.08 for ``uniform`` if rho is the width of one bin, and by up to 0.02 if it is that of four.

Reference: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, where the decoder has no
l_k.
"""

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float

from sbml.core import bits
from sbml.core.door import checked
from sbml.core.scalars import above_0, at_least, one_of
from sbml.core.types import AnyArray, Array, Example, Pixels, Real, Scalar

Levels = Annotated[int, at_least(2)]
Components = tuple[Array, Array, Array]  # of a mixture, each ``(COMPONENTS, *s)``
Outputs = Float[AnyArray, "*s outputs"]
Noise = Annotated[Real, above_0]

DATA = ("centre", "uniform")
Kind = Annotated[str, one_of(*DATA)]

# If a bin is narrower than this many standard deviations of the noise, its mass is computed by a
# series in its width: the difference of two distribution functions would lose its digits.
NARROW = 0.05

# Up to FEW levels, the network gives a logit for each level; for more levels, it gives a mixture of
# COMPONENTS normal distributions.
FEW, COMPONENTS = 32, 5

# The variance V of the normal data whose posterior a mixture is relative to, and the largest
# standard deviation of a component.
VARIANCE, WIDEST = 0.25, 10.0

STRETCH = 0.35  # of the series of the tail

# For a mixture, the sum over levels has NEAR levels on either side of y. If rho is at least WIDE
# half-widths of a bin, the integral replaces the sum. The decoder takes BLOCK levels at a time.
NEAR, WIDE, BLOCK = 4, 2.0, 16


@checked
def outputs(levels: Levels) -> int:
    """The number of the network's outputs for each entry of an image of ``levels`` levels."""
    return levels if levels <= FEW else 3 * COMPONENTS


@checked
def posterior_mean(out: Outputs, y: Example, rho: Noise, levels: Levels, data: Kind) -> Example:
    """x^ = E[x | y], shape ``(*s)``.

    Args:
      out: the network's outputs, ``(*s, outputs(levels))``.
      y: x_t / alpha, ``(*s)``.
      rho: sigma / alpha, broadcasting to ``y``.
      levels: L.
      data: ``centre`` or ``uniform``.
    """
    _check(out, levels)
    if levels <= FEW:
        log_p, means = _of_all(out, y, rho, levels, data)
        return jnp.sum(jnp.exp(log_p) * means, axis=-1)
    components = _components(out, y, rho, levels)
    log_p, means = _near(components, y, rho, levels, data)
    near = jnp.sum(jnp.exp(log_p) * means, axis=0)
    return jnp.where(rho < WIDE / levels, near, _integral(components, y, rho))


@checked
def decoder_nats(out: Outputs, y: Example, rho: Noise, pixels: Pixels, levels: Levels) -> Scalar:
    """-log p(k | y) of integers ``pixels (*s)`` at bin centres, summed over entries, in nats.

    The other arguments are those of :func:`posterior_mean`.
    """
    _check(out, levels)
    bits.check_pixels(pixels, levels)
    if levels <= FEW:
        log_p, _ = _of_all(out, y, rho, levels, "centre")
        log_p_pixels = jnp.take_along_axis(log_p, pixels[..., None].astype(jnp.int32), -1)[..., 0]
        return -jnp.sum(log_p_pixels)
    components = _components(out, y, rho, levels)
    at, std = y[None], jnp.broadcast_to(rho, y.shape)[None]

    def log_joint(k: Array) -> Array:
        """l_k + log p(y | k) of the levels ``k (m, *s)``, with the same shape."""
        centre = bits.to_model(k.astype(y.dtype), 0.5, levels)
        return _log_density(components, centre) - 0.5 * ((centre - at) / std) ** 2

    def add(total: Array, first: Array) -> tuple[Array, None]:
        k = _first(first + jnp.arange(BLOCK), y)
        block = jnp.where(k < levels, log_joint(k), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(block, axis=0)), None

    nothing = jnp.full(y.shape, -jnp.inf, y.dtype)
    total, _ = jax.lax.scan(add, nothing, jnp.arange(0, levels, BLOCK))
    return jnp.sum(total - log_joint(pixels[None])[0])


@checked
def decoder_log_p(
    out: Outputs, y: Example, rho: Noise, levels: Levels
) -> Float[Array, "*s {levels}"]:
    """log p(k | y) of all levels k, ``(*s, levels)``; the arguments are those of
    :func:`decoder_nats`."""
    _check(out, levels)
    if levels <= FEW:
        return _of_all(out, y, rho, levels, "centre")[0]
    components = _components(out, y, rho, levels)
    centre = bits.to_model(_first(jnp.arange(levels, dtype=y.dtype), y), 0.5, levels)
    log_joint = _log_density(components, centre) - 0.5 * ((centre - y[None]) / rho) ** 2
    return jnp.moveaxis(jax.nn.log_softmax(log_joint, axis=0), 0, -1)


def _check(out: Outputs, levels: int) -> None:
    if out.shape[-1] != outputs(levels):
        raise ValueError(
            f"out, which the network returned, has shape {out.shape}: an integer denoiser of "
            f"{levels} levels needs {outputs(levels)} numbers for each entry, as the last axis"
        )


def _of_all(out: Array, y: Array, rho: Array, levels: int, data: str) -> tuple[Array, Array]:
    """log p(k | y) and m_k for all levels, each ``(*s, levels)``."""
    k = jnp.arange(levels, dtype=y.dtype).reshape((1,) * y.ndim + (-1,))
    centre, rho = bits.to_model(k, 0.5, levels), jnp.broadcast_to(rho, y.shape)[..., None]
    log_likelihood, means = bin_moments(centre, y[..., None], rho, levels, data)
    return jax.nn.log_softmax(out + log_likelihood, axis=-1), means


def _near(
    components: Components, y: Array, rho: Array, levels: int, data: str
) -> tuple[Array, Array]:
    """log p(k | y) and m_k of the levels k around y, each ``(2 NEAR + 1, *s)``.

    For a rho of WIDE / levels or more, the integral replaces the sum. There y is replaced by 0 and
    rho by WIDE / levels, because the gradient of the sum may be infinite for a y far outside.
    """
    y = jnp.where(rho < WIDE / levels, y, 0.0)[None]
    rho = jnp.broadcast_to(jnp.minimum(rho, WIDE / levels), y.shape[1:])[None]
    nearest = jnp.round(((jax.lax.stop_gradient(y) + 1) * levels - 1) / 2)
    nearest = jnp.clip(nearest, NEAR, levels - 1 - NEAR)
    k = nearest + _first(jnp.arange(-NEAR, NEAR + 1, dtype=y.dtype), y[0])
    means = centre = bits.to_model(k, 0.5, levels)
    if data == "centre":
        log_likelihood = -0.5 * ((centre - y) / rho) ** 2
    else:
        ends = (centre - 1 / levels - y) / rho, (centre + 1 / levels - y) / rho
        log_likelihood, standard = _between(*ends)
        log_likelihood, means = jax.lax.optimization_barrier((log_likelihood, y + rho * standard))
    log_p = jax.nn.log_softmax(_log_density(components, centre) + log_likelihood, axis=0)
    return log_p, means


def _log_density(components: Components, centre: Array) -> Array:
    """l_k, up to a constant, of the levels at ``centre (m, *s)`` or ``(m, 1, ..., 1)``."""
    log_w, mu, scale = (c[None] for c in components)
    each = log_w - jnp.log(scale) - 0.5 * ((centre[:, None] - mu) / scale) ** 2
    largest = jax.lax.stop_gradient(jnp.max(each, 1, keepdims=True))
    return largest[:, 0] + jnp.log(jnp.sum(jnp.exp(each - largest), 1))


def _integral(components: Components, y: Array, rho: Array) -> Array:
    """E[x | y] for a density sum_j w_j N(mu_j, s_j^2) of x on [-1, 1], ``(*s)``."""
    log_w, mu, scale = components
    y, noise = y[None], jnp.broadcast_to(rho, y.shape)[None] ** 2
    variance = scale**2 + noise
    means, stds = (mu * noise + y * scale**2) / variance, scale * jnp.sqrt(noise / variance)
    log_mass, standard = _between((-1 - means) / stds, (1 - means) / stds)
    log_p = log_w - 0.5 * jnp.log(variance) - 0.5 * (y - mu) ** 2 / variance + log_mass
    return jnp.sum(jax.nn.softmax(log_p, axis=0) * (means + stds * standard), axis=0)


def _components(out: Array, y: Array, rho: Array, levels: int) -> Components:
    """log-weights (up to a constant), means and scales, each ``(COMPONENTS, *s)``."""
    # The axis of the components comes first, so that sums over it run along the pixels. The barrier
    # makes XLA compute the components once; otherwise it would compute them for every level again.
    log_w, shift, log_scale = jnp.split(jnp.moveaxis(out, -1, 0), 3)
    start = _first(jnp.linspace(-0.8, 0.8, COMPONENTS, dtype=out.dtype), y)
    total = VARIANCE + jnp.broadcast_to(rho, y.shape)[None] ** 2
    unit = rho / jnp.sqrt(total)
    mu = VARIANCE / total * y[None] + unit * (start + shift)
    # A component's scale is at least the width of a bin: the sum over levels could miss a narrower
    # component. It is at most about WIDEST: such a component is nearly constant on [-1, 1], and its
    # mass there still has enough digits.
    softplus = jnp.log(1 + jnp.exp(jnp.minimum(log_scale + 0.5, WIDEST / 0.4)))
    return jax.lax.optimization_barrier((log_w, mu, 2 / levels + 0.4 * unit * softplus))


def _first(v: Array, y: Array) -> Array:
    """``v (m,)`` with shape ``(m, 1, ..., 1)``: a new first axis before the axes of ``y (*s)``."""
    return v.reshape((-1,) + (1,) * y.ndim)


def bin_moments(centre: Real, y: Real, rho: Real, levels: int, data: str) -> tuple[Real, Real]:
    """log p(y | k), up to terms that do not depend on k, and m_k for bins at ``centre``.

    The shapes of ``centre``, ``y`` and ``rho`` broadcast, and the results have the common shape.
    """
    if data == "centre":
        return -0.5 * ((centre - y) / rho) ** 2, jnp.broadcast_to(centre, (centre - y).shape)
    middle, width = (centre - y) / rho, 2 / (levels * rho)
    narrow = width < NARROW
    log_mass, mean = _narrow(middle, jnp.where(narrow, width, NARROW))
    half = jnp.where(narrow, NARROW, width) / 2
    wide_mass, wide_mean = _between(middle - half, middle + half)
    return (jnp.where(narrow, log_mass, wide_mass), y + rho * jnp.where(narrow, mean, wide_mean))


def _log_phi(z: Array) -> Array:
    return -0.5 * (z**2 + math.log(2 * math.pi))


def _narrow(m: Array, w: Array) -> tuple[Array, Array]:
    """log mass and mean of N(0, 1) on [m - w / 2, m + w / 2], by Taylor's series at m:

    mass = phi(m) w [1 + w^2 / 24 He_2(m) + w^4 / 1920 He_4(m)],
    mean = m - [w^2 / 12 m + w^4 / 480 (m^3 - 3 m)] phi(m) w / mass
    """
    v = w**2
    mass = 1 + v / 24 * (m**2 - 1) + v**2 / 1920 * (m**4 - 6 * m**2 + 3)
    slope = v / 12 * m + v**2 / 480 * (m**3 - 3 * m)
    return _log_phi(m) + jnp.log(w) + jnp.log(mass), m - slope / mass


def _between(a: Array, b: Array) -> tuple[Array, Array]:
    """log mass and mean of N(0, 1) on [a, b], elementwise, for b - a of at least NARROW.

    It does not use ``log1p`` and ``expm1``, which such a width does not need. XLA for CPU
    vectorizes neither them nor the operations around them, which would cost five times as much.
    """
    # Reflect the interval so that most of it is below 0, where distribution functions are small.
    left = a + b < 0
    near, far = jnp.where(left, b, -a), jnp.where(left, a, -b)
    tail, beyond = _log_tail(jnp.abs(near)), _log_tail(jnp.abs(far))
    base = jnp.where(near < 0, tail, 0.0)
    mass = jnp.where(near < 0, 1.0, 1.0 - jnp.exp(tail)) - jnp.exp(beyond - base)
    log_mass = base + jnp.log(mass)
    return log_mass, jnp.exp(_log_phi(a) - log_mass) - jnp.exp(_log_phi(b) - log_mass)


@jax.custom_jvp
def _log_tail(x: Array) -> Array:
    """log Phi(-x) for x >= 0, elementwise, to rounding.

    At a fraction of ``log_ndtr``'s cost it is

        -x^2 / 2 + log r + P(2 r - 1),    r = 1 / (1 + STRETCH x),    P a polynomial
    """
    r = 1 / (1 + STRETCH * x)
    p = jnp.zeros_like(x)
    # The errors are within 1e-14 in float64, and 1e-8 in float32.
    for c in _fitted_tail(24 if x.dtype == jnp.float64 else 12):
        p = p * (2 * r - 1) + c
    return p + jnp.log(r) - 0.5 * x**2


@_log_tail.defjvp
def _log_tail_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    value = _log_tail(x)
    return value, -jnp.exp(_log_phi(x) - value) * x_dot


@functools.cache
def _fitted_tail(degree: int) -> list[float]:
    """The coefficients of P, highest first, by least squares at Chebyshev's points."""
    points = 4 * degree
    v = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    x = (2 / (v + 1) - 1) / STRETCH
    exact = np.log(scipy.special.erfcx(x / math.sqrt(2)) / 2) - np.log((v + 1) / 2)
    series = np.polynomial.Chebyshev.fit(v, exact, degree, domain=[-1, 1])
    return series.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()
