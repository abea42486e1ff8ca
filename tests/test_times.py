"""Draws of times: every proposal and every density estimates the same integral."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from families import EVERY_SDE, FAMILIES

from sbml.core.types import Array
from sbml.sdes import SDE, SDES
from sbml.sdes.times import (
    DRAWS,
    PROPOSALS,
    Importance,
    Proposal,
    iid,
    lattice,
)

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


@pytest.fixture(params=EVERY_SDE, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


@pytest.fixture(params=PROPOSALS, name="proposal")
def _proposal(request: pytest.FixtureRequest, sde: SDE) -> Proposal:
    return PROPOSALS[request.param](sde, EPS)


def _integrand(t: Array) -> Array:
    return 1 + t * np.cos(5 * t)


def _towards_last(s: Array) -> tuple[Array, Array]:
    """u(s) on [0, 1] and du/ds, dense near u = 1, the time T."""
    return np.expm1(-16 * s) / np.expm1(-16.0), 16 * np.exp(-16 * s) / -np.expm1(-16.0)


@functools.partial(jax.jit, static_argnums=0)
def _weighting(sde: SDE, t: Array) -> Array:
    return (sde.diffusion(t) / sde.std(t)) ** 2


@functools.partial(jax.jit, static_argnums=0)
def _normaliser(proposal: Importance) -> Array:
    return proposal.normaliser


def _integral(sde: SDE, f: Callable[[Array], Array], end: float, start: float = EPS) -> float:
    """Adaptive quadrature in log t; for a table of levels, whose rate has a kink at each level,
    Gauss-Legendre quadrature between the levels."""
    if hasattr(sde, "alpha_bars"):
        edges = np.unique(np.clip(np.linspace(0, 1, len(sde.alpha_bars)), start, end))
        nodes, weights = np.polynomial.legendre.leggauss(8)
        half = np.diff(edges)[:, None] / 2
        t = edges[:-1, None] + half * (1 + nodes)
        return float(np.sum(half * weights * f(t)))
    value, _ = scipy.integrate.quad(
        lambda s: float(f(np.exp(s))) * np.exp(s), np.log(start), np.log(end), epsrel=1e-11
    )
    return value


@pytest.mark.oracle
def test_weighted_times_integrate_over_t(proposal: Proposal) -> None:
    u, du = _towards_last(0.5 * (NODES + 1))
    t, weight = map(np.asarray, jax.jit(proposal.at)(u))
    estimate = np.sum(0.5 * WEIGHTS * du * weight * _integrand(t))
    expected = _integral(proposal.sde, _integrand, proposal.sde.largest_time)
    # The quadrature over u meets the kinks of a table.
    rtol = 1e-6 if hasattr(proposal.sde, "alpha_bars") else 1e-8
    np.testing.assert_allclose(estimate, expected, rtol=rtol)


@functools.cache
def _points(draw: str, n: int, draws: int) -> Array:
    """Points of 3000 independent keys, ``(3000, n, draws)``."""
    keys = jax.random.split(jax.random.key(0), 3000)
    return jax.jit(jax.vmap(lambda key: DRAWS[draw](key, n, draws)))(keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sde", "density"), [(SDES["vp"](), (1.0, 3.0, 2.0)), (SDES["rectified_flow"](), None)]
)
def test_weights_over_log_snr(proposal: Proposal, density: tuple[float, ...] | None) -> None:
    """The integral over lambda is that of (g / sigma)^2 dt, for every proposal and density."""
    s = (np.arange(400_000) + 0.5) / 400_000  # s^3 is dense near 0, where uniform t has a peak.
    u, du = _towards_last(s**3)
    bins = None if density is None else jnp.asarray(density)
    t, weight = map(np.asarray, proposal.over_log_snr(jnp.asarray(u), bins))
    sde = proposal.sde
    expected = _integral(sde, lambda t: _weighting(sde, t) * _integrand(t), sde.largest_time)
    estimate = np.mean(3 * s**2 * du * weight * _integrand(t))
    np.testing.assert_allclose(estimate, expected, rtol=1e-5)


@pytest.mark.oracle
def test_normaliser_is_the_integral(sde: SDE) -> None:
    expected = _integral(sde, lambda t: _weighting(sde, t), sde.largest_time)
    np.testing.assert_allclose(_normaliser(Importance(sde, EPS)), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "value"), [("vp", 23.8644724), ("subvp", 37.6789457), ("ve", 17.0342160)]
)
def test_normaliser_of_the_papers_schedules(name: str, value: float) -> None:
    found = _normaliser(Importance(SDES[name](), 1e-5))
    assert float(found) == pytest.approx(value, abs=5e-8)


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("sde", [SDES[name]() for name in FAMILIES], ids=FAMILIES)
def test_importance_density_is_proportional_to_the_weighting(sde: SDE) -> None:
    """The distribution function of the drawn times is the normalised integral of g^2/sigma^2."""
    importance = Importance(sde, EPS)
    for u in (0.1, 0.37, 0.9):
        t, weight = importance.at(jnp.asarray(u))
        mass = _integral(sde, lambda t: _weighting(sde, t), float(t))
        np.testing.assert_allclose(mass / importance.normaliser, u, rtol=1e-9)
        density = _weighting(sde, t) / importance.normaliser
        np.testing.assert_allclose(weight * density, 1, rtol=1e-12)


def test_times_stay_in_the_interval(proposal: Proposal) -> None:
    u = np.array([0.0, 1e-7, 0.5, 1 - 2.0**-24, 1 - 2.0**-53])
    t, weight = map(np.asarray, jax.jit(proposal.at)(u))
    np.testing.assert_allclose(t[0], EPS, rtol=1e-10)
    last = proposal.sde.largest_time
    np.testing.assert_allclose(t[-1], last, rtol=1e-10)
    assert np.all((t >= EPS) & (t <= last)) and np.all(weight > 0)


@pytest.mark.slow
def test_float32_times_have_the_error_of_rounded_points(proposal: Proposal) -> None:
    u = jnp.minimum(jnp.linspace(0, 1, 333, dtype=jnp.float32), np.float32(1 - 2.0**-24))
    t, weight = proposal.at(u.astype(float))
    with jax.enable_x64(False):
        t32, weight32 = proposal.at(np.asarray(u))
    assert t32.dtype == weight32.dtype == jnp.float32
    last = proposal.sde.largest_time
    largest = np.float32(last) if last == 1 else np.nextafter(np.float32(last), np.float32(1))
    assert np.all((t32 >= np.float32(EPS)) & (t32 <= largest))
    # An error of 2^-24 in u is an error of Z 2^-24 in log-SNR, and about the same in log t.
    # If the signal vanishes at t = 1, rounding also changes the end of the integral, largest_time.
    # The weights near t = 1 are Z (1 - t) with Z at most 37, and 1 - t has an error of 2^-24.
    rtol, unit = (1e-5, 0.0) if last == 1 else (3e-5, 37 * 2.0**-24)
    np.testing.assert_allclose(t32, t, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(weight32, weight, rtol=rtol, atol=1e-7 + unit)


@pytest.mark.parametrize("draw", DRAWS)
def test_float32_points_near_zero_are_finer_than_the_random_bits_of_one_number(draw: str) -> None:
    """JAX's uniform numbers in float32 are multiples of 2^-23; these points are finer."""
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), 6000)
        u = np.asarray(jax.jit(jax.vmap(lambda key: DRAWS[draw](key, 1)[0, 0]))(keys))
    small = u[u < 2.0**-4].astype(np.float64)
    fractions = small * 2**23 % 1
    assert scipy.stats.kstest(fractions, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("draws", [1, 5])
def test_lattice_has_one_point_in_each_cell(draws: int) -> None:
    n = 7
    for u in np.asarray(_points("lattice", n, draws)[:30]):
        assert u.shape == (n, draws)
        cells = np.floor(u * n * draws)
        assert sorted(cells.ravel()) == list(range(n * draws))


def test_lattice_spreads_each_examples_draws_evenly() -> None:
    u = np.asarray(_points("lattice", 7, 5)[3])
    np.testing.assert_allclose(np.diff(u, axis=1), 1 / 5, rtol=1e-12)


@pytest.mark.parametrize("draw", DRAWS)
def test_each_point_is_uniform(draw: str) -> None:
    """For every example, a single draw is uniform, and so is one from a random column of five."""
    single, five = np.asarray(_points(draw, 7, 1)), np.asarray(_points(draw, 7, 5))
    columns = five[np.arange(3000), :, np.arange(3000) % 5]
    for i in range(7):
        assert scipy.stats.kstest(single[:, i, 0], "uniform").pvalue > 1e-3
        assert scipy.stats.kstest(columns[:, i], "uniform").pvalue > 1e-3


def test_iid_points_are_independent() -> None:
    u = np.asarray(jax.jit(lambda key: iid(key, 5000, 4))(jax.random.key(5)))
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 4 / np.sqrt(5000)
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 4 / np.sqrt(5000)


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("n", "draws"), [(1, 2**23), (2**16, 4)])
def test_float32_points_stay_below_one(draw: str, n: int, draws: int) -> None:
    with jax.enable_x64(False):
        for seed in range(2):
            u = np.asarray(DRAWS[draw](jax.random.key(seed), n, draws))
            assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1


def test_float32_lattice_has_one_point_in_each_cell() -> None:
    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), 20)
        many = jax.jit(jax.vmap(lambda key: lattice(key, 128, 16)))(keys)
        for u in np.asarray(many, np.float64):
            assert sorted(np.floor(u * 2048).ravel()) == list(range(2048))


def test_lattice_reduces_the_variance_of_a_smooth_mean() -> None:
    """The variance of the mean of exp over n = 35 points. For evenly spaced points it is nearly
    ((e - 1) / n)^2 / 12, for independent points Var(exp) / n."""

    def variance(draw: str) -> float:
        return float(np.var(np.mean(np.exp(_points(draw, 7, 5)), axis=(1, 2))))

    rise = np.e - 1
    np.testing.assert_allclose(variance("lattice"), (rise / 35) ** 2 / 12, rtol=0.1)
    np.testing.assert_allclose(variance("iid"), ((np.e**2 - 1) / 2 - rise**2) / 35, rtol=0.2)
