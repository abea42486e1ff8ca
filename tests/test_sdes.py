"""What every SDE must fulfil, by automatic differentiation and by textbook formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
from scipy.special import logit

from sbml.sdes import SDE, SDES, VE, VP, LinearGamma, LinearVE, SubVP

pytestmark = pytest.mark.usefixtures("x64")

TIMES = np.array([1e-6, 1e-5, 1e-3, 0.03, 0.2, 0.5, 0.9, 1.0])
VANISHING = ("rectified_flow", "cosine_vp")  # alpha(T) = 0


def times_of(sde: SDE) -> np.ndarray:
    """``TIMES`` with the largest time as the last one, where the log-SNR is still finite."""
    return np.append(TIMES[:-1], sde.largest_time)


@pytest.fixture(params=SDES, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


def _textbook(name: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """f, g^2, alpha and sigma by the textbook formulas, in extended precision."""
    t = t.astype(np.longdouble)
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    decay = np.exp(-integral)
    if name == "vp":
        return -beta / 2, beta, np.sqrt(decay), np.sqrt(1 - decay)
    if name == "subvp":
        return -beta / 2, beta * (1 - decay**2), np.sqrt(decay), 1 - decay
    if name == "ve":
        sigma = 0.01 * (50 / np.longdouble(0.01)) ** t
        return 0 * t, 2 * np.log(5000) * sigma**2, 1 + 0 * t, sigma
    if name == "linear_ve":
        return 0 * t, 2 * 50**2 * t, 1 + 0 * t, 50 * t
    if name == "edm":
        return 0 * t, 2 * 80**2 * t, 1 + 0 * t, 80 * t
    if name == "beta_schedule":
        alpha_bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        table = scipy.interpolate.PchipInterpolator(np.arange(1000), logit(alpha_bars))
        steps = 999 * t.astype(float)
        log_snr, slope = table(steps), 999 * table.derivative()(steps)
        signal, noise = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
        return slope * noise / 2, -slope * noise, np.sqrt(signal), np.sqrt(noise)
    if name == "rectified_flow":
        return -1 / (1 - t), 2 * t / (1 - t), 1 - t, t
    if name == "linear_gamma":
        signal, noise = (1 / (1 + np.exp(s * (-13.3 + 18.3 * t))) for s in (1, -1))
        return -18.3 / 2 * noise, 18.3 * noise, np.sqrt(signal), np.sqrt(noise)
    assert name == "cosine_vp", f"{name} needs its textbook formula here"
    angle, half_pi = np.arccos(np.longdouble(0)) * t, np.arccos(np.longdouble(0))
    return -half_pi * np.tan(angle), 2 * half_pi * np.tan(angle), np.cos(angle), np.sin(angle)


@pytest.mark.parametrize("name", SDES)
def test_coefficients_are_those_of_the_textbook_formulas(name: str) -> None:
    sde = SDES[name]()
    times = times_of(sde)
    t = jnp.asarray(times)
    values = sde.drift_coef(t), sde.diffusion(t) ** 2, sde.mean_coef(t), sde.std(t)
    for value, expected in zip(values, _textbook(name, times), strict=True):
        np.testing.assert_allclose(value, expected.astype(float), rtol=1e-12)


def test_mean_solves_its_equation(sde: SDE) -> None:
    t = times_of(sde)
    slope = jax.vmap(jax.grad(sde.mean_coef))(t)
    np.testing.assert_allclose(slope, sde.drift_coef(t) * sde.mean_coef(t), rtol=1e-12, atol=1e-15)


def test_variance_solves_its_equation(sde: SDE) -> None:
    t = jnp.asarray(times_of(sde))
    slope = jax.vmap(jax.grad(lambda t: sde.std(t) ** 2))(t)
    expected = 2 * sde.drift_coef(t) * sde.std(t) ** 2 + sde.diffusion(t) ** 2
    np.testing.assert_allclose(slope, expected, rtol=1e-9)


def test_log_snr_and_its_inverse(sde: SDE) -> None:
    t = jnp.asarray(times_of(sde))
    log_snr = sde.log_snr(t)
    np.testing.assert_allclose(log_snr, 2 * jnp.log(sde.mean_coef(t) / sde.std(t)), atol=1e-12)
    np.testing.assert_allclose(sde.time(log_snr), t, rtol=1e-12, atol=1e-15)
    assert np.all(np.diff(log_snr) < 0)


def test_importance_density_is_uniform_in_log_snr(sde: SDE) -> None:
    t = jnp.asarray(times_of(sde))
    slope = jax.vmap(jax.grad(sde.log_snr))(t)
    np.testing.assert_allclose((sde.diffusion(t) / sde.std(t)) ** 2, -slope, rtol=1e-9)
    np.testing.assert_allclose(sde.rate(t), -slope, rtol=1e-9)


def test_drift_and_marginal_act_on_an_example(sde: SDE) -> None:
    x, t = jax.random.normal(jax.random.key(0), (2, 3)), jnp.asarray(0.3)
    np.testing.assert_allclose(sde.drift(x, t), sde.drift_coef(t) * np.asarray(x))
    mean, std = sde.marginal(x, t)
    np.testing.assert_allclose(mean, sde.mean_coef(t) * np.asarray(x))
    assert std == sde.std(t) and std.shape == ()


def test_prior(sde: SDE) -> None:
    z = jax.random.normal(jax.random.key(1), (2, 3)) * sde.prior_std
    expected = scipy.stats.norm(0, sde.prior_std).logpdf(z).sum()
    np.testing.assert_allclose(sde.prior_logp(z), expected, rtol=1e-12)
    rounding = 4e-3 if isinstance(sde, LinearGamma) else 1e-4  # Its published end has more signal.
    np.testing.assert_allclose(sde.std(jnp.asarray(sde.T)), sde.prior_std, rtol=rounding)


def test_prior_sample(sde: SDE) -> None:
    draw = np.asarray(sde.prior_sample(jax.random.key(2), (50, 100, 4)))
    assert draw.shape == (50, 100, 4)
    assert scipy.stats.kstest(draw.ravel(), scipy.stats.norm(0, sde.prior_std).cdf).pvalue > 1e-3


def test_float32_keeps_its_relative_accuracy(sde: SDE) -> None:
    t = jnp.asarray(times_of(sde), jnp.float32)
    for f in (sde.drift_coef, sde.diffusion, sde.mean_coef, sde.std):
        assert f(t).dtype == jnp.float32
        np.testing.assert_allclose(f(t), f(t.astype(float)), rtol=2e-6)
    np.testing.assert_allclose(sde.log_snr(t), sde.log_snr(t.astype(float)), rtol=2e-6, atol=2e-6)


def test_float32_inverse_is_as_good_as_its_argument(sde: SDE) -> None:
    """The error is measured in log-SNR, where a float32 argument near 30 has a rounding of 2e-6.

    Near T the rounding of a float32 time is 2^-25, which matters where the log-SNR falls steeply.
    """
    times = np.geomspace(1e-6, sde.largest_time, 200)
    log_snr = sde.log_snr(jnp.asarray(times)).astype(jnp.float32)
    t = sde.time(log_snr)
    assert t.dtype == jnp.float32
    steep = np.where(times < 0.9, 0, np.asarray(sde.rate(times)) - 20).clip(0)
    error = np.abs(sde.log_snr(t.astype(float)) - log_snr.astype(float))
    assert (error <= 4e-6 + 2.0**-24 * steep).all()


def test_sde_is_a_static_argument(sde: SDE) -> None:
    std = jax.jit(lambda sde, t: sde.std(t), static_argnums=0)
    np.testing.assert_allclose(std(sde, 0.5), sde.std(jnp.asarray(0.5)))
    assert sde == type(sde)() and hash(sde) == hash(type(sde)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.T = 2.0  # type: ignore[misc]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (VP, {"beta_min": 0.0}),
        (VP, {"beta_min": -1.0}),
        (SubVP, {"beta_min": 3.0, "beta_max": 2.0}),
        (VP, {"beta_max": math.nan}),
        (VP, {"beta_max": 1e9}),
        (VE, {"sigma_min": 0.0}),
        (VE, {"sigma_min": 2.0, "sigma_max": 1.0}),
        (LinearVE, {"sigma_max": 0.0}),
        (LinearVE, {"sigma_max": math.nan}),
    ],
)
def test_invalid_parameters_are_refused(kind: type[SDE], arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"\b{next(iter(arguments))}\b"):
        kind(**arguments)


def test_a_constant_beta_is_allowed() -> None:
    sde, t = VP(beta_min=2.0, beta_max=2.0), jnp.asarray(TIMES)
    np.testing.assert_allclose(sde.std(t) ** 2, -np.expm1(-2 * TIMES), rtol=1e-12)
    np.testing.assert_allclose(sde.time(sde.log_snr(t)), t, rtol=1e-12)
