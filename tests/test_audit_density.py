"""The audit of a continuous log p: its fields are compared with the oracle, and it is tried on code
that is right, and on code with the usual mistakes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from sbml.audit import density
from sbml.audit.continuous import KINDS, Field, worlds
from sbml.audit.suite import FAIL, NOTE

RNG = np.random.default_rng(0)


def vp(t: Any) -> tuple[Any, Any]:
    """alpha and sigma, from the integral of beta = .1 + 19.9 t."""
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    return np.exp(-0.5 * integral), np.sqrt(1 - np.exp(-integral))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("velocity", "mixture 2"), ("score", "wide prior 2"), ("noise", "wide prior 2")],
)
def test_fields_against_derivatives_of_the_density(kind: str, name: str) -> None:
    """log p_t is that of a sum of x_0 and noise; the fields follow by Tweedie's formula."""
    field, t = worlds(kind)[name], 0.3
    alpha, sigma = (1 - t, t) if kind == "velocity" else vp(t)
    width, x = sigma * field.prior_std, RNG.normal(size=(3, 2))
    parts, w = field.world.parts, np.asarray(field.world.weights)

    def log_p(x: Any) -> Any:
        joint = [
            jax.scipy.stats.multivariate_normal.logpdf(
                x, alpha * m, alpha**2 * (b * v[None]) @ b.T + width**2 * np.eye(2)
            )
            for m, v, b in zip(parts.mean, parts.eigenvalues, parts.basis, strict=True)
        ]
        return jax.nn.logsumexp(jnp.stack(joint), b=w)

    s = jax.jit(jax.vmap(jax.grad(log_p)))(x)
    noise = -width * s
    expected = {
        "velocity": field.prior_std * noise - (x + width**2 * s) / alpha,
        "score": s,
        "noise": noise,
    }[kind]
    np.testing.assert_allclose(field(x, t), expected, rtol=1e-9)
    np.testing.assert_allclose(field(x, np.full(3, t)), expected, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(field)(jnp.asarray(x), t), expected, rtol=1e-9)
    np.testing.assert_allclose(field.log_prob(x), field.world.log_prob(x), rtol=1e-9)
    reverse = Field(kind, field.world, field.prior_std, reverse=True)
    sign = -1 if kind == "velocity" else 1
    np.testing.assert_allclose(reverse(x, 1 - t), sign * expected, rtol=1e-9)


def exact(field: Field, shape: Any, **how: Any) -> Any:
    return field.log_prob


def noisy(field: Field, shape: Any, probes: int, seed: int) -> Any:
    def log_prob(x: np.ndarray) -> np.ndarray:
        z = np.random.default_rng(seed).normal(size=len(x))
        return field.log_prob(x) + 0.1 * z / math.sqrt(probes)

    return log_prob


def changed(change: Any) -> Any:
    return lambda field, shape, **how: lambda x: change(x, field.log_prob(x))


def half_the_jacobian(field: Field, shape: Any) -> Any:
    """Right but for data of an unusual scale."""
    wide = np.asarray(field.world.parts.eigenvalues).max() > 1.5
    return lambda x: field.log_prob(x) + wide


def same_noise(field: Field, shape: Any, probes: int, seed: int) -> Any:
    return noisy(field, shape, 1, seed)


def without_seed(field: Field, shape: Any) -> Any:
    return lambda x: field.log_prob(x) + 1e-6 * np.random.default_rng().normal(size=len(x))


@pytest.mark.parametrize(
    ("make", "failing", "options"),
    [
        (exact, set(), {}),
        (noisy, set(), {"probes": (1, 16)}),
        (changed(lambda x, p: p + 0.02), {"value", "normalised", "float32"}, {}),
        (changed(lambda x, p: p + 0.02 * (len(x) == 1)), {"independent"}, {}),
        (changed(lambda x, p: p + (x.dtype == np.float32)), {"float32"}, {}),
        (without_seed, {"repeatable"}, {}),
        (half_the_jacobian, {"rescaled"}, {}),
        (same_noise, {"spread"}, {"probes": (1, 16)}),
        (
            changed(lambda x, p: np.where(p < -9, np.nan, p)),
            {"value", "normalised", "independent", "float32", "rescaled"},
            {},
        ),
    ],
)
def test_each_check_fails_for_its_mistake(make: Any, failing: set[str], options: Any) -> None:
    report = density(make, "noise", **options)
    assert report.failed == failing and report.passed == (not failing), str(report)
    assert len({f.world for f in report.findings}) == 12


def test_steps_of_the_whole_batch_are_a_note() -> None:
    report = density(changed(lambda x, p: p + 1e-3 * (len(x) == 1)))
    assert report.passed and not report.failed
    assert [f.check for f in report.findings if f.verdict == NOTE] == ["independent"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(8, 1\) for 8 examples"):
        density(changed(lambda x, p: p[:, None]))
    with pytest.raises(ValueError, match=r"probes=\(4, 1\): give a smaller and a larger"):
        density(exact, probes=(4, 1))
    with pytest.raises(ValueError, match="kind is 'flow'.*among 'velocity'"):
        density(exact, "flow")


# Code that solves the ODE.


def velocity(field: Field) -> Any:
    """The field as a velocity, with the time of the data at 0."""

    def v(x: np.ndarray, t: float) -> np.ndarray:
        given = np.asarray(field(x, t))
        if field.kind == "velocity":
            return given
        alpha, sigma = vp(t)
        s = given if field.kind == "score" else -given / (sigma * field.prior_std)
        return -0.5 * (0.1 + 19.9 * t) * (x + field.prior_std**2 * s)

    return v


def rates(field: Field, directions: np.ndarray, factor: float) -> Any:
    """The velocity of ``x (n, d)``, and ``factor`` times the sum over directions e ``(k, d)`` of
    e^T J e, by differences."""
    v, h, k = velocity(field), 1e-4, len(directions)

    def both(x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        moves = np.concatenate([np.zeros_like(directions[:1]), directions, -directions])
        points = x[:, None] + h * moves
        found = v(points.reshape(-1, x.shape[1]), t).reshape(points.shape)
        slopes = (found[:, 1 : k + 1] - found[:, k + 1 :]) / (2 * h)
        return found[:, 0], factor * np.sum(slopes * directions, axis=(1, 2))

    return both


def solved(
    *, start: float = 1e-6, sign: int = 1, width: float | None = None, mean: bool = True
) -> Any:
    """Runge-Kutta's method in sqrt(t) for all examples at once, with its mistakes."""

    def make(field: Field, shape: tuple[int], probes: int = 0, seed: int = 0) -> Any:
        [d] = shape
        directions = np.eye(d)
        if probes:
            directions = np.random.default_rng(seed).choice([-1.0, 1.0], (probes, d))
        both = rates(field, directions, 1 / probes if probes and mean else 1.0)
        std = field.prior_std if width is None else width

        def log_prob(x: np.ndarray) -> np.ndarray:
            def rate(x: np.ndarray, u: float) -> np.ndarray:
                found, divergence = both(x[:, :d], u**2)
                return 2 * u * np.column_stack([found, divergence])

            state, times = np.column_stack([x, np.zeros(len(x))]), np.linspace(start**0.5, 1, 41)
            for u, h in zip(times[:-1], np.diff(times), strict=True):
                one = rate(state, u)
                two = rate(state + 0.5 * h * one, u + 0.5 * h)
                three = rate(state + 0.5 * h * two, u + 0.5 * h)
                four = rate(state + h * three, u + h)
                state = state + h / 6 * (one + 2 * two + 2 * three + four)
            z = state[:, :d] / std
            prior = -0.5 * np.sum(z**2, axis=1) - d * math.log(std * math.sqrt(2 * math.pi))
            return prior + sign * state[:, d]

        return log_prob

    return make


def by_scipy(field: Field, shape: tuple[int]) -> Any:
    """One solve for all examples of a batch, whose steps depend on all of them."""
    [d], both = shape, rates(field, np.eye(shape[0]), 1.0)

    def log_prob(x: np.ndarray) -> np.ndarray:
        def rate(t: float, state: np.ndarray) -> np.ndarray:
            return np.column_stack(both(state.reshape(-1, d + 1)[:, :d], t)).ravel()

        start = np.column_stack([x, np.zeros(len(x))]).ravel()
        end = solve_ivp(rate, (0.0, 1.0), start, rtol=1e-6, atol=1e-6).y[:, -1].reshape(-1, d + 1)
        std = field.prior_std
        prior = -0.5 * np.sum((end[:, :d] / std) ** 2, axis=1)
        return prior - d * math.log(std * math.sqrt(2 * math.pi)) + end[:, d]

    return log_prob


def reversed_time(field: Field, shape: tuple[int]) -> Any:
    """Code for data at t = 1 and noise at t = 0."""
    return solved()(turned(field), shape)


def turned(field: Field) -> Any:
    """The field with its time turned, as this code takes it."""

    class Turned:
        kind, prior_std = field.kind, field.prior_std

        def __call__(self, x: np.ndarray, t: float) -> np.ndarray:
            return -field(x, 1 - t)

    return Turned()


@pytest.mark.slow
def test_code_that_is_right_passes() -> None:
    for kind in KINDS:
        assert density(solved(), kind).passed
    report = density(by_scipy)
    assert report.passed, str(report)
    assert [f.check for f in report.findings if f.verdict == NOTE] == ["independent"]
    report = density(solved(), probes=(1, 4), calls=8)
    assert not report.failed, str(report)
    assert density(reversed_time, reverse=True).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "failing", "options"),
    [
        (solved(sign=-1), {"value", "normalised", "float32", "rescaled"}, {}),
        (solved(start=0.01), {"value", "float32"}, {}),
        (solved(width=1.0), {"value"}, {}),
        (solved(width=1.1), {"value", "float32"}, {}),
        (reversed_time, {"value", "time", "normalised", "float32"}, {}),
        (solved(mean=False), {"value"}, {"probes": (1, 4), "calls": 8}),
    ],
)
def test_code_with_a_mistake_fails(make: Any, failing: set[str], options: Any) -> None:
    report = density(make, **options)
    assert failing <= report.failed, str(report)
    if "time" in failing:
        words = [f.words for f in report.findings if f.check == "time" and f.verdict == FAIL]
        assert words == ["right with reverse=True"]
