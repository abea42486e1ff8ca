"""Likelihoods multiply float32 numbers in float32, on every device, unless the user sets another
precision. The programs are lowered, and what they ask of the compiler is read."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml import likelihood
from sbml.likelihood.ode import Solver
from sbml.score.divergence import Trace
from sbml.sdes import VP

SDE, EPS = VP(), 1e-3
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)) / 3, jnp.float32)
X = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
PIXELS = np.random.default_rng(2).integers(0, 8, (4, 3)).astype(np.uint8)
SOLVER = Solver(fixed_steps=4, adjoint="reverse")


def density(seen: list | None = None, **options) -> sbml.Density:
    """A density whose score has two products; ``seen`` gets the precision at which it is traced."""

    def score(x: jax.Array, t: jax.Array, key: None) -> jax.Array:
        if seen is not None:
            seen.append(jax.config.jax_default_matmul_precision)
        return -x + 0.1 * MATRIX @ jnp.tanh(MATRIX @ x)

    fixed = {"eps": EPS, "solver": SOLVER, "trace": Trace("exact"), **options}
    return sbml.Density(score, SDE, (3,), **fixed)


def asked(f: Callable, *arguments: jax.Array) -> set[str]:
    """The precisions of the products in ``f``, lowered."""
    text = jax.jit(f).lower(*arguments).as_text()
    products = re.findall(r"stablehlo\.dot_general\b.*", text)
    assert products
    return {
        re.findall(r"precision = \[(\w+), \w+\]", p + " precision = [NONE, NONE]")[0]
        for p in products
    }


def of_ode_logp(x: jax.Array) -> jax.Array:
    how = {"eps": EPS, "trace": Trace("exact"), "solver": SOLVER}
    return likelihood.ode_logp(density().score, SDE, x, None, **how).logp


PROGRAMS = {
    "gradient of log_prob": lambda x: jax.grad(lambda x: density().log_prob(x))(x),
    "gradient of ode_logp": jax.grad(of_ode_logp),
    "sample_and_log_prob": lambda x: density().sample_and_log_prob(jax.random.key(0), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_products_of_a_program_are_of_full_precision(program: str) -> None:
    assert asked(PROGRAMS[program], X[0]) == {"HIGHEST"}
    with jax.default_matmul_precision("default"):
        assert "DEFAULT" in asked(PROGRAMS[program], X[0])


MEASUREMENTS = {
    "bound": lambda d: d.bound(X),
    "bits_per_dim": lambda d: d.bits_per_dim(PIXELS),
    "sample": lambda d: d.sample(jax.random.key(0), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_traces_its_score_at_full_precision(name: str) -> None:
    before = jax.config.jax_default_matmul_precision
    levels = 8 if name == "bits_per_dim" else None
    seen: list = []
    MEASUREMENTS[name](density(seen, levels=levels))
    assert {*seen} == {"highest"}
    assert jax.config.jax_default_matmul_precision == before


@pytest.mark.slow
def test_a_measurement_traces_its_score_at_the_precision_that_the_user_chose() -> None:
    with jax.default_matmul_precision("tensorfloat32"):
        MEASUREMENTS["sample"](density(chosen := []))
    assert {*chosen} == {"tensorfloat32"}
