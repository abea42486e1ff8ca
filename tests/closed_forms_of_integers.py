"""Checks of the estimators for integers k of L levels against the exact P(k).

The model's density p of x is a diagonal Gaussian, so P(k) is a product of the normal probabilities
of bins. With x = 2 (k + u) / L - 1 and any dequantizer q, weights and bounds are

    w = p(x) (2 / L)^d / q(u | k),    E_q w 1(u in A) = P(k + u, u in A),
    -log P(k) <= E[-log (1/K) sum_i w_i],    tighter for larger K,

where p(x) = p_eps(x), or alpha^d p_eps(alpha x) if x and the dequantizer's noise are those of the
diffusion at time eps (``at_noise``). The bounds of ``sbml.discrete`` need no dequantizer. With q_t,
the diffusion of a point or of noise inside the bin of k, and with the exact score,

    E bound = KL(q_eps || p_eps) + E_{q_T} log(p_T / pi) [- E log P(k | x_eps)].

Expectations are by Monte Carlo from fixed keys; tolerances are five standard errors.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import jit
from scipy import integrate, special, stats

from sbml.audit import oracle
from sbml.audit.oracle import coefficients
from sbml.audit.table import EPS, Row, row
from sbml.core import bits
from sbml.core.types import Array, Key
from sbml.dequantizers import DEQUANTIZERS, has_density
from sbml.likelihood import bound, discrete
from sbml.score import integers
from sbml.sdes import SDE, SDES, times


def bounding(name: str, sde: str, got: float, truth: float, looser: float, tolerance: float) -> Row:
    """The comparison truth <= got <= looser, where ``looser`` is a looser bound: the error is the
    distance of ``got`` from this interval, divided by max(1, |truth|)."""
    error = float(np.maximum(np.maximum(truth - got, got - looser), 0.0) / max(1.0, abs(truth)))
    return Row(name, sde, float(got), float(truth), error, tolerance, bool(error <= tolerance))


LEVELS, SHAPE, IMAGES, DRAWS = 8, (1, 2, 1), 4, 16_384
SIZE = math.prod(SHAPE)
SAMPLES = (1, 4, 16)
MEAN, STD = np.array([-0.4, 0.3]), np.array([0.15, 0.35])  # of the entries of x_0, (SIZE,)
# Integers (IMAGES, SIZE) that are probable under the data, and the centres of their bins.
PIXELS = np.array([[2, 6], [1, 4], [3, 5], [2, 2]])
CENTRES = (2 * PIXELS + 1) / LEVELS - 1
# Fields of dequantizers that differ from the defaults: here the smallest network.
OPTIONS = {
    "variational": {"filters": 4, "components": 2, "blocks": 1, "heads": 1, "levels": LEVELS}
}


def gaussian(sde: SDE) -> oracle.Gaussian:
    """The model: x of shape ``(SIZE,)`` with independent entries."""
    return oracle.Gaussian(sde, jnp.asarray(MEAN), jnp.asarray(STD**2), jnp.eye(SIZE))


def images() -> Array:
    """``PIXELS`` as images ``(IMAGES, *SHAPE)``."""
    return jnp.asarray(PIXELS.reshape(-1, *SHAPE))


def _log_mass(low: np.ndarray, high: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """log P(low < k + u < high) under x ~ N(mean, std^2), elementwise."""
    ends = ((2 * end / LEVELS - 1 - mean) / std for end in (high, low))
    return np.log(np.subtract(*map(special.ndtr, ends)))


def _log_probability(mean: np.ndarray, variances: np.ndarray, edge: float = 0.0) -> np.ndarray:
    """log P(k + u with u in [edge, 1 - edge]^d) under x ~ N(mean, diag(variances)), for every
    image: ``(IMAGES,)``."""
    return _log_mass(PIXELS + edge, PIXELS + 1 - edge, mean, np.sqrt(variances)).sum(1)


@jit
def _log_density(data: oracle.Gaussian, x: Array, alpha: Array, t: Array) -> Array:
    """log alpha^d p_t(alpha x) of ``x (..., *SHAPE)``."""
    flat = x.reshape(-1, SIZE)
    return jax.vmap(lambda x: data.logp(alpha * x, t))(flat).reshape(x.shape[: -len(SHAPE)]) + (
        SIZE * jnp.log(alpha)
    )


def parameters(model: Any) -> Any:
    """Random parameters that keep every layer close to the identity. They replace the model's
    initialisers, which take longer to compile."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images())

    def draw(path: Any, leaf: Any) -> Array:
        unit = 1.0 if path[-1].key in {"scale", "W0", "W1"} else 0.0
        return jnp.asarray(unit + 0.1 * rng.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jit, static_argnames="model")
def samples(model: Any, params: Any, pixels: Array, key: Key) -> tuple[Array, Array]:
    """u ``(IMAGES, DRAWS, *SHAPE)`` and log q ``(IMAGES, DRAWS)``."""
    keys = jax.random.split(key, (IMAGES, DRAWS))
    return jax.vmap(jax.vmap(functools.partial(model.sample, params), (None, 0)))(pixels, keys)


def _tolerance(draws: np.ndarray, truth: float) -> float:
    """Five standard errors of the mean of ``draws (IMAGES, n)``, in the unit of a row's error."""
    error = math.sqrt(np.sum(draws.var(1)) / draws.shape[1]) / IMAGES
    return 5 * error / max(1.0, abs(truth))


def weight_rows(
    name: str, sde: SDE, label: str, model: Any, u: Array, log_q: Array
) -> Iterator[Row]:
    """The mean weight of u in the middle of the bin, and the bounds with K weights.

    At the edges of the bin q(u | k) may be so small that the variance of the weights is infinite.
    """
    eps, scale = EPS, 1.0
    if model.at_noise:
        eps = float(sde.time(jnp.asarray(discrete.bin_log_snr(LEVELS, model.tau))))
        scale = coefficients(sde, eps)[0]
    x = bits.to_model(images()[:, None], u, LEVELS)
    log_p = _log_density(gaussian(sde), x, jnp.asarray(scale), jnp.asarray(eps))
    log_w = np.asarray(log_p - log_q) - bits.scale_nats(SHAPE, LEVELS)
    alpha, sigma = coefficients(sde, eps)
    mean, variances = MEAN * alpha / scale, (STD**2 * alpha**2 + sigma**2) / scale**2

    edge = 0.1
    middle = np.abs(np.asarray(u) - 0.5).max((2, 3, 4)) < 0.5 - edge
    truth = _log_probability(mean, variances, edge)
    ratio = np.where(middle, np.exp(log_w - truth[:, None]), 0.0)
    got, expected = (truth + np.log(ratio.mean(1))).mean(), truth.mean()
    tolerance = _tolerance(ratio / ratio.mean(1, keepdims=True), expected)
    yield row(f"{label}, log of the mean weight", name, got, expected, tolerance)

    nats, looser = -_log_probability(mean, variances).mean(), math.inf
    for k in SAMPLES:
        each = math.log(k) - special.logsumexp(log_w.reshape(IMAGES, -1, k), axis=2)
        title = f"{label}, {k} sample{'s' * (k > 1)} >= -log P"
        yield bounding(title, name, each.mean(), nats, looser, _tolerance(each, nats))
        looser = float(each.mean())


def quadrature_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The uniform dequantizer's bound without Monte Carlo noise.

    Quadrature nodes on the line u (1, ..., 1) integrate the term of each dimension. In closed form
    the term is 1/2 log(2 pi v) + ((c - m)^2 + h^2 / 3) / (2 v) + log(L / 2), with the bin's centre
    c and half-width h = 1 / L."""
    alpha, sigma = coefficients(sde, EPS)
    m, v = alpha * MEAN, alpha**2 * STD**2 + sigma**2
    nodes, weights = np.polynomial.legendre.leggauss(8)
    x = jax.vmap(lambda u: bits.to_model(images(), u, LEVELS))(jnp.asarray((nodes + 1) / 2))
    log_p = _log_density(gaussian(sde), x, jnp.ones(()), jnp.asarray(EPS))
    got = -0.5 * weights @ np.asarray(log_p) + bits.scale_nats(SHAPE, LEVELS)
    each = 0.5 * np.log(2 * np.pi * v) + ((CENTRES - m) ** 2 + LEVELS**-2 / 3) / (2 * v)
    truth = each.sum(1) + SIZE * math.log(LEVELS / 2)
    yield row("uniform, by quadrature", name, got, truth, 1e-10)
    exact = -_log_probability(m, v)
    yield bounding(
        "uniform, by quadrature >= -log P", name, got.mean(), exact.mean(), math.inf, 0.0
    )


# Evidence bounds on the probability of the integers, without a dequantizer.

# The decoders are checked at a time when half a bin is one standard deviation of the noise: at the
# default of three, every decoder is nearly sure of the level.
DECODER_TAU = 1.0


# The learned decoder's outputs (SIZE, LEVELS): log P of every level, by entry.
LOGITS = _log_mass(np.arange(LEVELS), np.arange(LEVELS) + 1, MEAN[:, None], STD[:, None])


class _Decoding:
    """The score of the data, with the decoder of an integer denoiser whose network gives the same
    logits for every x."""

    def __init__(self, data: oracle.Gaussian):
        self._data = data

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        return self._data.score(x, t, key)

    def decoder_nats(self, y: Array, t: Array, pixels: Array) -> Array:
        out = jnp.asarray(LOGITS).reshape(*SHAPE, LEVELS)
        rho = jnp.exp(-0.5 * self._data.sde.log_snr(t))
        return integers.decoder_nats(out, y, rho, pixels, LEVELS)


@functools.partial(jit, static_argnames=("sde", "kinds", "shape"))
def _bounds(
    data: oracle.Gaussian,
    eps: Array,
    *,
    sde: SDE,
    kinds: tuple[str, ...],
    shape: tuple[int, int],
) -> dict[str, Array]:
    """Draws of each kind of bound for every image, ``(IMAGES, draws)``; ``shape`` is the number of
    draws, and that of times in each of them."""
    control = bound.GaussianControl(data.mean, data.eigenvalues, None)
    u = times.lattice(jax.random.key(1), IMAGES * shape[0], shape[1]).reshape(IMAGES, *shape)
    keys = jax.random.split(jax.random.key(2), (IMAGES, shape[0]))

    def one(pixels: Array, key: Key, u: Array, kind: str) -> Array:
        model, score, reduction = DEQUANTIZERS[kind](), _Decoding(data), bound.Reduction(control)
        draws: dict[str, Any] = {"eps": eps, "u": u, "reduction": reduction}
        return model.bound({}, score, sde, pixels, key, LEVELS, **draws).total

    def each(kind: str) -> Array:
        of_image = jax.vmap(functools.partial(one, kind=kind), (None, 0, 0))
        return jax.vmap(of_image)(images(), keys, u)

    return {kind: each(kind) for kind in kinds}


def _expected_bound(sde: SDE, eps: float, noise: Any) -> np.ndarray:
    """KL(q_eps || p_eps) + E_{q_T} log(p_T / pi), x_eps = alpha c + sigma e, e ~ ``noise``."""
    ends = (eps, sde.largest_time, sde.T)
    (a0, s0), (a1, s1), (_, s) = (coefficients(sde, t) for t in ends)
    v0, v1 = (a**2 * STD**2 + sigma**2 for a, sigma in ((a0, s0), (a1, s1)))
    prior = (sde.prior_std * s1 / s) ** 2
    left = s1**2 - (a1 / a0 * s0) ** 2 * (1 - noise.var())
    first = -math.log(s0) - noise.entropy() + 0.5 * np.log(2 * np.pi * v0)
    first = first + (a0**2 * (CENTRES - MEAN) ** 2 + s0**2 * noise.var()) / (2 * v0)
    last = 0.5 * np.log(prior / v1) - (a1**2 * (CENTRES - MEAN) ** 2 + left) / (2 * v1)
    return (first + last + ((a1 * CENTRES) ** 2 + left) / (2 * prior)).sum(1)


def _expected_decoder(rho: float, logits: np.ndarray) -> np.ndarray:
    """-E log P(k | y) with y = c + rho e and e normal, ``(IMAGES,)``.

    P(k | y) is proportional to exp(l_k) N(y; c_k, rho^2), with the ``logits (SIZE, LEVELS)`` l_k.
    """
    e = np.linspace(-10, 10, 2001)
    centres = (2 * np.arange(LEVELS) + 1) / LEVELS - 1
    log_p = -0.5 * ((CENTRES[..., None, None] + rho * e[:, None] - centres) / rho) ** 2
    of_all = special.logsumexp(log_p + logits[:, None], axis=-1)
    of_pixels = logits[np.arange(SIZE), PIXELS][..., None] - 0.5 * e**2
    return integrate.trapezoid(stats.norm.pdf(e) * (of_all - of_pixels), e, axis=-1).sum(1)


def _bound_row(kind: str, name: str, draws: np.ndarray, truths: np.ndarray) -> Row:
    """The mean of ``draws (IMAGES, n)`` compared with that of ``truths (IMAGES,)``."""
    truth = truths.mean()
    return row(f"{kind}, evidence bound", name, draws.mean(), truth, _tolerance(draws, truth))


def truncated_normal_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The bound with truncated normal noise, compared with its expectation and with P(k).

    At the default time, a bin holds nearly all of the noise. At a later one, the logarithm of the
    mass of the normal distribution in the bin is -0.4 for each entry."""
    for label, width in (
        ("truncated_normal", discrete.TAU),
        ("truncated_normal at large noise", DECODER_TAU),
    ):
        eps = discrete.smallest_time(sde, LEVELS, EPS, width)
        alpha, sigma = coefficients(sde, eps)
        rho = sigma / alpha
        tau = 1 / (LEVELS * rho)
        bounds = _bounds(
            gaussian(sde),
            jnp.asarray(eps, float),
            sde=sde,
            kinds=("truncated_normal",),
            shape=(256, 16),
        )
        draws = np.asarray(bounds["truncated_normal"])
        yield _bound_row(label, name, draws, _expected_bound(sde, eps, stats.truncnorm(-tau, tau)))
        nats = -_log_probability(MEAN, STD**2 + rho**2).mean()
        title = f"{label}, evidence bound >= -log P"
        yield bounding(title, name, draws.mean(), nats, math.inf, _tolerance(draws, nats))


def decoder_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The bounds with the categorical and a learned decoder, compared with their expectations."""
    kinds = ("categorical", "learned")
    eps = discrete.smallest_time(sde, LEVELS, EPS, DECODER_TAU)
    alpha, sigma = coefficients(sde, eps)
    # Most of the variance is the decoder's, which is cheap: many draws, with one time each.
    bounds = _bounds(gaussian(sde), jnp.asarray(eps, float), sde=sde, kinds=kinds, shape=(DRAWS, 1))
    categorical, learned = (np.asarray(bounds[kind]) for kind in kinds)
    before = _expected_bound(sde, eps, stats.norm())
    truth = before + _expected_decoder(sigma / alpha, np.zeros((SIZE, LEVELS)))
    learned_truth = before + _expected_decoder(sigma / alpha, LOGITS)
    yield _bound_row("categorical", name, categorical, truth)
    # The two bounds have the same draws, so their difference is known far better than either.
    yield _bound_row("learned", name, learned - categorical + truth[:, None], learned_truth)


def discrete_checks(sdes: Sequence[str]) -> list[Row]:
    """All rows for integers, for every dequantizer and each of the named SDEs."""
    rows: list[Row] = []
    for label, kind in DEQUANTIZERS.items():
        if not has_density(kind):
            continue
        model = kind(**OPTIONS.get(label, {}))
        u, log_q = samples(model, parameters(model), images(), jax.random.key(0))
        for name in sdes:
            rows += weight_rows(name, SDES[name](), label, model, u, log_q)
    for name in sdes:
        for of_sde in (quadrature_rows, truncated_normal_rows, decoder_rows):
            rows += of_sde(name, SDES[name]())
    return rows
