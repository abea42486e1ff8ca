"""Bits/dim compared with numbers computed by hand, and the map from pixels to x and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml.core import bits

LEVELS = (2, 17, 256)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_uniform_density_costs_log2_of_the_levels(levels: int) -> None:
    """With the density (1/2)^d on [-1, 1]^d all levels have the same probability."""
    shape = (4, 4, 3)
    nll = jnp.asarray(48 * math.log(2))
    np.testing.assert_allclose(bits.bits_per_dim(nll, shape, levels), math.log2(levels), rtol=1e-6)


def test_bits_per_dim_by_hand() -> None:
    """10 nats over 4 dimensions of 256 levels: 10 / (4 log 2) + log2 128."""
    value = bits.bits_per_dim(jnp.asarray(10.0), (2, 2), 256)
    np.testing.assert_allclose(value, 3.6067376 + 7.0, rtol=1e-6)
    np.testing.assert_allclose(bits.nats_to_bits(jnp.asarray(10.0), (2, 2)), 3.6067376, rtol=1e-6)
    assert bits.scale_nats((2, 2), 256) == pytest.approx(4 * math.log(128))


def test_bits_per_dim_of_a_gaussian_are_its_entropy_in_the_scale_of_integers() -> None:
    """The density is that of k + u: N(0, s^2) in x is N(., (s L / 2)^2) in k."""
    s, levels, d = 0.3, 17, 5
    nll = d * 0.5 * math.log(2 * math.pi * math.e * s**2)
    expected = 0.5 * math.log2(2 * math.pi * math.e * (s * levels / 2) ** 2)
    np.testing.assert_allclose(bits.bits_per_dim(jnp.asarray(nll), (d,), levels), expected, 1e-6)


def test_bits_per_dim_maps_over_a_batch() -> None:
    nll = jnp.asarray([1.0, 2.0, jnp.nan])
    values = np.asarray(bits.bits_per_dim(nll, (3,), 256))
    np.testing.assert_allclose(values[:2], np.array([1, 2]) / (3 * math.log(2)) + 7, rtol=1e-6)
    assert np.isnan(values[2])


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, 1 - 2.0**-10, 1 - 2.0**-23, 1 - 2.0**-24])
def test_every_level_is_restored_from_its_value_in_the_model(
    levels: int, dtype: type, u: float
) -> None:
    k = np.arange(levels).astype(dtype)
    x = bits.to_model(jnp.asarray(k), np.full(levels, u, np.float32), levels)
    assert x.dtype == jnp.float32
    back = bits.to_pixels(x, levels)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, k)


@pytest.mark.parametrize("levels", LEVELS)
def test_bins_tile_the_interval(levels: int) -> None:
    """The left ends are -1, -1 + 2/L, ...; the middles are half a width, 1/L, further right."""
    k = jnp.arange(levels, dtype=jnp.uint8)
    left = np.asarray(bits.to_model(k, jnp.zeros(levels), levels), np.float64)
    middle = np.asarray(bits.to_model(k, 0.5, levels), np.float64)
    np.testing.assert_allclose(left, np.linspace(-1, 1, levels + 1)[:-1], atol=1e-6)
    np.testing.assert_allclose(middle - left, 1 / levels, atol=1e-6)


def test_the_last_bin_ends_below_one() -> None:
    x = bits.to_model(jnp.asarray([255], jnp.uint8), jnp.asarray([1 - 2.0**-24]), 256)
    assert x[0] < 1


@pytest.mark.parametrize("levels", [1000, 4096, 65_536])
def test_many_levels_keep_their_bins_in_float32(levels: int) -> None:
    """Every k + u is in the bin of k; integers are refused and dequantized ones are not."""
    k = np.arange(levels)
    x = bits.to_model(jnp.asarray(k), jnp.full(levels, 1 - 2.0**-24), levels)
    edges = 2 * (k + 1) / levels - 1
    assert x.dtype == jnp.float32 and np.all(np.asarray(x, np.float64) < edges)
    for integers in (2 * k / levels - 1, 2 * k / (levels - 1) - 1):
        with pytest.raises(ValueError, match=f"{levels} levels; dequantize"):
            bits.check_dequantized(jnp.asarray(integers, jnp.float32), levels)
    with jax.enable_x64(True):
        exact = bits.to_model(jnp.asarray(k), jnp.full(levels, 1 - 2.0**-12), levels)
        np.testing.assert_allclose(exact, edges - 2 * 2.0**-12 / levels, atol=1e-15)
    u = np.random.default_rng(0).random(levels)
    bits.check_dequantized(bits.to_model(jnp.asarray(k), jnp.asarray(u), levels), levels)


def test_values_outside_go_to_the_nearest_level() -> None:
    x = jnp.asarray([-7.0, -1.0001, 1.0, 1.3, 50.0])
    np.testing.assert_array_equal(bits.to_pixels(x, 17), [0, 0, 16, 16, 16])


@pytest.mark.parametrize("levels", LEVELS)
def test_integers_that_were_not_dequantized_are_refused(levels: int) -> None:
    k = np.random.default_rng(0).integers(0, levels, (3, 4, 4, 1))
    for x in (2 * k / levels - 1, 2 * k / (levels - 1) - 1):
        with pytest.raises(ValueError, match=f"{levels} levels; dequantize"):
            bits.check_dequantized(jnp.asarray(x, jnp.float32), levels)


@pytest.mark.parametrize("levels", LEVELS)
def test_dequantized_values_pass(levels: int) -> None:
    rng = np.random.default_rng(1)
    k = rng.integers(0, levels, (3, 4, 4, 1))
    bits.check_dequantized(bits.to_model(k, rng.uniform(size=k.shape), levels), levels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_u_of_half_precision_stays_in_its_bin(dtype: str) -> None:
    pixels, u = np.arange(256, dtype=np.uint8)[:, None], jnp.linspace(0, 1, 50).astype(dtype)[None]
    x = bits.to_model(pixels, u, 256)
    assert x.dtype == jnp.float32
    found = bits.to_pixels(x, 256)
    np.testing.assert_array_equal(found, np.broadcast_to(pixels, found.shape))
