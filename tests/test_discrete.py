"""The bounds on integers of Gaussian data, where P(k) and every term are known exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from sbml import sdes
from sbml.audit import oracle
from sbml.likelihood import bound, discrete
from sbml.sdes import times

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.oracle]
LEVELS, K, MEAN, VARIANCE, N = 8, 5, 0.1, 0.09, 40_000
NOISES = {
    "truncated_normal": discrete.TruncatedNormal(LEVELS),
    "categorical": discrete.Categorical(LEVELS),
}
edge_score = jax.jit(discrete.edge_score)
CENTRE, HALF = 2 * (K + 0.5) / LEVELS - 1, 1 / LEVELS


@pytest.fixture(scope="module", params=["rectified_flow"])  # ``--mode=verify`` has all SDEs.
def case(request):
    """One pixel with data N(0.1, 0.09): the SDE, the exact score, eps, alpha, sigma and p_eps."""
    sde = sdes.SDES[request.param]()
    eps = discrete.smallest_time(sde, LEVELS, 1e-5)
    data = oracle.Gaussian(sde, jnp.array([MEAN]), jnp.array([VARIANCE]), jnp.eye(1))
    alpha, sigma = (float(f(jnp.asarray(eps))) for f in (sde.mean_coef, sde.std))
    return sde, data, eps, alpha, sigma, stats.norm(
        alpha * MEAN, math.sqrt(alpha**2 * VARIANCE + sigma**2)
    )  # fmt: skip


@jax.jit
def points():
    """N keys, and N points of a lattice."""
    return jax.random.split(jax.random.key(0), N), times.lattice(jax.random.key(1), N)


def bounds(case, kind, control):
    """N draws of the three terms, as arrays."""
    sde, data, eps, *_ = case
    fitted = bound.GaussianControl(data.mean, data.eigenvalues, None) if control else None

    @jax.jit
    @jax.vmap
    def draw(key, u):
        return discrete.elbo(
            data.score, sde, jnp.array([K]), key,
            noise=NOISES[kind], eps=eps, u=u, reduction=bound.Reduction(fitted),
        )  # fmt: skip

    return jax.device_get(draw(*points()))


def prior_mismatch(case, variance):
    """E [log p_T - log pi] under N(alpha_T c, ``variance`` sigma_T^2): the nats that the prior
    costs."""
    sde, data, *_ = case
    last = jnp.asarray(sde.largest_time)
    prior_std = sde.prior_std * float(sde.std(last) / sde.std(jnp.asarray(sde.T)))
    mean, variance = float(sde.mean_coef(last)) * CENTRE, variance * float(sde.std(last)) ** 2

    def expected(m, v):
        return -0.5 * math.log(2 * math.pi * v) - 0.5 * (variance + (mean - m) ** 2) / v

    marginal = float(sde.mean_coef(last)) * MEAN, float(data.variances(last)[0])
    return expected(*marginal) - expected(0.0, prior_std**2)


@pytest.mark.parametrize("control", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_truncated_normal_bound_is_a_kl_divergence(case, control):
    """With the true score, the bound is E_q [log q - log p_eps], here by quadrature in the bin,
    plus the cost of the prior."""
    sde, _, eps, alpha, sigma, marginal = case
    tau = discrete.tau(sde, LEVELS, eps)
    q = stats.truncnorm(-tau, tau, loc=alpha * CENTRE, scale=sigma)
    ends = alpha * (CENTRE - HALF), alpha * (CENTRE + HALF)
    truth = integrate.quad(
        lambda y: q.pdf(y) * (q.logpdf(y) - marginal.logpdf(y)), *ends, epsabs=1e-12, limit=200
    )[0] + prior_mismatch(case, 1.0)
    total = bounds(case, "truncated_normal", control).total
    error = total.std() / math.sqrt(N)
    assert error < (0.002 if control else 0.05)
    assert abs(total.mean() - truth) < 4 * error + 1e-6
    assert total.mean() > -math.log(marginal.cdf(ends[1]) - marginal.cdf(ends[0])) - 4 * error


def test_the_categorical_bound_is_a_kl_divergence_and_the_decoder(case):
    """E_q [log q - log p_eps] has a closed form for the normal; the decoder is by quadrature."""
    _, _, _, alpha, sigma, marginal = case
    variance = float(marginal.var())
    kl = -0.5 * math.log(sigma**2 / variance) - 0.5
    kl += 0.5 * (sigma**2 + (alpha * CENTRE - marginal.mean()) ** 2) / variance
    centres = 2 * (np.arange(LEVELS) + 0.5) / LEVELS - 1
    rho = sigma / alpha

    def decoder(z):
        logits = -0.5 * ((CENTRE + rho * z - centres) / rho) ** 2
        return stats.norm.pdf(z) * (np.logaddexp.reduce(logits) - logits[K])

    expected = integrate.quad(decoder, -9, 9, epsabs=1e-12, limit=200)[0]
    terms = bounds(case, "categorical", True)
    error = terms.reconstruction.std() / math.sqrt(N)
    assert abs(terms.reconstruction.mean() - expected) < 4 * error
    error = terms.total.std() / math.sqrt(N)
    truth = kl + expected + prior_mismatch(case, 1.0)
    assert abs(terms.total.mean() - truth) < 4 * error + 1e-6


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_edge_score_is_the_derivative_of_the_convolution(share):
    """n + edge_score(n) is minus the gradient of the log-density of n = a e + b z, which is here
    computed by quadrature."""
    tau, a = 1.5, math.sqrt(share)
    b = math.sqrt(1 - share)
    q = stats.truncnorm(-tau, tau)

    nodes, weights = np.polynomial.legendre.leggauss(400)
    e = tau * nodes

    def log_density(n):
        return math.log(tau * np.sum(weights * q.pdf(e) * stats.norm.pdf((n - a * e) / b) / b))

    for n in (-2.0, -0.3, 0.0, 1.2, 1.6):
        step = 1e-5
        truth = -(log_density(n + step) - log_density(n - step)) / (2 * step)
        got = n + float(edge_score(np.asarray(n), np.asarray(a), np.asarray(b), tau))
        assert got == pytest.approx(truth, abs=1e-4)


def test_float32_near_the_edge_is_finite():
    with jax.enable_x64(False):
        n = np.linspace(-3.2, 3.2, 4001, dtype=np.float32)
        for b in map(np.float32, (1e-4, 1e-2, 0.5, 1.0)):
            a = np.sqrt(1 - b**2)
            n_there = np.clip(n, -3 - 3 * b, 3 + 3 * b)  # No draw lies further out.
            r = edge_score(n_there, np.asarray(a), np.asarray(b), 3.0)
            assert r.dtype == jnp.float32 and np.isfinite(r).all()
            assert np.all(r * np.sign(n_there) >= 0)


def test_smallest_time_fits_the_bin_and_is_at_least_eps():
    vp = sdes.VP()
    assert discrete.smallest_time(vp, 17, 1e-5) == pytest.approx(2.968e-3, rel=1e-3)
    assert discrete.smallest_time(vp, 256, 1e-5) == pytest.approx(1.693e-5, rel=1e-3)
    assert discrete.smallest_time(vp, 256, 5e-5) == 5e-5
    assert discrete.smallest_time(vp, 17, 1e-5, math.inf) == 1e-5
    eps = discrete.smallest_time(vp, 17, 1e-5, 5.0)
    assert discrete.tau(vp, 17, eps) == pytest.approx(5.0)
    assert discrete.tau(vp, 17, discrete.smallest_time(vp, 17, 1e-5)) == pytest.approx(3.0)
    assert discrete.tau(vp, 256, 5e-5) < 3
    gamma = sdes.LinearGamma()
    assert discrete.tau(gamma, 256, 0) == discrete.tau(gamma, 256, 0.0) > 0


def test_decoder_sums_over_levels_and_pixels():
    pixels = np.array([[0, 3], [7, 5]])
    x = (2 * (pixels + 0.5) / LEVELS - 1) + 0.01
    rho = 0.1
    centres = 2 * (np.arange(LEVELS) + 0.5) / LEVELS - 1
    each = stats.norm.pdf(x[..., None], centres, rho)
    p = np.take_along_axis(each, pixels[..., None], -1)[..., 0] / each.sum(-1)

    @jax.jit
    def decoder(rho):
        return discrete.decoder_nats(x, jnp.asarray(pixels), LEVELS, rho)

    assert decoder(rho) == pytest.approx(-np.log(p).sum())
    assert np.isfinite(decoder(jnp.asarray(rho, jnp.bfloat16)))
