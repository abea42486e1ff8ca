"""Integrals along solutions: closed forms, their order, and the steps they make short."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import ode, quadrature
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
def integral(solver: Solver) -> tuple[float, ode.Stats]:
    solve = jax.jit(lambda y: ode.solve(decay, y, T0, T1, solver, square))
    (_, found), stats = solve(jnp.ones(()))
    return float(found), stats


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "heun"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_integral_is_the_truth(method: str, power: float) -> None:
    found, stats = integral(
        Solver(method=method, power=power, rtol=1e-9, atol=1e-9, max_steps=100_000)
    )
    assert stats.success
    np.testing.assert_allclose(found, TRUTH, rtol=1e-7)


def test_fixed_steps_converge_at_the_order_of_the_corrected_rule() -> None:
    """Local errors are O(h^7) between two neighbours and O(h^6) at the two ends: order 6."""

    def error(steps: int) -> float:
        return abs(integral(Solver(method="dopri5", fixed_steps=steps, power=1.0))[0] - TRUTH)

    assert np.log2(error(10) / error(20)) > 5.5


def stumble(t: Array, y: Array) -> Array:
    """A decay that is sudden at t = 0.5: steps before it are rejected."""
    return -y * (1 + 30 * jnp.exp(-(((t - 0.5) / 0.02) ** 2)))


@pytest.mark.parametrize("steps", [2, 3, 7, None])
def test_quartics_of_time_are_exact(steps: int | None) -> None:
    """With equal steps, and with uneven and rejected ones."""
    solver = Solver(fixed_steps=steps, power=1.0, rtol=1e-5, atol=1e-5, pcoeff=0.0, icoeff=1.0)

    def quartic(t: Array, y: Array) -> Array:
        return 3 * t**4 - 2 * t**3 + t - 1

    solve = jax.jit(lambda y: ode.solve(stumble, y, T0, T1, solver, quartic))
    (_, found), stats = solve(jnp.ones(()))
    truth = np.diff(np.polyval([3 / 5, -2 / 4, 0, 1 / 2, -1, 0], [T0, T1]))[0]
    np.testing.assert_allclose(found, truth, atol=1e-12)
    assert stats.accepted == steps if steps else stats.rejected > 0


def test_a_short_last_step_does_not_magnify_rounding() -> None:
    """Of a noise of 1e-5 in h, steps of 0.3 and a last one of 1e-5 let about as much through."""
    times = jnp.asarray([0.1, 0.4, 0.7, 1.0, 1.00001])

    def noisy(t: Array, y: Array) -> Array:
        return 5 * (1 + 1e-5 * jnp.sin(1e7 * t))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(quadrature.beside_integral(lambda t, y, args: -y)),
        quadrature.WithIntegral(diffrax.Tsit5(), noisy),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=(jnp.ones(()), jnp.zeros(())),
        stepsize_controller=diffrax.StepTo(times),
    )
    np.testing.assert_allclose(solution.ys[1][0], 5 * (times[-1] - times[0]), atol=1e-4)


def test_simpsons_error_of_a_quartic() -> None:
    t = jnp.asarray([-0.3, -0.1, 0.0, 0.4, 1.1])
    quartic = 3.0 * t**4 - 2.0 * t**3 + t
    expected = 0.5**5 / 2880 * (3.0 * 24)
    assert float(quadrature.simpson_error(jnp.asarray(0.5), t, quartic)) == pytest.approx(expected)


def bump(t: Array, y: Array) -> Array:
    """A peak of area 1 and width 0.02 at t = 0.5."""
    return jnp.exp(-0.5 * ((t - 0.5) / 0.02) ** 2) / (0.02 * np.sqrt(2 * np.pi)) + 0 * jnp.sum(y)


@pytest.mark.parametrize("first_step", [1e-3, 1.0])
def test_steps_are_short_where_only_the_integrand_is_rough(first_step: float) -> None:
    """dy/dt = 0 lets every step be as long as it likes: the integral's own error does not."""
    solver = Solver(rtol=1e-7, atol=1e-7, power=1.0, first_step=first_step)
    still = jax.jit(lambda y: ode.solve(lambda t, y: 0 * y, y, T0, T1, solver, bump))
    (y, found), stats = still(jnp.ones(2))
    np.testing.assert_array_equal(y, 1.0)
    np.testing.assert_allclose(found, 1.0, atol=1e-5)
    assert stats.rejected > 0


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "heun"])
def test_evaluations_are_counted(method: str) -> None:
    calls = {"field": 0, "integrand": 0}

    def count(name: str) -> None:
        calls[name] += 1

    def field(t: Array, y: Array) -> Array:
        jax.debug.callback(lambda: count("field"))
        return stumble(t, y)

    def integrand(t: Array, y: Array) -> Array:
        jax.debug.callback(lambda: count("integrand"))
        return jnp.sum(y)

    solver = Solver(method=method, rtol=1e-5, atol=1e-5, pcoeff=0.0, icoeff=1.0)
    _, stats = jax.jit(lambda y: ode.solve(field, y, T0, T1, solver, integrand))(jnp.ones(3))
    jax.effects_barrier()
    assert stats.rejected > 0
    assert stats.nfe == calls["field"] + calls["integrand"]
    assert calls["integrand"] == 1 + 2 * (stats.accepted + stats.rejected)


def test_integrals_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match="forwards only"):
        ode.solve(decay, jnp.ones(()), T1, T0, Solver(), square)
