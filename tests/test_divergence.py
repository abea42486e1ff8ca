"""Exact and estimated divergence against the closed form of a nonlinear field's trace."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import divergence
from sbml.types import Array

pytestmark = pytest.mark.usefixtures("x64")

SHAPE = (2, 3)
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


def test_exact_divergence_is_the_trace() -> None:
    value, trace = divergence.exact(field, jnp.asarray(X))
    np.testing.assert_allclose(value, field(jnp.asarray(X)), rtol=1e-14)
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-12)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_exact_divergence_of_a_transformed_field(wrap: Callable) -> None:
    value, trace = jax.jit(lambda x: divergence.exact(wrap(field), x))(X)
    np.testing.assert_allclose(value, field(jnp.asarray(X)), rtol=1e-14)
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-12)


def test_quadratic_forms() -> None:
    vs = divergence.probes(jax.random.key(0), SHAPE, 5, "gaussian")
    _, forms = divergence.quadratic_forms(field, jnp.asarray(X), vs)
    flat = np.asarray(vs).reshape(5, 6)
    np.testing.assert_allclose(forms, np.einsum("ki,ij,kj->k", flat, jacobian(), flat), rtol=1e-12)


def test_basis() -> None:
    np.testing.assert_array_equal(divergence.basis(SHAPE).reshape(6, 6), np.eye(6))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", divergence.PROBES)
def test_hutchinson_is_unbiased_with_the_known_variance(kind: str) -> None:
    """With S the symmetric part of J: 2 |S|^2 for a Gaussian probe, less the diagonal's share
    for a Rademacher one."""
    n = 20_000
    vs = divergence.probes(jax.random.key(1), SHAPE, n, kind)
    _, forms = divergence.quadratic_forms(field, jnp.asarray(X), vs)
    symmetric = 0.5 * (jacobian() + jacobian().T)
    variance = 2 * np.sum(symmetric**2)
    if kind == "rademacher":
        variance -= 2 * np.sum(np.diag(symmetric) ** 2)
    assert abs(np.mean(forms) - np.trace(jacobian())) < 3 * np.sqrt(variance / n)
    np.testing.assert_allclose(np.var(forms), variance, rtol=0.1)


def test_hutchinson_is_the_mean_over_its_probes() -> None:
    vs = divergence.probes(jax.random.key(2), SHAPE, 7)
    value, estimate = divergence.hutchinson(field, jnp.asarray(X), vs)
    _, forms = divergence.quadratic_forms(field, jnp.asarray(X), vs)
    np.testing.assert_allclose(value, field(jnp.asarray(X)), rtol=1e-14)
    np.testing.assert_allclose(estimate, np.mean(forms), rtol=1e-12)


def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian() -> None:
    expected = np.sum(3 * X**2)
    for seed in range(5):
        vs = divergence.probes(jax.random.key(seed), SHAPE, 1, "rademacher")
        assert divergence.hutchinson(lambda x: x**3, jnp.asarray(X), vs)[1] == pytest.approx(
            expected, rel=1e-13
        )
        gaussian = divergence.probes(jax.random.key(seed), SHAPE, 1, "gaussian")
        estimate = divergence.hutchinson(lambda x: x**3, jnp.asarray(X), gaussian)[1]
        assert abs(estimate - expected) > 1e-3


def test_probes_have_the_distribution_they_are_named_after() -> None:
    signs = np.asarray(divergence.probes(jax.random.key(3), SHAPE, 2000, "rademacher"))
    normal = np.asarray(divergence.probes(jax.random.key(3), SHAPE, 2000, "gaussian"))
    assert signs.shape == normal.shape == (2000, *SHAPE)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    for values, fourth_moment in ((signs, 1), (normal, 3)):
        flat = values.reshape(2000, 6)
        np.testing.assert_allclose(flat.T @ flat / 2000, np.eye(6), atol=0.1)
        assert np.mean(flat**4) == pytest.approx(fourth_moment, rel=0.1)


def test_float32_examples_keep_their_dtype() -> None:
    with jax.enable_x64(False):
        value, trace = divergence.exact(field, jnp.asarray(X))
    assert value.dtype == trace.dtype == jnp.float32
    np.testing.assert_allclose(trace, np.trace(jacobian()), rtol=1e-5)


def test_unknown_probes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown probe distribution 'sobol'"):
        divergence.probes(jax.random.key(0), SHAPE, 1, "sobol")
    with pytest.raises(ValueError, match="0 probes"):
        divergence.probes(jax.random.key(0), SHAPE, 0)
