"""A likelihood by the ODE refuses a score that computes in half precision.

The difference of two solves measures the error of the solver. The rounding errors of such a score
are the same in both solves, so the number would be called converged although it is wrong.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import Density
from sbml.core.types import Array
from sbml.likelihood.ode import Solver
from sbml.score import from_prediction
from sbml.sdes import EDM, VP

DIMS, STD = 64, 0.5
SDE = VP()
X = np.random.default_rng(0).normal(0, STD, (4, DIMS)).astype(np.float32)


def exact(x: Array, t: Array, key: Any = None) -> Array:
    """The score of N(0, STD^2 I)."""
    return -x / (SDE.mean_coef(t) ** 2 * STD**2 + SDE.std(t) ** 2)


def half(x: Array) -> Array:
    """``x`` rounded to bfloat16."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def rounded(x: Array, t: Array, key: Any = None) -> Array:
    return half(exact(x, t))


def _repeated(x: Array, t: Array, key: Any) -> Array:
    return jax.lax.scan(lambda s, _: (half(s), None), exact(x, t), None, 2)[0]


def _by_a_rule(x: Array, t: Array, key: Any) -> Array:
    rule = jax.custom_jvp(half)
    rule.defjvp(lambda x, dx: (rule(*x), *dx))
    return rule(exact(x, t))


NESTED: dict[str, Callable[..., Array]] = {
    "plain": rounded,
    "float16": lambda x, t, key: exact(x, t).astype(jnp.float16).astype(x.dtype),
    "16 bits": lambda x, t, key: jax.lax.reduce_precision(exact(x, t), 8, 7),
    "not cast back": lambda x, t, key: exact(x, t).astype(jnp.bfloat16),
    "jit": jax.jit(rounded),
    "scan": _repeated,
    "custom_jvp": _by_a_rule,
    "remat": jax.checkpoint(rounded),
    "cond": lambda x, t, key: jax.lax.cond(t > 0.1, exact, rounded, x, t),
    "while": lambda x, t, key: jax.lax.while_loop(lambda s: s[0] > 2, half, exact(x, t)),
    "the bits of float32": lambda x, t, key: jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(exact(x, t), jnp.uint32) & jnp.uint32(0xFFFF0000), x.dtype
    ),
    "vmap of jit": lambda x, t, key: jax.vmap(jax.jit(half))(exact(x, t)),
}


@pytest.mark.parametrize("name", NESTED)
def test_half_precision_in_a_score_is_refused_before_any_work(name: str) -> None:
    """With data N(0, 1/4), the first score would give -47.326 nats, not -47.074, and this would be
    called converged."""
    density = Density(NESTED[name], SDE, (DIMS,), levels=4)
    kind = name if name in ("float16", "16 bits", "the bits of float32") else "bfloat16"
    message = f"the score computes in {kind}, .* compute it in float32"
    with pytest.raises(ValueError, match=message):
        density.logp(X)
    with pytest.raises(ValueError, match=message):
        density.bits_per_dim(np.zeros((1, DIMS), np.uint8))
    with pytest.raises(ValueError, match=message):
        density.log_prob(X, jax.random.key(0))


def test_a_rounded_noise_prediction_is_refused() -> None:
    sde = EDM()

    def noise(x: Array, t: Array) -> Array:
        sigma = sde.std(t)
        return half(sigma * x / (STD**2 + sigma**2))

    with pytest.raises(ValueError, match="bfloat16, .* compute it in float32"):
        Density(from_prediction(noise, "noise", sde), sde, (DIMS,)).logp(X)


@pytest.mark.slow
def test_bounds_and_samples_of_a_rounded_score_are_computed() -> None:
    """A bound holds for every score, also for a rounded one. Samples come without an error bar."""
    density = Density(rounded, SDE, (DIMS,), solver=Solver(fixed_steps=3))
    assert np.all(np.isfinite(density.bound(X, sweeps=2, times_each=1).values))
    assert np.all(np.isfinite(density.sample(jax.random.key(0), 2)))


@pytest.mark.slow
def test_parameters_may_be_stored_in_half_precision() -> None:
    scale = jnp.full(DIMS, 1.0, jnp.bfloat16)
    score = jax.tree_util.Partial(lambda scale, x, t, key: exact(x, t) * scale, scale)
    found = Density(score, SDE, (DIMS,)).logp(X)
    variance = STD**2
    logp = -0.5 * np.sum(X**2 / variance + np.log(2 * np.pi * variance), axis=1)
    np.testing.assert_allclose(found.values, logp, atol=0.02)
    assert found.converged
