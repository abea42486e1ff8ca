"""Exact and estimated divergence of a nonlinear field, compared with its trace in closed form."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from sbml.core.types import Array, Key
from sbml.score import divergence

pytestmark = pytest.mark.usefixtures("x64")

SHAPE, N = (2, 3), 20_000
A = np.random.default_rng(0).normal(size=(6, 6))
B = np.random.default_rng(1).normal(size=(6, 6))
X = np.random.default_rng(2).normal(size=SHAPE)


def field(x: Array) -> Array:
    """sin(A x) + x * (B x), flattened."""
    flat, a, b = x.ravel(), jnp.asarray(A, x.dtype), jnp.asarray(B, x.dtype)
    return (jnp.sin(a @ flat) + flat * (b @ flat)).reshape(x.shape)


def jacobian() -> np.ndarray:
    flat = X.ravel()
    return np.cos(A @ flat)[:, None] * A + np.diag(B @ flat) + flat[:, None] * B


VALUE = (np.sin(A @ X.ravel()) + X.ravel() * (B @ X.ravel())).reshape(SHAPE)
probes = jax.jit(divergence.probes, static_argnums=(1, 2, 3))
exact = jax.jit(lambda x: divergence.exact(field, x))
quadratic_forms = jax.jit(lambda x, vs: divergence.quadratic_forms(field, x, vs))
hutchinson = jax.jit(lambda x, vs: divergence.hutchinson(field, x, vs))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def independent(key: Key, shape: tuple[int, ...], count: int, kind: str) -> Array:
    """Probes ``(N, count, *shape)`` from N keys."""
    keys = jax.random.split(key, N)
    return jax.vmap(lambda key: divergence.probes(key, shape, count, kind))(keys)


def test_exact_divergence_is_the_trace() -> None:
    value, trace = exact(X)
    np.testing.assert_allclose(value, VALUE, rtol=1e-14)
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-12)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_exact_divergence_of_a_transformed_field(wrap: Callable) -> None:
    value, trace = jax.jit(lambda x: divergence.exact(wrap(field), x))(X)
    np.testing.assert_allclose(value, VALUE, rtol=1e-14)
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-12)


def test_quadratic_forms() -> None:
    vs = probes(jax.random.key(0), SHAPE, 5, "gaussian")
    _, forms = quadratic_forms(X, vs)
    flat = np.asarray(vs).reshape(5, 6)
    np.testing.assert_allclose(forms, np.einsum("ki,ij,kj->k", flat, jacobian(), flat), rtol=1e-12)


def test_basis() -> None:
    np.testing.assert_array_equal(divergence.basis(SHAPE).reshape(6, 6), np.eye(6))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", divergence.PROBES)
def test_hutchinson_is_unbiased_with_the_known_variance(kind: str) -> None:
    """With S the symmetric part of J, the variance is 2 |S|^2 for a Gaussian probe; for a
    Rademacher probe, the diagonal does not contribute."""
    vs = independent(jax.random.key(1), SHAPE, 1, kind)
    forms = np.asarray(quadratic_forms(X, np.asarray(vs)[:, 0])[1])
    symmetric = 0.5 * (jacobian() + jacobian().T)
    variance = 2 * np.sum(symmetric**2)
    if kind == "rademacher":
        variance -= 2 * np.sum(np.diag(symmetric) ** 2)
    assert abs(np.mean(forms) - np.trace(jacobian())) < 3 * np.sqrt(variance / N)
    np.testing.assert_allclose(np.var(forms), variance, rtol=0.1)


def test_hutchinson_is_the_mean_over_its_probes() -> None:
    vs = probes(jax.random.key(2), SHAPE, 7)
    value, estimate = hutchinson(X, vs)
    _, forms = quadratic_forms(X, vs)
    np.testing.assert_allclose(value, VALUE, rtol=1e-14)
    np.testing.assert_allclose(estimate, np.mean(np.asarray(forms)), rtol=1e-12)


def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian() -> None:
    expected = np.sum(3 * X**2)
    cubes = jax.jit(lambda vs: divergence.hutchinson(lambda x: x**3, jnp.asarray(X), vs)[1])
    for seed in range(5):
        vs = probes(jax.random.key(seed), SHAPE, 1, "rademacher")
        assert float(cubes(vs)) == pytest.approx(expected, rel=1e-13)
        gaussian = probes(jax.random.key(seed), SHAPE, 1, "gaussian")
        assert abs(float(cubes(gaussian)) - expected) > 1e-3


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(4, 4, 2), (32,)])
def test_the_variance_of_several_probes_comes_from_entries_of_one_colour(
    shape: tuple[int, ...], count: int
) -> None:
    """The mean's variance is 2 sum_{i != l} S_il^2 r_il^2, with r of SciPy's Hadamard matrix."""
    d = math.prod(shape)
    J = np.random.default_rng(4).normal(size=(d, d))
    vs = independent(jax.random.key(5), shape, count, "rademacher")
    vs = np.asarray(vs).reshape(N, count, d)
    means = np.mean(np.einsum("nki,il,nkl->nk", vs, J, vs, optimize=True), axis=1)
    rows = scipy.linalg.hadamard(64)[:count, divergence.colours(shape).ravel() % 64]
    shared = (rows.T @ rows / count) ** 2
    np.fill_diagonal(shared, 0)
    variance = 2 * np.sum((0.5 * (J + J.T)) ** 2 * shared)
    assert abs(np.mean(means) - np.trace(J)) < 3 * np.sqrt(variance / N)
    np.testing.assert_allclose(np.var(means), variance, rtol=0.1)
    single = 2 * np.sum((0.5 * (J + J.T)) ** 2 * (1 - np.eye(d)))
    assert variance < 1.15 * single / count  # that of independent probes, for a J without structure


def test_as_many_probes_as_colours_give_the_exact_trace() -> None:
    """With 8 probes, the 6 entries all have different colours, so all cross terms cancel."""
    _, estimate = hutchinson(X, probes(jax.random.key(6), SHAPE, 8))
    np.testing.assert_allclose(estimate, np.trace(jacobian()), rtol=1e-12)


def test_neighbours_have_different_colours() -> None:
    """The lowest bit differs between adjacent pixels, and between channels 0 and 1 of a pixel. The
    lowest two bits differ within a 2x2 block, and among all channels of a pixel; the lowest four
    within a 4x4 block. All entries of an image have different colours."""
    colours = divergence.colours((16, 8, 3))
    assert len(np.unique(colours)) == colours.size
    one, two = colours % 2, colours % 4
    assert np.all(np.diff(one, axis=0) != 0) and np.all(np.diff(one, axis=1) != 0)
    assert np.all(one[..., 0] != one[..., 1])
    assert all(len(set(pixel)) == 3 for pixel in two.reshape(-1, 3))
    for size, numbers in ((2, two), (4, colours % 16)):
        for block in (numbers[y : y + size, x : x + size, 0] for y in (0, 8) for x in (0, 4)):
            assert len(np.unique(block)) == size**2
    for y, x in ((1, 0), (0, 1)):  # The lowest four bits of adjacent pixels differ.
        one, other = colours[: 16 - y, : 8 - x] % 16, colours[y:, x:] % 16
        assert not np.any(one[..., :, None] == other[..., None, :])
    np.testing.assert_array_equal(divergence.colours((2, 3)), [[0, 1, 2], [3, 4, 5]])


def test_probes_have_the_distribution_they_are_named_after() -> None:
    key = jax.random.key(3)
    signs, normal = (np.asarray(independent(key, SHAPE, 1, kind)) for kind in divergence.PROBES)
    assert signs.shape == normal.shape == (N, 1, *SHAPE)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    for values, fourth_moment in ((signs, 1), (normal, 3)):
        flat = values.reshape(N, 6)
        np.testing.assert_allclose(flat.T @ flat / N, np.eye(6), atol=0.1)
        assert np.mean(flat**4) == pytest.approx(fourth_moment, rel=0.1)


def test_float32_examples_keep_their_dtype() -> None:
    with jax.enable_x64(False):
        value, trace = exact(X)
    assert value.dtype == trace.dtype == jnp.float32
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-5)
