"""What every SDE must fulfil, by automatic differentiation and by textbook formulas."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.stats
from scipy.special import logit

from sbml.core.types import Array
from sbml.sdes import SDE, SDES, VP, LinearGamma

pytestmark = pytest.mark.usefixtures("x64")

TIMES = np.array([1e-6, 1e-5, 1e-3, 0.03, 0.2, 0.5, 0.9, 1.0])
VANISHING = ("rectified_flow", "cosine_vp")  # alpha(T) = 0


def times_of(sde: SDE) -> np.ndarray:
    """``TIMES`` with the largest time as the last one, where the log-SNR is still finite."""
    return np.append(TIMES[:-1], sde.largest_time)


@functools.cache
def values_of(sde: SDE) -> dict[str, np.ndarray]:
    """Its functions at ``times_of``, their slopes, and the inverse of the log-SNR."""
    names = ("drift_coef", "diffusion", "mean_coef", "std", "log_snr", "rate")

    @jax.jit
    def compute(t: Array) -> dict[str, Array]:
        def slope(f: Callable[[Array], Array]) -> Array:
            return jax.vmap(jax.grad(f))(t)

        return {name: getattr(sde, name)(t) for name in names} | {
            "mean_slope": slope(sde.mean_coef),
            "variance_slope": slope(lambda t: sde.std(t) ** 2),
            "log_snr_slope": slope(sde.log_snr),
            "time": sde.time(sde.log_snr(t)),
        }

    return jax.device_get(compute(times_of(sde)))


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
    at = values_of(sde)
    values = at["drift_coef"], at["diffusion"] ** 2, at["mean_coef"], at["std"]
    for value, expected in zip(values, _textbook(name, times_of(sde)), strict=True):
        np.testing.assert_allclose(value, expected.astype(float), rtol=1e-12)


def test_mean_solves_its_equation(sde: SDE) -> None:
    at = values_of(sde)
    expected = at["drift_coef"] * at["mean_coef"]
    np.testing.assert_allclose(at["mean_slope"], expected, rtol=1e-12, atol=1e-15)


def test_variance_solves_its_equation(sde: SDE) -> None:
    at = values_of(sde)
    expected = 2 * at["drift_coef"] * at["std"] ** 2 + at["diffusion"] ** 2
    np.testing.assert_allclose(at["variance_slope"], expected, rtol=1e-9)


def test_log_snr_and_its_inverse(sde: SDE) -> None:
    at = values_of(sde)
    expected = 2 * np.log(at["mean_coef"] / at["std"])
    np.testing.assert_allclose(at["log_snr"], expected, atol=1e-12)
    np.testing.assert_allclose(at["time"], times_of(sde), rtol=1e-12, atol=1e-15)
    assert np.all(np.diff(at["log_snr"]) < 0)


def test_importance_density_is_uniform_in_log_snr(sde: SDE) -> None:
    at = values_of(sde)
    weighting = (at["diffusion"] / at["std"]) ** 2
    np.testing.assert_allclose(weighting, -at["log_snr_slope"], rtol=1e-9)
    np.testing.assert_allclose(at["rate"], -at["log_snr_slope"], rtol=1e-9)


def test_drift_and_marginal_act_on_an_example(sde: SDE) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3))

    @jax.jit
    def compute(t: Array) -> tuple[Array, ...]:
        each = sde.drift_coef(t), sde.mean_coef(t), sde.std(t)
        return sde.drift(x, t), *sde.marginal(x, t), *each

    drift, mean, std, drift_coef, mean_coef, expected = jax.device_get(compute(np.asarray(0.3)))
    np.testing.assert_allclose(drift, drift_coef * x)
    np.testing.assert_allclose(mean, mean_coef * x)
    assert std == expected and std.shape == ()


def test_prior(sde: SDE) -> None:
    z = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)) * sde.prior_std)
    expected = scipy.stats.norm(0, sde.prior_std).logpdf(z).sum()
    np.testing.assert_allclose(sde.prior_logp(z), expected, rtol=1e-12)
    rounding = 4e-3 if isinstance(sde, LinearGamma) else 1e-4  # Its published end has more signal.
    np.testing.assert_allclose(sde.std(jnp.asarray(sde.T)), sde.prior_std, rtol=rounding)


def test_prior_sample(sde: SDE) -> None:
    draw = np.asarray(sde.prior_sample(jax.random.key(2), (50, 100, 4)))
    assert draw.shape == (50, 100, 4)
    assert scipy.stats.kstest(draw.ravel(), scipy.stats.norm(0, sde.prior_std).cdf).pvalue > 1e-3


def test_float32_keeps_its_relative_accuracy(sde: SDE) -> None:
    names = ("drift_coef", "diffusion", "mean_coef", "std", "log_snr")

    @jax.jit
    def compute(t: Array) -> list[tuple[Array, Array]]:
        return [(f(t), f(t.astype(float))) for f in (getattr(sde, name) for name in names)]

    pairs = jax.device_get(compute(times_of(sde).astype(np.float32)))
    for name, (single, double) in zip(names, pairs, strict=True):
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, double, rtol=2e-6, atol=2e-6 * (name == "log_snr"))


def test_float32_inverse_is_as_good_as_its_argument(sde: SDE) -> None:
    """The error is measured in log-SNR, where a float32 argument near 30 has a rounding of 2e-6.

    Near T the rounding of a float32 time is 2^-25, which matters where the log-SNR falls steeply.
    """

    @jax.jit
    def compute(times: Array) -> tuple[Array, ...]:
        log_snr = sde.log_snr(times).astype(jnp.float32)
        t = sde.time(log_snr)
        return log_snr, t, sde.log_snr(t.astype(float)), sde.rate(times)

    times = np.geomspace(1e-6, sde.largest_time, 200)
    log_snr, t, again, rate = jax.device_get(compute(times))
    assert t.dtype == np.float32
    steep = np.where(times < 0.9, 0, rate - 20).clip(0)
    assert (np.abs(again - log_snr.astype(float)) <= 4e-6 + 2.0**-24 * steep).all()


def test_sde_is_a_static_argument(sde: SDE) -> None:
    std = jax.jit(lambda sde, t: sde.std(t), static_argnums=0)
    np.testing.assert_allclose(std(sde, 0.5), sde.std(jnp.asarray(0.5)))
    assert sde == type(sde)() and hash(sde) == hash(type(sde)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.T = 2.0  # type: ignore[misc]


def test_a_constant_beta_is_allowed() -> None:
    at = values_of(VP(beta_min=2.0, beta_max=2.0))
    np.testing.assert_allclose(at["std"] ** 2, -np.expm1(-2 * TIMES), rtol=1e-12)
    np.testing.assert_allclose(at["time"], TIMES, rtol=1e-12)
