"""Integrals along ODE solutions: closed forms, order of convergence, and step control."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml.core.types import Array
from sbml.likelihood import ode, quadrature
from sbml.likelihood.ode import Solver

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.oracle]

T0, T1 = 1e-3, 1.0

Field = Callable[[Array, Array], Array]


def decay(t: Array, y: Array) -> Array:
    """dy/dt = -2 t y: y(t) = exp(T0^2 - t^2) from y(T0) = 1."""
    return -2 * t * y


def square(t: Array, y: Array) -> Array:
    return t * jnp.sum(y**2)


def zero(t: Array, y: Array) -> Array:
    return jnp.zeros(())


def both(field: Field, integrand: Field, gradient: Field = zero) -> quadrature.Joint:
    return lambda t, y: (field(t, y), integrand(t, y), gradient(t, y))


def to_come(t: Array, y: Array) -> Array:
    """The gradient in y of V(t, y) = y^2 / 4 (1 - exp(2 t^2 - 2 T1^2)), ``square`` from t on."""
    return y / 2 * (1 - jnp.exp(2 * (t**2 - T1**2)))


# The integral of t exp(2 T0^2 - 2 t^2) over [T0, T1].
TRUTH = 0.25 * (1 - np.exp(2 * (T0**2 - T1**2)))


@functools.cache
def integral(solver: Solver) -> tuple[float, ode.Stats]:
    solve = jax.jit(
        lambda y: ode.solve_with_integral(decay, both(decay, square), y, T0, T1, solver)
    )
    (_, value, correction), stats = solve(jnp.ones(()))
    assert correction == 0.0
    return float(value), stats


@pytest.mark.parametrize(
    ("method", "power"),
    [
        ("tsit5", 1.0),
        ("dopri5", 2.0),
        ("heun", 1.0),
        pytest.param("tsit5", 2.0, marks=pytest.mark.slow),
        pytest.param("dopri5", 1.0, marks=pytest.mark.slow),
        pytest.param("heun", 2.0, marks=pytest.mark.slow),
    ],
)
def test_the_integral_is_the_truth(method: str, power: float) -> None:
    value, stats = integral(
        Solver(method=method, power=power, rtol=1e-9, atol=1e-9, max_steps=100_000)
    )
    assert stats.success
    np.testing.assert_allclose(value, TRUTH, rtol=1e-7)


def test_fixed_steps_converge_at_the_order_of_the_method() -> None:
    """In each step the rule's error is O(h^7), and the error of y at its points O(h^5)."""

    def error(steps: int) -> float:
        return abs(integral(Solver(method="dopri5", fixed_steps=steps, power=1.0))[0] - TRUTH)

    assert np.log2(error(10) / error(20)) > 4.8


@functools.cache
def corrected(method: str, steps: int) -> Callable[[Array, Array], Array]:
    """The corrected integral in equal steps as a function of y(T0) and of ``share``: the gradient
    is multiplied by it."""
    solver = Solver(method=method, fixed_steps=steps, power=1.0)

    @jax.jit
    def solve(y: Array, share: Array) -> Array:
        joint = both(decay, square, lambda t, y: share * to_come(t, y))
        (_, value, correction), _ = ode.solve_with_integral(decay, joint, y, T0, T1, solver)
        return value + correction

    return solve


def corrected_error(method: str, steps: int, share: float) -> float:
    return float(corrected(method, steps)(jnp.ones(()), jnp.asarray(share))) - TRUTH


@pytest.mark.slow
@pytest.mark.parametrize("method", ["euler", "tsit5"])
def test_along_any_curve_the_gradient_makes_the_value_exact(method: str) -> None:
    """This holds also along Euler's broken line: only the rule's error, O(h^6) in all, is left."""
    assert abs(corrected_error(method, 10, 0.0)) > 20 * abs(corrected_error(method, 10, 1.0))
    assert np.log2(abs(corrected_error(method, 5, 1.0) / corrected_error(method, 10, 1.0))) > 5.3


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_gradient_with_an_error_of_a_tenth_leaves_a_tenth_of_the_error(method: str) -> None:
    assert corrected_error(method, 10, 0.9) == pytest.approx(
        corrected_error(method, 10, 0.0) / 10, rel=1e-2
    )


def test_steps_are_short_where_only_the_correction_is_large() -> None:
    """The field and the integrand are the same, but w is 1e8 times as large."""

    def steps(scale: float) -> int:
        solver = Solver(rtol=1e-4, atol=1e-4, power=1.0)
        joint = both(decay, square, lambda t, y: scale * to_come(t, y))
        _, stats = jax.jit(lambda y: ode.solve_with_integral(decay, joint, y, T0, T1, solver))(
            jnp.ones(())
        )
        return int(stats.accepted)

    assert steps(1e8) > 2 * steps(1.0)


def stumble(t: Array, y: Array) -> Array:
    """A sudden decay at t = 0.5, because of which steps are rejected."""
    return -y * (1 + 30 * jnp.exp(-(((t - 0.5) / 0.02) ** 2)))


@pytest.mark.parametrize(
    "steps",
    [2, None, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)],
)
def test_quintics_of_time_are_exact(steps: int | None) -> None:
    """The steps are equal, or uneven with some rejected."""
    solver = Solver(fixed_steps=steps, power=1.0, rtol=1e-7, atol=1e-7, pcoeff=0.0, icoeff=1.0)

    def quintic(t: Array, y: Array) -> Array:
        return 6 * t**5 + 3 * t**4 - 2 * t**3 + t - 1

    solve = jax.jit(
        lambda y: ode.solve_with_integral(stumble, both(stumble, quintic), y, T0, T1, solver)
    )
    (_, value, _), stats = solve(jnp.ones(()))
    truth = np.diff(np.polyval([1, 3 / 5, -2 / 4, 0, 1 / 2, -1, 0], [T0, T1]))[0]
    np.testing.assert_allclose(value, truth, atol=1e-12)
    assert stats.accepted == steps if steps else stats.rejected > 0


def nodes(start: float, end: float) -> np.ndarray:
    return start + (end - start) * np.array([0, *quadrature.INSIDE, 1])


def test_lobattos_error_of_a_sextic_is_exact() -> None:
    before, now = nodes(-0.7, -0.3), nodes(-0.3, 0.4)

    def sextic(t: np.ndarray) -> np.ndarray:
        return 3.0 * t**6 - 2.0 * t**5 + t

    truth = np.diff(np.polyval([3 / 7, -2 / 6, 0, 0, 0, 1 / 2, 0, 0], now[[0, 3]]))[0]
    value = quadrature.lobatto(jnp.asarray(0.7), jnp.asarray(sextic(now)))
    t = jnp.asarray([*before, *now[1:]])
    error = quadrature.lobatto_error(jnp.asarray(0.7), t, sextic(t))
    assert float(value - error) == pytest.approx(truth, abs=1e-13)
    assert abs(float(error)) > 1e-4


@pytest.mark.parametrize("length, most", [(3e-3, 1e-6), (0.3, 1e-6), (3.0, 100e-6)])
def test_the_error_estimate_does_not_magnify_rounding(length: float, most: float) -> None:
    """Noise of 1e-6 in h after a step of 0.3. Only a ten times longer step may amplify it."""
    rng = np.random.default_rng(0)
    t = jnp.asarray([*nodes(-0.3, 0.0), *nodes(0.0, length)[1:]])
    errors = [
        quadrature.lobatto_error(jnp.asarray(length), t, jnp.asarray(1e-6 * rng.normal(size=7)))
        for _ in range(100)
    ]
    assert np.std(errors) < most * length


def test_the_error_estimate_of_a_lone_step_is_an_upper_bound() -> None:
    """For h = 1 / (1 + t^2), also around its peak, it is less than 1,000 times the error; it is 0
    for a line."""
    for start, length in ((0.2, 0.25), (0.2, 0.5), (0.2, 1.0), (-0.5, 1.0)):
        t = nodes(start, start + length)
        h = jnp.asarray(1 / (1 + t**2))
        truth = np.arctan(t[3]) - np.arctan(t[0])
        error = abs(float(quadrature.lobatto(jnp.asarray(length), h)) - truth)
        estimate = float(quadrature.lone_step_error(jnp.asarray(length), h))
        assert error < estimate < 1e3 * error
    assert float(quadrature.lone_step_error(jnp.asarray(1.0), jnp.asarray(t))) < 1e-25


def bump(t: Array, y: Array) -> Array:
    """A peak of area 1 and width 0.05 at t = 0.5."""
    return jnp.exp(-0.5 * ((t - 0.5) / 0.05) ** 2) / (0.05 * np.sqrt(2 * np.pi)) + 0 * jnp.sum(y)


@pytest.mark.parametrize("first_step", [1e-3, 1.0])
def test_steps_are_short_where_only_the_integrand_is_rough(first_step: float) -> None:
    """With dy/dt = 0, only the error of the integral limits the steps."""
    solver = Solver(rtol=1e-7, atol=1e-7, power=1.0, first_step=first_step)
    joint = both(lambda t, y: 0 * y, bump)
    still = jax.jit(lambda y: ode.solve_with_integral(lambda t, y: 0 * y, joint, y, T0, T1, solver))
    (y, value, _), stats = still(jnp.ones(2))
    np.testing.assert_array_equal(y, 1.0)
    np.testing.assert_allclose(value, 1.0, atol=1e-5)
    assert stats.rejected > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tsit5", "heun"])
def test_evaluations_are_counted(method: str) -> None:
    calls = {"field": 0, "joint": 0}

    def count(name: str) -> None:
        calls[name] += 1

    def field(t: Array, y: Array) -> Array:
        jax.debug.callback(lambda: count("field"))
        return stumble(t, y)

    def joint(t: Array, y: Array) -> tuple[Array, Array, Array]:
        jax.debug.callback(lambda: count("joint"))
        return stumble(t, y), jnp.sum(y), zero(t, y)

    solver = Solver(method=method, rtol=1e-5, atol=1e-5, pcoeff=0.0, icoeff=1.0)
    _, stats = jax.jit(lambda y: ode.solve_with_integral(field, joint, y, T0, T1, solver))(
        jnp.ones(3)
    )
    jax.effects_barrier()
    assert stats.rejected > 0
    assert stats.nfe == calls["field"] + calls["joint"]
    assert calls["joint"] == 1 + 3 * (stats.accepted + stats.rejected)


@pytest.mark.slow
def test_integrals_backwards_are_those_of_the_same_path() -> None:
    solver = Solver(rtol=1e-8, atol=1e-8)
    joint = both(decay, square)
    (end, integral, correction), _ = ode.solve_with_integral(
        decay, joint, jnp.ones(()), T0, T1, solver
    )
    (start, back, correction_back), _ = ode.solve_with_integral(
        decay, joint, end, T1, T0, solver, backwards=True
    )
    assert float(start) == pytest.approx(1.0, abs=1e-7)
    assert float(back + correction_back) == pytest.approx(-float(integral + correction), abs=1e-7)
