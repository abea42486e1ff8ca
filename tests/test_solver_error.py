"""An estimate that is called converged is right, for any tolerance of the solver.

The true numbers are from a solve in float64 with tolerances of 1e-9. A converged estimate claims
that its mean error is within the budget, and that the 95% interval of the printed solver error
contains this mean error.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml.core.types import Array, Key, Score
from sbml.density import estimate
from sbml.likelihood import ode
from sbml.likelihood.ode import Solver
from sbml.sdes import VP

SDE, EPS, N, DIMS = VP(), 1e-3, 16, 2
TOLERANCES = [10.0**power for power in range(0, -7, -1)]  # down to the least of float32


def gaussian(x: Array, t: Array, key: Key | None) -> Array:
    """The exact score of N(0.3, diag(0.25, 0.01))."""
    alpha, sigma = SDE.mean_coef(t), SDE.std(t)
    return -(x - 0.3 * alpha) / (alpha**2 * jnp.asarray([0.25, 0.01], x.dtype) + sigma**2)


def mixture(x: Array, t: Array, key: Key | None) -> Array:
    """The exact score of four narrow Gaussians."""
    alpha, sigma = SDE.mean_coef(t), SDE.std(t)
    centres = alpha * jnp.asarray([[0.6, 0.6], [-0.6, 0.5], [0.4, -0.7], [-0.5, -0.4]], x.dtype)
    away, variance = x[None] - centres, alpha**2 * 0.05**2 + sigma**2
    weights = jax.nn.softmax(-0.5 * jnp.sum(away**2, axis=1) / variance)
    return -weights @ away / variance


def network(x: Array, t: Array, key: Key | None) -> Array:
    """A random network that predicts the noise; this score is not a gradient."""
    rng = np.random.default_rng(0)
    w1, w2 = (jnp.asarray(rng.normal(0, 0.7, s), x.dtype) for s in ((32, 3), (2, 32)))
    hidden = jnp.tanh(w1 @ jnp.append(x, 0.3 * SDE.log_snr(t)))
    return -(w2 @ hidden) / SDE.std(t)


_ALL = (gaussian, mixture, network)


def _one_of(chosen: Array, x: Array, t: Array, key: Key | None) -> Array:
    return jax.lax.switch(chosen, _ALL, x, t, key)


# A traced number selects one of these scores, so that all three share compiled functions.
SCORES = {f.__name__: jax.tree_util.Partial(_one_of, jnp.asarray(i)) for i, f in enumerate(_ALL)}


def data() -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.9, 0.9, (N, DIMS)).astype(np.float32)


def density(score: Score, solver: Solver) -> sbml.Density:
    return sbml.Density(score, SDE, (DIMS,), eps=EPS, solver=solver)


@pytest.fixture(scope="module", params=SCORES)
def case(request: pytest.FixtureRequest) -> tuple[Score, np.ndarray]:
    """A score and the true log p of the data."""
    score = SCORES[request.param]
    with jax.enable_x64(True):
        exact = density(score, Solver(rtol=1e-9, atol=1e-9)).logp(data().astype(np.float64))
    assert np.isfinite(exact.values).all()
    return score, exact.values


def assert_honest(found: estimate.Estimate, truth: np.ndarray) -> None:
    """What is called converged is within the budget, and its error is the one that is printed."""
    assert found.solver_error is not None
    if found.converged:
        error = np.mean(found.values - truth)
        assert abs(error) <= found.budget
        assert abs(error - found.solver_error.mean) <= found.solver_error.ci95 + 0.1 * found.budget


def test_converged_is_right_for_every_tolerance(case: tuple[Score, np.ndarray]) -> None:
    score, truth = case
    verdicts = []
    for tolerance in TOLERANCES:
        found = density(score, Solver(rtol=tolerance, atol=tolerance)).logp(data())
        assert_honest(found, truth)
        verdicts.append(found.converged)
    assert not verdicts[0]  # At a tolerance of 1 no step is ever rejected.
    assert all(verdicts[TOLERANCES.index(1e-5) : TOLERANCES.index(1e-6) + 1])


@pytest.mark.slow
def test_converged_is_right_for_settings_that_hide_errors(case: tuple[Score, np.ndarray]) -> None:
    score, truth = case
    for fields in ({"first_step": 1.0}, {"power": 6.0}, {"method": "heun"}):
        for tolerance in (1e-1, 1e-2):
            solver = Solver(**{"rtol": tolerance, "atol": tolerance, **fields})
            assert_honest(density(score, solver).logp(data()), truth)


@pytest.mark.slow
def test_a_solver_that_ignores_its_tolerance_is_not_converged(
    case: tuple[Score, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes ten Euler steps at every tolerance. A comparison with the same solver at a tenth of
    the tolerance would therefore find an error of 0."""
    score, truth = case
    controlled = ode._integrate

    def integrate(*arguments: Any) -> object:
        rates, method, t0, t1, start, solver, *rest = arguments
        if solver.method == "heun":
            solver = dataclasses.replace(solver, method="euler", fixed_steps=10)
        return controlled(rates, method, t0, t1, start, solver, *rest)

    monkeypatch.setattr(ode, "_integrate", integrate)
    monkeypatch.setitem(ode.METHODS, "heun", ode.METHODS["euler"])
    for tolerance in (1e-1, 1e-5):
        # With another eps, nothing that was compiled without the patch is used again.
        found = dataclasses.replace(
            density(score, Solver("heun", rtol=tolerance, atol=tolerance)), eps=1.01 * EPS
        ).logp(data())
        assert abs(np.mean(found.values - truth)) > found.budget
        assert not found.converged


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_below_the_rounding_errors_are_refused(name: str) -> None:
    """With a relative tolerance of 1e-30, a solve would take 80,001 evaluations and end in NaN."""

    def solve(tolerance: float, dtype: type) -> Array:
        y = np.ones(2, dtype)
        return ode.solve(lambda t, y: -y, y, 0.1, 1.0, Solver(**{name: tolerance}))[0]

    with jax.enable_x64(False):
        assert np.all(np.isfinite(solve(1e-7, np.float32)))
        with pytest.raises(ValueError, match=f"{name}=5e-8: must be at least 1e-7 in float32"):
            solve(5e-8, np.float32)
        with pytest.raises(ValueError, match=rf"solver.{name}=5e-7: must be at least 1e-6 in fl"):
            density(gaussian, Solver(**{name: 5e-7})).logp(data())
    with jax.enable_x64(True):
        assert np.all(np.isfinite(solve(1e-12, np.float64)))
        with pytest.raises(ValueError, match=f"{name}=1e-17: must be at least 1e-16 in float64"):
            solve(1e-17, np.float64)


def test_the_reference_of_the_default_is_its_tenth() -> None:
    ours = Solver(rtol=2e-4, atol=2e-4)
    assert estimate.reference(ours) == ours.tighter(10)
    assert estimate.reference(Solver(rtol=1e-6, atol=0.1)) == Solver(rtol=1e-7, atol=2e-5)
    assert estimate.reference(Solver(fixed_steps=4)) == Solver(rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_message_for_an_example_far_outside_the_data_has_two_remedies() -> None:
    """Ten times as many steps also end in NaN there, so the message has another remedy."""
    x = data()
    x[3] = 1e4
    for most in (1_000, 10_000):
        solver = Solver(rtol=2e-4, atol=2e-4, max_steps=most)
        found = density(SCORES["gaussian"], solver).logp(x)
        assert np.flatnonzero(~np.isfinite(found.values)).tolist() == [3]
        said = found.unconverged()
        assert f"raise max_steps={most}, or leave out those that lie far outside the data" in said
