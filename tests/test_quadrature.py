"""Integrals along solutions: closed forms, their order, and the steps of the solution alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import ode
from sbml.ode import Solver
from sbml.types import Array

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.oracle]

T0, T1 = 1e-3, 1.0


def decay(t: Array, y: Array) -> Array:
    """dy/dt = -2 t y: y(t) = exp(T0^2 - t^2) from y(T0) = 1."""
    return -2 * t * y


def square(t: Array, y: Array) -> Array:
    return t * jnp.sum(y**2)


# The integral of t exp(2 T0^2 - 2 t^2) over [T0, T1].
TRUTH = 0.25 * (1 - np.exp(2 * (T0**2 - T1**2)))


@functools.cache
def integral(solver: Solver, backwards: bool = False) -> tuple[float, ode.Stats]:
    start, (t0, t1) = jnp.ones(()), (T0, T1)
    if backwards:
        start, t0, t1 = jnp.exp(T0**2 - T1**2), T1, T0
    solve = jax.jit(lambda y: ode.solve(decay, y, t0, t1, solver, square))
    (_, found), stats = solve(start)
    return float(found), stats


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "heun"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_integral_is_the_truth(method: str, power: float) -> None:
    found, stats = integral(Solver(method=method, power=power, rtol=1e-8, atol=1e-8))
    assert stats.success
    np.testing.assert_allclose(found, TRUTH, rtol=5e-6)


def test_backwards_it_changes_sign() -> None:
    found, _ = integral(Solver(rtol=1e-8, atol=1e-8), backwards=True)
    np.testing.assert_allclose(found, -TRUTH, rtol=5e-6)


@pytest.mark.parametrize(("nodes", "order"), [(1, 2), (2, 4)])
def test_more_nodes_have_a_higher_order(nodes: int, order: int) -> None:
    """Twice the steps divide the error by 2^order: that of the sum, the path's is of order 5."""

    def error(steps: int) -> float:
        solver = Solver(method="dopri5", fixed_steps=steps, power=1.0, nodes=nodes)
        return abs(integral(solver)[0] - TRUTH)

    assert np.log2(error(5) / error(10)) == pytest.approx(order, abs=0.5)


def test_the_solution_and_its_steps_do_not_see_the_integral() -> None:
    solver = Solver(rtol=1e-6, atol=1e-6)
    alone, stats = jax.jit(lambda y: ode.solve(decay, y, T0, T1, solver))(jnp.ones(()))
    solve = jax.jit(lambda y: ode.solve(decay, y, T0, T1, solver, lambda t, y: 1e6 * y))
    (beside, _), same = solve(jnp.ones(()))
    np.testing.assert_array_equal(beside, alone)
    assert (same.accepted, same.rejected) == (stats.accepted, stats.rejected)
    steps = stats.accepted + stats.rejected
    assert same.nfe == stats.nfe + solver.nodes * steps
