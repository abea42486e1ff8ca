"""The evidence bound on Gaussian data, where each of its terms has a closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import sigma_points
from families import FAMILIES, FAMILIES_VE_SLOW, coefficients
from scipy import fft, integrate
from scipy.stats import norm

from sbml import likelihood, samplers
from sbml.audit import oracle
from sbml.core.streams import stream
from sbml.likelihood import bound
from sbml.likelihood.bound import Reduction
from sbml.score.divergence import Trace
from sbml.sdes import SDES, times

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.oracle]
EPS = 1e-5


def control_of(data):
    return bound.GaussianControl(data.mean, data.eigenvalues, data.basis)


def x_points(data):
    """Points over which the average of a quadratic in x is its expectation under N(mean, cov)."""
    d = data.mean.size
    mean, eigenvalues, basis = jax.device_get((data.mean, data.eigenvalues, data.basis))
    points = np.sqrt(d) * np.concatenate([np.eye(d), -np.eye(d)])
    return mean[None] + points * np.sqrt(eigenvalues)[None] @ basis.T


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    sde = SDES[request.param]()
    return sde, oracle.gaussian(sde)


@functools.partial(jax.jit, static_argnums=1)
def integral(control, sde, x):
    return control.integral(sde, x, EPS)


def over(term, score, sde, x, t, z, last):
    """The mean of a diffusion term over points (x, z) at one time."""
    return jax.vmap(lambda x, z: term(score, sde, x, t, z, last))(x, z).mean()


@jax.jit
def _draws(data, x, keys, u, reduction):
    def one(k, u):
        how = {"eps": EPS, "u": u, "reduction": reduction}
        return bound.elbo(data.score, data.sde, x, k, **how).diffusion

    return jax.vmap(one)(keys, u)


def draws(data, n=4000, reduction=Reduction()):
    """n draws of the diffusion term of one x, each at one time."""
    x, u = x_points(data)[0], (np.arange(n)[:, None] + 0.5) / n
    return x, np.asarray(_draws(data, x, jax.random.split(jax.random.key(0), n), u, reduction))


def test_prior_is_the_kl_by_quadrature(case):
    """The integral of p log(p / q), summed over dimensions."""
    sde, data = case
    x = x_points(data)[1]
    alpha, std, _ = map(float, coefficients(sde, np.array(sde.largest_time)))
    prior_std = sde.prior_std * std / float(coefficients(sde, np.array(1.0))[1])
    total = 0.0
    for m in alpha * np.asarray(x):
        grid = m + std * np.linspace(-12, 12, 20_001)
        log_p, log_q = norm.logpdf(grid, m, std), norm.logpdf(grid, 0.0, prior_std)
        total += integrate.simpson(np.exp(log_p) * (log_p - log_q), x=grid)
    found = jax.jit(lambda x: bound.prior_kl(sde, x))(x)
    np.testing.assert_allclose(found, total, atol=1e-9)


def test_control_integral_is_the_quadrature_of_its_error(case):
    """The expectation over z by sigma points, the integral over log-SNR by adaptive quadrature."""
    sde, data = case
    x, control, d = x_points(data)[2], control_of(data), data.mean.size
    zs = np.sqrt(d) * np.concatenate([np.eye(d), -np.eye(d)])

    @jax.jit
    def error(log_snr):
        t = sde.time(log_snr)

        def one(z):
            x_t = sde.mean_coef(t) * x + sde.std(t) * z
            return 0.5 * jnp.sum((z - control.noise(sde, x_t, t)) ** 2)

        return jnp.mean(jax.vmap(one)(zs))

    ends = [float(coefficients(sde, np.array(t))[2]) for t in (sde.largest_time, EPS)]
    expected, _ = integrate.quad(
        lambda log_snr: float(error(log_snr)), *ends, epsabs=1e-10, epsrel=1e-10
    )
    np.testing.assert_allclose(integral(control, sde, x), expected, rtol=1e-8)


def test_a_coefficient_at_each_noise_level_leaves_the_expectation(case):
    """Errors over points z that make a quadratic exact, summed over a fine grid of the times."""
    sde, data = case
    ends = [float(coefficients(sde, np.array(t))[2]) for t in (EPS, sde.largest_time)]
    edges = np.linspace(*ends, 4)[1:-1]
    c = np.array([0.2, 1.0, 0.5])
    control = dataclasses.replace(control_of(data), coefficients=c, edges=edges)
    x, d = x_points(data)[2], data.mean.size
    v = (np.arange(6000) + 0.5) / 6000
    zs = np.sqrt(d) * np.concatenate([np.eye(d), -np.eye(d)])

    def error(t):
        x_t = sde.mean_coef(t) * x[None] + sde.std(t) * zs
        return jax.vmap(lambda x_t, z: control.error(sde, x_t, t, z))(x_t, zs).mean()

    @jax.jit
    def all_of(v):
        t, weight = times.draw(sde, EPS, v, None, "importance")
        return jax.vmap(error)(t), weight, control.sum_of_steps(sde, x, t[::60], np.ones(100))

    each, weight, steps = map(np.asarray, all_of(v))
    np.testing.assert_allclose(integral(control, sde, x), np.mean(weight * each), rtol=1e-5)
    np.testing.assert_allclose(steps, 2 * each[::60].sum(), rtol=1e-10)


@pytest.mark.parametrize("case", FAMILIES_VE_SLOW, indirect=True)
def test_the_control_of_the_true_gaussian_leaves_no_variance(case):
    sde, data = case
    x, values = draws(data, reduction=Reduction(control_of(data)))
    np.testing.assert_allclose(values, integral(control_of(data), sde, x), rtol=1e-10)


@pytest.mark.parametrize("case", FAMILIES_VE_SLOW, indirect=True)
def test_plain_draws_average_to_the_integral(case):
    sde, data = case
    x, values = draws(data)
    expected = float(integral(control_of(data), sde, x))
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))


def wrong_control_of(data):
    return bound.GaussianControl(np.asarray(data.mean) + 0.1, np.full(data.mean.size, 0.3), None)


@pytest.mark.parametrize("case", FAMILIES_VE_SLOW, indirect=True)
def test_times_uniform_in_t_do_not_bias(case):
    """With the control of another Gaussian. Without one, the noise would hide a bias of a half."""
    sde, data = case
    x, values = draws(data, reduction=Reduction(wrong_control_of(data), proposal="uniform"))
    expected = float(integral(control_of(data), sde, x))
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("case", FAMILIES_VE_SLOW, indirect=True)
def test_a_wrong_control_does_not_bias(case):
    sde, data = case
    x, values = draws(data, reduction=Reduction(wrong_control_of(data)))
    expected = float(integral(control_of(data), sde, x))
    assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("probes", [0, 2])
def test_both_forms_have_one_expectation_over_data(case, probes):
    """Sigma points over (x_0, z) make dsm exact at one time. ssm needs the same points, because the
    integration by parts of E[s . s + 2 div s] holds only over both x_0 and z."""
    sde, data = case
    vs = None
    if probes:  # Hutchinson's estimate is exact for a diagonal Jacobian.
        data = oracle.diagonal(sde)
        vs = np.random.default_rng(0).choice([-1.0, 1.0], (probes, 3))

    @jax.jit
    def both(t):
        x, z = sigma_points(data)
        dsm = over(bound.diffusion_dsm, data.score, sde, x, t, z, None)
        return dsm, over(bound.diffusion_ssm, data.score, sde, x, t, z, vs)

    for t in (0.01, 0.3, 0.9):
        np.testing.assert_allclose(*both(np.array(t)), rtol=1e-8)


@pytest.mark.parametrize("case", FAMILIES_VE_SLOW, indirect=True)
def test_a_density_of_times_does_not_bias(case):
    """With a very uneven density, the mean is still the integral in closed form.

    A control variate that is not quite the data's lowers the variance.
    """
    sde, data = case
    density = jax.jit(times.with_floor)(np.arange(8.0) ** 2)
    wrong = wrong_control_of(data)
    x, values = draws(data, reduction=Reduction(wrong, density))
    truth = float(integral(control_of(data), sde, x))
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)) < 1
    _, even = draws(data, reduction=Reduction(wrong))
    assert not np.allclose(values, even)  # The density is used.


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rectified_flow"], indirect=True)
def test_pilot_follows_the_noise(case):
    """The density is the standard deviation of the draws in each bin, here of independent draws."""
    sde, data = case
    x = jnp.tile(x_points(data)[:1], (4096, 1))
    options = {"eps": EPS, "bins": 4, "floor": 1e-6}
    density = bound.pilot(data.score, sde, x, jax.random.key(0), **options).density
    u = jax.random.uniform(jax.random.key(1), (4, 8000), minval=jnp.arange(4.0)[:, None] / 4,
                           maxval=jnp.arange(1.0, 5.0)[:, None] / 4)  # fmt: skip
    t, _ = times.Importance(sde, EPS).at(u)
    z = jax.random.normal(jax.random.key(2), (4, 8000, *x[0].shape))
    draw = jax.vmap(jax.vmap(lambda t, z: bound.diffusion_dsm(data.score, sde, x[0], t, z, None)))
    spread = draw(t, z).std(axis=1)
    np.testing.assert_allclose(density, spread / spread.mean(), rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vp"], indirect=True)
def test_the_profile_of_the_true_score_is_the_posterior_variance(case):
    """E |z - e|^2 = sum_i l_i / (l_i + v) with v = exp(-lambda). Its integral has a closed form."""
    sde, data = case
    n, bins = 1000, 8
    noise = jax.random.normal(jax.random.key(1), (n, data.mean.size))
    x = data.mean[None] + noise * jnp.sqrt(data.eigenvalues)[None] @ data.basis.T
    run = jax.jit(lambda x: bound.profile(data.score, sde, x, jax.random.key(0), **options))
    options = {"eps": EPS, "bins": bins}
    found = run(x)
    ends = sde.log_snr(jnp.asarray([EPS, sde.largest_time]))
    edges = np.linspace(*ends, bins + 1)
    integral = np.log1p(np.exp(edges)[:, None] * np.asarray(data.eigenvalues)).sum(axis=1)
    expected = 0.5 * np.diff(integral) / np.diff(edges)
    stderr = np.sqrt(found.variance / found.draws)
    np.testing.assert_array_equal(found.draws, n * 8 / bins)
    assert np.all(np.abs(found.mean - expected) < 5 * stderr) and stderr.max() < 0.1
    options["control"] = control_of(data)
    np.testing.assert_allclose(run(x[:9]).mean, 0, atol=1e-8)


def test_a_pilot_of_few_examples_has_few_bins():
    """5 examples have 40 draws: for 2 bins with at least 16 each."""
    x, sde = 0.5 * np.random.default_rng(0).normal(size=(5, 3)), SDES["vp"]()
    pilot = jax.jit(lambda x, key: bound.pilot(lambda x, t, key: -x, sde, x, key, eps=EPS))
    found = pilot(x, jax.random.key(1))
    assert found.control is None and found.density.shape == (2,)
    assert np.mean(found.density) == pytest.approx(1)


def smooth(n, side, rng):
    """``n`` random images with the spectrum of photos, ``(n, side^2)``."""
    frequency = np.hypot(*np.meshgrid(np.arange(side), np.arange(side)))
    x = fft.idctn(rng.normal(size=(n, side, side)) / (1 + frequency), axes=(1, 2), norm="ortho")
    return 3 * x.reshape(n, -1)


@pytest.mark.slow
def test_a_control_of_few_data_is_hardly_worse_than_none():
    """64 dimensions. Full covariances of few data have eigenvalues that are far too
    small, so a control with the coefficient 1 can have many times the noise of none."""
    side, sde, rng, eps = 8, SDES["vp"](), np.random.default_rng(8), 1e-3
    x = jnp.asarray(smooth(8, side, rng))

    def score(x, t, key):
        return -x / (0.1 * sde.mean_coef(t) ** 2 + sde.std(t) ** 2)

    @jax.jit
    def means(reduction):
        def sweep(key):
            def one(x, key, u):
                return bound.elbo(score, sde, x, key, eps=eps, u=u, reduction=reduction).total

            u = times.lattice(stream(key, "sweep times"), len(x), 2)
            return jax.vmap(one)(x, jax.random.split(key, len(x)), u).mean()

        return jax.lax.map(sweep, jax.random.split(jax.random.key(0), 48))

    @jax.jit
    def pilot(control):
        return bound.pilot(score, sde, x, jax.random.key(1), eps=eps, control=control)

    plain = np.asarray(means(Reduction()))
    # The covariance of 24 examples is singular for 64 dimensions.
    cases = [(n, None) for n in (4, 24, 1437)] + [(24, True)]
    for n, full in cases:
        fitted = smooth(n, side, rng)
        control = bound.GaussianControl.fit(fitted, noise_variance=1e-5, full=full)
        found = np.asarray(means(pilot(control)))
        assert found.std() < 1.2 * plain.std(), (n, full)
        stderr = np.hypot(found.std(), plain.std()) / np.sqrt(48)
        assert abs(found.mean() - plain.mean()) < 4 * stderr, (n, full)
    assert means(Reduction(control)).std() > 10 * plain.std()


def test_reconstruction_is_the_gaussian_decoder(case):
    """The term is -log N(x; E[x_0 | x_eps], rho^2) for the same draw of z."""
    sde, data = case
    x, t = x_points(data)[0], np.array(0.02)

    @jax.jit
    def all_of(key):
        got = bound.elbo(data.score, sde, x, key, eps=0.02, u=np.zeros(1)).reconstruction
        z = jax.random.normal(stream(key, "reconstruction"), x.shape)
        mean = samplers.denoise(data.score, sde, sde.mean_coef(t) * x + sde.std(t) * z, t)
        return got, mean, sde.std(t) / sde.mean_coef(t)

    got, mean, rho = all_of(jax.random.key(3))
    np.testing.assert_allclose(got, -np.sum(norm.logpdf(x, mean, rho)), rtol=1e-10)


def test_the_control_leaves_the_expectation_of_the_reconstruction(case):
    """The control of the true Gaussian takes all noise from the reconstruction, whose expectation
    is a sum in closed form: 1/2 sum_i (l_i^2 + v c_i^2) / (l_i + v)^2 and the constant."""
    sde, data = case
    x, control = x_points(data)[0], control_of(data)
    options = {"eps": 0.02, "u": np.zeros(1), "reduction": Reduction(control)}
    elbo = jax.jit(lambda key: bound.elbo(data.score, sde, x, key, **options).reconstruction)
    got = elbo(jax.random.key(3))
    v = np.exp(-float(coefficients(sde, np.array(0.02))[2]))
    mean, variances, basis = map(np.asarray, (data.mean, data.eigenvalues, data.basis))
    c2 = (basis.T @ (x - mean)) ** 2
    expected = 0.5 * np.sum((variances**2 + v * c2) / (variances + v) ** 2)
    expected += 0.5 * x.size * np.log(2 * np.pi * v)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_the_bound_is_tight_for_the_true_score(case):
    """E bound = H(p_0) + KL(p_T || prior) + a gap in [0, O(rho_eps^2)] of the decoder."""
    sde, data = case
    t = np.array(EPS)

    @jax.jit
    def expectations(xs):
        x, z = sigma_points(data)
        prior = jax.vmap(lambda x: bound.prior_kl(sde, x))(xs).mean()
        diffusion = jax.vmap(lambda x: control_of(data).integral(sde, x, EPS))(xs).mean()
        error = jax.vmap(lambda x, z: bound.noise_error(data.score, sde, x, t, z))(x, z).mean()
        return prior + diffusion + error

    d, variances = data.mean.size, np.asarray(data.eigenvalues)
    log_snr = float(coefficients(sde, t)[2])
    total = float(expectations(x_points(data))) + d / 2 * (np.log(2 * np.pi) - log_snr)
    entropy = 0.5 * np.sum(np.log(2 * np.pi * np.e * variances))
    alpha, sigma, _ = map(float, coefficients(sde, np.array(sde.largest_time)))
    v = alpha**2 * variances + sigma**2
    s2 = (sde.prior_std * sigma / float(coefficients(sde, np.array(1.0))[1])) ** 2
    mean = alpha * np.asarray(data.mean)
    kl = 0.5 * (np.sum(v / s2 - 1 - np.log(v / s2)) + np.sum(mean**2) / s2)
    gap = total - entropy - kl
    assert -1e-8 < gap < d * np.exp(-log_snr) / variances.min()


def test_fit_recovers_mean_and_covariance():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    x = rng.normal(size=(5000, 2, 2, 1)).reshape(5000, 4) @ mix.T + 1.0
    full = bound.GaussianControl.fit(x.reshape(-1, 2, 2, 1))
    rebuilt = full.basis * full.variances[None] @ full.basis.T
    np.testing.assert_allclose(rebuilt, np.cov(x.T), atol=1e-10)
    np.testing.assert_allclose(full.mean, x.mean(0), atol=1e-12)
    diagonal = bound.GaussianControl.fit(x, full=False)
    assert diagonal.basis is None
    np.testing.assert_allclose(diagonal.variances, x.var(0))
    np.testing.assert_allclose(diagonal.mean, x.mean(0), atol=1e-12)
    noisy = bound.GaussianControl.fit(np.ones((9, 3)), noise_variance=0.25)
    np.testing.assert_allclose(noisy.variances, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_data_of_less_precision_have_noise_of_full_precision(dtype):
    """With noise of half precision, the bound of an image would be far below the truth."""
    sde, key, u = SDES["vp"](), jax.random.key(0), jnp.linspace(0, 0.99, 8)
    x = jax.random.normal(jax.random.key(1), (50,)).astype(dtype)
    control = bound.GaussianControl(jnp.zeros(50), jnp.full(50, 0.3), None)

    @jax.jit
    def terms(x):
        elbo = bound.elbo(lambda x, t, key: -x, sde, x, key, eps=EPS, u=u)
        return elbo, bound.prior_kl(sde, x), sde.prior_logp(x), control.integral(sde, x, EPS)

    found, expected = terms(x), terms(x.astype(float))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)
    assert found[0].total.dtype == float


def test_squares_of_a_score_of_less_precision_are_summed_in_float32():
    rng, t = np.random.default_rng(0), jnp.float32(0.5)
    x, z = (jnp.asarray(rng.normal(size=3000), "float32") for _ in range(2))

    def rounded(x, t, key):
        return -x.astype("bfloat16")

    def upcast(x, t, key):
        return rounded(x, t, key).astype("float32")

    found, expected = (
        bound.diffusion_ssm(score, SDES["vp"](), x, t, z, np.ones((1, 3000), "float32"))
        for score in (rounded, upcast)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_data_of_less_precision_are_solved_in_full_precision(dtype):
    sde, x = SDES["vp"](), jnp.asarray([0.5, -1.25]).astype(dtype)

    @jax.jit
    def solve(x):
        how = {"eps": 1e-3, "trace": Trace("exact")}
        result = likelihood.ode_logp(lambda x, t, key: -x, sde, x, None, **how)
        return result.logp, result.z

    for found, expected in zip(solve(x), solve(x.astype(float)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert found.dtype == float
