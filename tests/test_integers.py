"""The integer denoiser is Bayes' rule: against sums over levels and quadrature in each bin."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import coefficients
from scipy import integrate, special, stats

from sbml import likelihood
from sbml.likelihood import discrete
from sbml.likelihood.ode import Solver
from sbml.score import integers
from sbml.score.divergence import Trace
from sbml.sdes import SDES, VP

pytestmark = pytest.mark.usefixtures("x64")

FEW, MANY = 5, 256
posterior_mean = jax.jit(integers.posterior_mean, static_argnums=(3, 4))
decoder = jax.jit(jax.value_and_grad(integers.decoder_nats, (0, 1)), static_argnums=4)


@jax.jit
def between(a, b):
    """The mass and the mean, and their slopes."""
    return integers._between(a, b), jax.jacfwd(integers._between, (0, 1))(a, b)


def prior_of(out, y, rho, levels):
    """log P(k) ``(levels,)`` of one entry's outputs, up to a constant.

    A mixture's means and scales are relative to the posterior of x given y for normal data of
    variance 1/4.
    """
    if levels <= integers.FEW:
        return np.asarray(out)
    log_w, shift, log_scale = np.split(out, 3)
    mean, std = y / (1 + 4 * rho**2), 2 * np.sqrt(1 / (4 + 1 / rho**2))
    mu = mean + std * (np.linspace(-0.8, 0.8, len(shift)) + shift)
    scale = 2 / levels + 0.4 * std * np.logaddexp(0, log_scale + 0.5)
    c = (2 * np.arange(levels) + 1) / levels - 1
    return special.logsumexp(log_w + stats.norm.logpdf(c[:, None], mu, scale), axis=-1)


def bayes(out, y, rho, levels, data):
    """P(k | y) ``(levels,)`` and E[x | y], by quadrature over x in every bin."""
    c = (2 * np.arange(levels) + 1) / levels - 1
    if data == "centre":
        log_mass, means = -0.5 * ((y - c) / rho) ** 2, c
    else:
        # A shift of the exponent keeps far bins from vanishing.
        nodes, weights = np.polynomial.legendre.leggauss(80)
        x = c[:, None] + nodes / levels
        log_p = -0.5 * ((y - x) / rho) ** 2
        log_mass = special.logsumexp(log_p, b=weights / 2, axis=1)
        means = np.sum(np.exp(log_p - log_mass[:, None]) * weights / 2 * x, axis=1)
    log_p = prior_of(out, y, rho, levels) + log_mass
    p = np.exp(log_p - special.logsumexp(log_p))
    return p, np.sum(p * means)


@pytest.mark.parametrize("data", integers.DATA)
@pytest.mark.parametrize("rho", [0.02, 0.1, 0.3, 1.5, 7.9, 8.1, 150.0])
def test_few_levels_are_summed_by_bayes_rule(rho, data):
    rng = np.random.default_rng(0)
    out, y = rng.normal(size=(4, FEW)), np.array([-0.93, 0.05, 0.4, 1.1]) * max(1, rho)
    found = posterior_mean(out, y, np.array(rho), FEW, data)
    expected = [bayes(o, at, rho, FEW, data)[1] for o, at in zip(out, y, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("data", integers.DATA)
@pytest.mark.parametrize(
    ("rho", "tolerance"),
    [(1e-3, 1e-9), (3e-3, 1e-8), (7.5e-3, 1e-5), (8e-3, 4e-4), (0.1, 6e-5), (3.0, 3e-5)],
)
def test_many_levels_are_summed_near_the_number(rho, tolerance, data):
    """The sum is over a window of levels if rho is smaller than a bin's width, 7.8e-3; otherwise
    an integral replaces it.

    The integral has an error of about the square of a bin's width, and a larger one at the end of
    the range if the posterior is hardly wider than a bin.
    """
    rng = np.random.default_rng(1)
    out = rng.normal(size=(3, integers.outputs(MANY)))
    y = np.array([-0.3, 0.013, 0.999])
    found = posterior_mean(out, y, np.array(rho), MANY, data)
    expected = [bayes(o, at, rho, MANY, data)[1] for o, at in zip(out, y, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [FEW, 17, MANY])
@pytest.mark.parametrize("data", integers.DATA)
def test_float32_keeps_its_digits_from_the_smallest_noise_to_the_largest(levels, data):
    rng = np.random.default_rng(2)
    out = rng.normal(size=(40, integers.outputs(levels)))
    for rho in 10.0 ** np.linspace(-3.5, 2, 12):
        k = rng.integers(0, levels, 40)
        y = (2 * k + 1) / levels - 1 + rho * rng.normal(size=40)
        wide = posterior_mean(jnp.asarray(out), jnp.asarray(y), jnp.asarray(rho), levels, data)
        with jax.enable_x64(False):
            args = (jnp.asarray(a, jnp.float32) for a in (out, y, rho))
            narrow = posterior_mean(*args, levels, data)
        assert narrow.dtype == jnp.float32
        # The error that this causes in the noise prediction; y itself is rounded to 6e-8.
        error = np.abs((np.asarray(narrow, float) - wide) / rho)
        assert error.max() < 2e-3


@pytest.mark.parametrize("bins", [1 / 6, 0.9, 1.3, 30.0])
@pytest.mark.parametrize("levels", [FEW, 40, MANY])
def test_the_decoder_is_the_posterior_of_the_level(levels, bins):
    """This holds also where the noise is wider than a bin, as at the smallest time of ``VE``."""
    rng, rho = np.random.default_rng(3), bins * 2 / levels
    out, k = rng.normal(size=(6, integers.outputs(levels))), rng.integers(0, levels, 6)
    y = (2 * k + 1) / levels - 1 + rho * rng.normal(size=6)
    y[0], k[0] = -1 - 3 * rho, 0
    found, slopes = decoder(out, y, np.array(rho), k, levels)
    assert all(np.isfinite(slope).all() for slope in slopes)
    each = [
        -np.log(bayes(o, at, rho, levels, "centre")[0][i])
        for o, at, i in zip(out, y, k, strict=True)
    ]
    assert found == pytest.approx(sum(each), abs=1e-8)


class Exact:
    """The exact score of one integer with probabilities ``p``, by the integer denoiser."""

    def __init__(self, sde, p, data):
        self.sde, self.p, self.data = sde, jnp.asarray(p), data

    def __call__(self, x, t, key=None):
        alpha, sigma = self.sde.mean_coef(t), self.sde.std(t)
        y, rho = x / alpha, sigma / alpha
        out = self.outputs(x)
        return (integers.posterior_mean(out, y, rho, len(self.p), self.data) - y) / (rho * sigma)

    def outputs(self, x):
        return jnp.broadcast_to(
            jnp.log(self.p).reshape((1,) * x.ndim + (-1,)), (*x.shape, self.p.size)
        )

    def decoder_nats(self, y, t, pixels):
        out = self.outputs(y)
        rho = self.sde.std(t) / self.sde.mean_coef(t)
        return integers.decoder_nats(out, y, rho, pixels, len(self.p))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_learned_decoders_bound_is_the_entropy(name):
    """With the exact posterior, E bound = H(k) + KL(p_T || pi).

    Expectations are computed by the trapezoid rule over the noise and by Gauss-Legendre quadrature
    over log-SNR.
    """
    sde, p = SDES[name](), np.array([0.5, 0.1, 0.3, 0.1])
    levels, eps = len(p), 1e-3 if name == "vp" else 1e-5
    score = Exact(sde, p, "centre")
    c = (2 * np.arange(levels) + 1) / levels - 1
    z = np.linspace(-10, 10, 801)
    weights = stats.norm.pdf(z) * (z[1] - z[0])
    alphas, sigmas, ends = map(np.asarray, coefficients(sde, np.array([sde.T, eps])))
    nodes, lengths = np.polynomial.legendre.leggauss(200)
    log_snrs = (ends[1] - ends[0]) / 2 * (nodes + 1) + ends[0]
    lengths = lengths * (ends[1] - ends[0]) / 2

    @jax.jit
    @jax.vmap
    def error(log_snr):
        t = sde.time(log_snr)
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        noise = z[None]
        x = alpha * c[:, None] + sigma * noise
        return jnp.sum(p[:, None] * weights * (noise + sigma * score(x, t)) ** 2)

    diffusion = 0.5 * np.sum(lengths * np.asarray(error(log_snrs)))
    rho = sigmas[1] / alphas[1]
    decode = jax.jit(jax.vmap(lambda y, k: score.decoder_nats(y, np.array(eps), k), (0, None)))
    nats = sum(
        p[k] * np.sum(weights * np.asarray(decode(c[k] + rho * z, np.array(k))))
        for k in range(levels)
    )
    prior = p @ np.asarray(jax.jit(jax.vmap(lambda x: discrete.prior_kl(sde, x)))(c[:, None]))
    entropy = -np.sum(p * np.log(p))
    # The bound has the prior in place of p_T, which costs KL(p_T || pi), here by quadrature.
    alpha, sigma = alphas[0], sigmas[0]

    def mismatch(x):
        density = np.sum(p * stats.norm.pdf(x, alpha * c, sigma))
        return density * (np.log(density) - stats.norm.logpdf(x, 0, sde.prior_std))

    width = 12 * sigma
    gap = integrate.quad(mismatch, -width, width, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
    assert diffusion + nats + prior == pytest.approx(entropy + gap, abs=1e-8)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("data", integers.DATA)
def test_the_odes_likelihood_is_that_of_the_integers(data):
    """With the exact posterior, log p_eps of one entry: a sum over levels of normal densities, or
    of such densities spread over a bin."""
    # At T, alpha is 3e-7, so the prior is p_T.
    sde, p, eps = VP(beta_max=60.0), np.array([0.5, 0.1, 0.3, 0.1]), 3e-3
    levels, score = len(p), Exact(sde, p, data)
    c = (2 * np.arange(levels) + 1) / levels - 1
    alpha, sigma = (float(f(jnp.asarray(eps))) for f in (sde.mean_coef, sde.std))
    x = np.array([-1.2, -0.74, 0.1, 0.26, 0.9])
    if data == "centre":
        densities = stats.norm.pdf(x[:, None], alpha * c, sigma)
    else:
        ends = (stats.norm.cdf(x[:, None], alpha * (c + s / levels), sigma) for s in (-1, 1))
        densities = np.subtract(*ends) / (2 * alpha / levels)
    how = {"eps": eps, "trace": Trace("exact"), "solver": Solver(rtol=1e-8, atol=1e-8)}

    def logp(x):
        return likelihood.ode_logp(score, sde, x, None, **how).logp

    found = jax.jit(jax.vmap(logp))(jnp.asarray(x)[:, None])
    np.testing.assert_allclose(found, np.log(densities @ p), rtol=0, atol=2e-6)


@pytest.mark.parametrize("data", [*integers.DATA, "decoder"])
def test_the_memory_of_a_mixture_does_not_grow_with_the_levels(data):
    """The largest array of the program, for 256 and for 65,536 levels; with the gradient, except
    for the decoder."""
    y, rho, k = map(jnp.asarray, (np.zeros(100), 0.1, np.zeros(100, int)))

    def largest(levels):
        def loss(out):
            if data == "decoder":
                return integers.decoder_nats(jax.lax.stop_gradient(out), y, rho, k, levels)
            return jnp.sum(integers.posterior_mean(out, y, rho, levels, data) ** 2)

        out = np.zeros((100, integers.outputs(levels)))
        program = jax.jit(jax.value_and_grad(loss)).lower(out).as_text()
        shapes = re.findall(r"tensor<((?:\d+x)*)f", program)
        return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)

    assert largest(MANY) == largest(2**16) < 100 * MANY / 2
    assert largest(FEW) >= 100 * FEW


@pytest.mark.parametrize(
    ("start", "width"), [(-30, 1), (-3, 0.05), (-0.5, 1), (-0.02, 0.05), (2, 9)]
)
def test_mass_and_mean_between_two_ends(start, width):
    """On either side of 0 and across it, and their slopes, against SciPy's tails and quadrature."""
    for a, b in ((start, start + width), (-start - width, -start)):
        near, far = (b, a) if a + b < 0 else (-a, -b)
        log_mass = special.log_ndtr(near) + np.log1p(
            -np.exp(special.log_ndtr(far) - special.log_ndtr(near))
        )
        x, weights = np.polynomial.legendre.leggauss(200)
        x = a + (x + 1) * width / 2
        mean = np.sum(x * np.exp(stats.norm.logpdf(x) - log_mass) * weights) * width / 2
        found, slopes = between(np.array(float(a)), np.array(float(b)))
        np.testing.assert_allclose(found, (log_mass, mean), rtol=1e-11, atol=1e-11)
        # d log mass / da = -phi(a) / mass, d mean / da = (mean - a) phi(a) / mass, and so for b.
        at_a, at_b = (np.exp(stats.norm.logpdf(v) - log_mass) for v in (a, b))
        expected = ((-at_a, at_b), ((mean - a) * at_a, (b - mean) * at_b))
        np.testing.assert_allclose(slopes, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("data", integers.DATA)
def test_a_mixture_of_one_gives_the_noise_of_gaussian_data(data):
    """For data N(0, s^2) the posterior mean is s^2 y / (s^2 + rho^2), up to the bins' width and the
    mass outside [-1, 1]. The outputs make the first component N(0, s^2) at every y and rho."""
    s = 0.2
    # Three numbers at a time share the compiled function of the test of many levels.
    numbers = np.linspace(-0.6, 0.6, 15).reshape(5, 3)
    for rho, y in itertools.product((0.02, 0.1, 1.0, 20.0), numbers):
        kappa = 0.25 / (0.25 + rho**2)
        u = math.sqrt(1 - kappa)
        scale = math.log(math.expm1((s - 2 / MANY) / (0.4 * u))) - 0.5
        first = np.stack([0 * y, 0.8 - kappa * y / u, scale + 0 * y], axis=-1)
        others = np.broadcast_to([-50.0, 0.0, 0.0], (*y.shape, 4, 3))
        out = np.concatenate([first[:, None], others], axis=1).swapaxes(1, 2).reshape(len(y), -1)
        found = (y - np.asarray(posterior_mean(out, y, np.array(rho), MANY, data))) / rho
        np.testing.assert_allclose(found, rho * y / (s**2 + rho**2), atol=1e-6)


@pytest.mark.parametrize("data", integers.DATA)
def test_gradients_are_finite_at_the_largest_noise(data):
    """They pass through both branches, the sum over levels around y and the integral."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(1e5 * rng.normal(size=300), jnp.float32)
    out = jnp.asarray(rng.normal(size=(300, integers.outputs(MANY))), jnp.float32)

    def total(out, y, rho):
        return posterior_mean(out, y, rho, MANY, data).sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(out, y, jnp.float32(1e5))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
