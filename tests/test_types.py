"""The shapes and types that signatures name: checked in these tests, and by the functions."""

import importlib
import pickle

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shapes

from sbml import likelihood, losses
from sbml.core import bits
from sbml.core.types import (
    Array,
    Example,
    Key,
    Keys,
    batch_score,
    check_function,
    of_shape,
    predictor,
)
from sbml.score.divergence import Trace
from sbml.sdes import SDES, MonotoneGamma, times

VP, KEY, T = SDES["vp"](), jax.random.key(0), jnp.asarray(0.5)


def score(x: Array, t: Array, key: Key | None) -> Array:
    return -x


def test_a_wrong_shape_is_refused() -> None:
    x, z = jnp.ones((2, 3)), jnp.zeros((2, 3))
    assert losses.perturb(VP, x, T, z).shape == (2, 3)
    with pytest.raises(ValueError, match="^t is"):
        losses.perturb(VP, x, jnp.full((3,), 0.5), z)
    with pytest.raises(ValueError, match="^z is"):
        losses.perturb(VP, x, T, z[0])  # It would broadcast.
    with pytest.raises(ValueError, match="^x is"):
        losses.perturb(VP, jnp.ones((2, 3), int), T, z)


def test_a_wrong_shape_of_a_result_fails_in_the_tests() -> None:
    ones = jnp.ones((2,))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value of .*gamma"):
        MonotoneGamma(k1=ones, b1=0.0, k2=ones, b2=ones, k3=ones).std(T)


def test_keys_and_arrays_are_told_apart() -> None:
    numbers = jnp.zeros(()), jnp.zeros((2,), jnp.uint32), jax.random.PRNGKey(0)
    assert isinstance(KEY, Key) and not isinstance(KEY, Example)
    assert not any(isinstance(a, Key) for a in numbers)
    assert isinstance(jax.random.split(KEY, 3), Keys) and not isinstance(KEY, Keys)
    assert losses.dsm(score, VP, jnp.ones(3), T, KEY).shape == ()
    for wrong in (*numbers, jax.random.split(KEY)):
        with pytest.raises(ValueError, match="^key is"):
            losses.dsm(score, VP, jnp.ones(3), T, wrong)
    with pytest.raises(ValueError, match="^x is"):
        losses.dsm(score, VP, KEY, T, KEY)
    with pytest.raises(ValueError, match="key is uint32 of shape"):
        times.lattice(jnp.zeros((2,), jnp.uint32), 4)


def test_nats_may_be_an_integer() -> None:
    assert bits.bits_per_dim(jnp.asarray(1), (3,), 16) == bits.bits_per_dim(1.0, (3,), 16)


@pytest.mark.parametrize("name", shapes.CHECKED)
def test_every_module_of_the_list_is_checked(name: str) -> None:
    """It was not imported before the checks were installed."""
    assert "_JaxtypingLoader" in type(importlib.import_module(name).__spec__.loader).__name__


def test_checked_functions_are_the_same_for_jit_and_pickle() -> None:
    calls = []

    def counted(x: Array, t: Array, key: Key | None) -> Array:
        calls.append(1)
        return -x

    loss = jax.jit(losses.dsm, static_argnums=(0, 1))
    for i in range(3):
        loss(counted, VP, jnp.full((3,), float(i)), T, jax.random.key(i))
    assert len(calls) == 1
    for thing in (losses.dsm, type(VP).std, VP, times.Importance(VP, 1e-5), Trace("exact")):
        assert pickle.loads(pickle.dumps(thing)) == thing
        assert hash(thing) == hash(pickle.loads(pickle.dumps(thing)))


def test_what_a_score_returned_is_checked() -> None:
    x = jnp.ones((2, 3))
    assert of_shape(x, x) is x
    for wrong, shape in ((x[None], r"\(1, 2, 3\)"), (x[0], r"\(3,\)"), (x[0, 0], r"\(\)")):
        with pytest.raises(ValueError, match=rf"returned shape {shape} for an input of \(2, 3\)"):
            of_shape(wrong, x)
    for dtype in (jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64):
        with pytest.raises(ValueError, match=rf"returned {jnp.dtype(dtype)} for .* floating-point"):
            of_shape(x.astype(dtype), x)
    assert of_shape(x.astype(jnp.bfloat16), x).dtype == jnp.bfloat16


def rounded(x: Array, t: Array, key: Key | None) -> Array:
    return jnp.round(-x).astype(int)


class Rounded:
    """A score whose predictions are integers."""

    def predictions(self, x: Array, t: Array) -> tuple[Array, Array]:
        return jnp.zeros(x.shape, int), x

    __call__ = staticmethod(rounded)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [rounded, Rounded()])
def test_a_score_of_integers_has_no_likelihood(wrong: object) -> None:
    """A rounded score has the derivative 0 almost everywhere, so the divergence would be wrong."""
    with pytest.raises(ValueError, match="the score returned int32 for an input of float32"):
        likelihood.ode_logp(wrong, VP, jnp.ones(3), KEY, eps=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_the_parts_of_a_score_are_checked_too() -> None:
    with pytest.raises(ValueError, match="returned int32"):
        predictor(Rounded())(jnp.ones(3), T)
    with pytest.raises(ValueError, match="returned int32"):
        losses.dsm(rounded, VP, jnp.ones(3), T, KEY)
    with pytest.raises(ValueError, match="returned int32"):
        keys = jax.random.split(KEY, 2)
        losses.dsm_batch(rounded, VP, jnp.ones((2, 3)), jnp.full((2,), 0.5), keys)
    assert batch_score(score)(jnp.ones((2, 3)), jnp.full((2,), 0.5), None).shape == (2, 3)


@pytest.mark.parametrize(
    "f",
    [lambda x, t: x, lambda x, t, key=None: x, lambda *arguments: 0, jax.jit(jnp.multiply), max],
)
def test_what_can_be_called_is_accepted(f) -> None:
    """``max`` has no signature that Python knows."""
    check_function(f, "network", "x", "t")
