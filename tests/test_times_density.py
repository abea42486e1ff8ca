"""Densities of times: points that follow them, their floors, and the tallies that learn them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml.core.types import Array
from sbml.sdes.times import lattice, tally, warp, with_floor

pytestmark = pytest.mark.usefixtures("x64")

SCALE = np.asarray([3.0, 0.2, np.nan, 1.0, 0.0])
floored, warped, tallied = jax.jit(with_floor), jax.jit(warp), jax.jit(tally)


@pytest.mark.oracle
@pytest.mark.parametrize("floor", [0.05, 1.0])
def test_warped_points_integrate_over_v(floor: float) -> None:
    """With Gauss-Legendre nodes in each bin of u, the integrals of powers of v are exact."""
    density = floored(SCALE, floor)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    edges = np.concatenate([[0], np.cumsum(density) / np.sum(density)])
    mass = np.diff(edges)
    u = edges[:-1, None] + mass[:, None] * 0.5 * (nodes + 1)
    v, inverse = map(np.asarray, warped(u, density))
    for power in range(12):
        estimate = np.sum(mass[:, None] * 0.5 * weights * inverse * v**power)
        np.testing.assert_allclose(estimate, 1 / (power + 1), rtol=1e-13)


@pytest.mark.oracle
def test_warped_points_follow_the_density() -> None:
    """If u is evenly spread, the fraction of the points v in a bin is the mass of the bin. The
    weights are 1/q."""
    density = np.asarray([1.0, 4.0, 0.5, 2.5])  # not normalised: the mean is 2
    v, inverse = warped((np.arange(8000) + 0.5) / 8000, density)
    k = np.floor(np.asarray(v) * 4).astype(int)
    np.testing.assert_array_equal(np.bincount(k), [1000, 4000, 500, 2500])
    np.testing.assert_allclose(inverse, 2 / density[k], rtol=1e-13)
    assert np.all(np.diff(v) > 0)


@pytest.mark.oracle
def test_the_best_density_makes_a_step_function_exact() -> None:
    """If q is proportional to h, then h / q is constant, so every draw equals the integral. With a
    floor this is no longer exact."""
    h = np.asarray([5.0, 1.0, 2.0])
    u = np.linspace(0, 0.999, 50)
    for floor, exact in ((1e-9, True), (0.1, False)):
        v, inverse = map(np.asarray, warped(u, floored(h, floor)))
        values = inverse * h[np.floor(3 * v).astype(int)]
        assert (np.ptp(values) < 1e-7) == exact
        assert np.all(inverse <= 1 / floor)


def test_with_floor_by_hand() -> None:
    """The mean of the others, 1.05, replaces nan. Then q = (1 - floor) scale / 1.05 + floor."""
    scale = np.asarray([3.0, 0.2, 1.05, 1.0, 0.0])
    np.testing.assert_allclose(floored(SCALE, 0.1), 0.9 * scale / 1.05 + 0.1)


@pytest.mark.parametrize(
    "scale",
    [
        [0.0, 0.0, 0.0],
        [np.nan, np.nan, np.nan],
        [np.inf, -1.0, -np.inf],
        [2e38, 2e38, 2e38],
        [1e-38, np.nan, 1e-38],
    ],
)
def test_a_scale_without_information_gives_the_uniform_density(scale: list[float]) -> None:
    with jax.enable_x64(False):
        np.testing.assert_allclose(floored(np.asarray(scale, np.float32)), 1, rtol=1e-6)


def test_extreme_scales_keep_floor_and_mean() -> None:
    with jax.enable_x64(False):
        for scale in ([3e38, 1e-38, 0.0, np.nan], [np.inf, 0.0, 7.0, 1e-30]):
            density = np.asarray(floored(np.asarray(scale, np.float32)))
            assert density.min() >= np.float32(0.1)
            np.testing.assert_allclose(density.mean(), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "bins", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 100)), 1000]
)
def test_float32_warp(bins: int) -> None:
    """Every u in [0, 1) falls into a bin, and v never decreases with u. The relative error of 1/q
    is the rounding error of the mass of a bin."""
    rng = np.random.default_rng(bins)
    with jax.enable_x64(False):
        density = np.asarray(floored(np.exp(8 * rng.normal(size=bins)).astype(np.float32)))
        near_edges = np.cumsum(density, dtype=np.float64) / np.sum(density, dtype=np.float64)
        ends = [0.0, 2.0**-149, 1e-7, 1 - 2.0**-24]
        u = np.concatenate([ends, rng.random(5000), near_edges[:-1]]).astype(np.float32)
        u = np.sort(np.clip(u, 0, 1 - 2.0**-24))
        v, inverse = map(np.asarray, warped(u, density))
    assert v.dtype == inverse.dtype == np.float32
    assert v.min() >= 0 and v.max() < 1 and v[-1] > 1 - 1e-4
    assert np.all(np.diff(v) >= 0)
    assert np.all((inverse > 0) & (inverse < 10 * (1 + 1e-7 * 10 * bins)))
    middle = np.abs(v * bins - np.round(v * bins)) > 1e-3
    expected = 1 / np.asarray(density, np.float64)[np.floor(v[middle] * bins).astype(int)]
    np.testing.assert_allclose(inverse[middle], expected, rtol=2e-7 * 10 * bins)


def test_a_density_may_be_0_in_bins_and_may_change_without_a_new_compilation() -> None:
    traces = []

    @jax.jit
    def compiled(u: Array, density: Array) -> tuple[Array, Array]:
        traces.append(density)
        return warp(u, density)

    u = np.linspace(0, 0.9999, 100)
    for density in ([0.0, 1.0, 0.0, 3.0], [1.0, 0.0, 1e-30, 0.0]):
        v, inverse = compiled(u, jnp.asarray(density))
        assert np.all(np.asarray(density)[np.floor(4 * np.asarray(v)).astype(int)] > 0)
        assert np.all(np.isfinite(inverse))
    assert len(traces) == 1


@pytest.mark.slow
def test_a_bin_that_rounding_would_lose_is_refused() -> None:
    """In float32, no point would fall into the second bin of the first density, so the integral of
    1 would be estimated as 1/2."""
    u = jnp.linspace(0, 1, 1000, endpoint=False, dtype=jnp.float32)
    for lost in ([1.0, 1e-9], [1e8, *[1.0] * 31]):
        # The lower precision of points and density counts.
        for points, kind in ((u, float), (u.astype(float), jnp.float32), (u, jnp.float32)):
            with pytest.raises(ValueError, match="density has a bin with .* of its sum, which"):
                warp(points, jnp.asarray(lost, kind))
    with jax.enable_x64(False), pytest.raises(ValueError, match="which the rounding of float32"):
        warp(np.linspace(0, 0.9, 9), jnp.asarray([1.0, 1e-9]))
    for kind, bins in ((jnp.float16, 129), (jnp.bfloat16, 32), (jnp.float32, 2**16)):
        v, _ = warp(jnp.asarray([0.0, 0.5], kind), jnp.ones(bins, kind))
        assert abs(float(v[1]) - 0.5) < 0.02
    for least, kind in ((2e-6, jnp.float32), (1e-9, jnp.float64)):
        v, inverse = warp(jnp.asarray([1 - least / 2], kind), jnp.asarray([1.0, least]))
        assert float(v[0]) == pytest.approx(0.75, abs=0.05)  # The middle of the second bin.
        assert float(inverse[0]) == pytest.approx(1 / (2 * least), rel=0.1)


def test_tally_by_hand() -> None:
    counts = np.asarray([[4.0, 2.0, 0.0], [8.0, 1.0, 0.0]])
    v = np.asarray([0.0, 0.32, 0.34, 1.0])
    new = tallied(counts, v, np.asarray([1.0, 2.0, 10.0, -3.0]), 0.5)
    np.testing.assert_allclose(new, [[4.0, 2.0, 1.0], [7.0, 10.5, -3.0]])


def test_a_tally_ignores_values_that_are_not_finite() -> None:
    values = np.asarray([1.0, np.nan, 10.0, np.inf])
    new = tallied(np.zeros((2, 2)), np.asarray([0.1, 0.2, 0.6, 0.7]), values, 0.5)
    np.testing.assert_array_equal(new, [[1.0, 1.0], [1.0, 10.0]])


@pytest.mark.slow
@pytest.mark.oracle
def test_a_tally_learns_the_density() -> None:
    """The points v are drawn from the density that the tally learns. The mean in each bin is right
    without the weights 1/q, because q is constant in a bin."""
    truth = jnp.asarray([4.0, 1.0, 0.25, 2.0])

    def step(counts: Array, key: Array) -> tuple[Array, None]:
        point_key, value_key = jax.random.split(key)
        density = with_floor(jnp.sqrt(counts[1] / counts[0]))
        v, _ = warp(lattice(point_key, 40)[:, 0], density)
        noise = jax.random.normal(value_key, (40,))
        values = truth[jnp.floor(4 * v).astype(int)] * noise**2
        return tally(counts, v, values, 0.999), None

    keys = jax.random.split(jax.random.key(2), 1000)
    counts, _ = jax.jit(lambda k: jax.lax.scan(step, jnp.zeros((2, 4)), k))(keys)
    np.testing.assert_allclose(counts[1] / counts[0], truth, rtol=0.1)
