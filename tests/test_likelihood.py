"""The ODE likelihood of Gaussians and mixtures against the truth, and the solver beneath it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats

from sbml import ode
from sbml.likelihood import Likelihood, Trace, ode_logp
from sbml.ode import Solver
from sbml.sdes import SDES
from sbml.types import Array, Key

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
TIGHT = Solver(rtol=1e-8, atol=1e-8)
EXACT = Trace("exact")
SHAPE = (1, 3)


def data_of(kind: str, name: str = "vp") -> oracle.Gaussian | oracle.Mixture:
    """A Gaussian, a mixture, or a Gaussian of diagonal covariance."""
    sde = SDES[name]()
    if kind == "diagonal":
        return oracle.Gaussian(sde, np.array([0.1, -0.2, 0.0]), np.diag([0.05, 0.3, 1.0]))
    return {"gaussian": oracle.gaussian, "mixture": oracle.mixture}[kind](sde)


def examples(n: int = 5) -> Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, *SHAPE)) * 0.5)


@functools.cache
def solved(kind: str, name: str, trace: Trace = EXACT, solver: Solver = TIGHT) -> Likelihood:
    """``examples()``, or without an exact trace one of them under many keys; solved once."""
    data = data_of(kind, name)

    def one(x: Array, key: Key) -> Likelihood:
        return ode_logp(data.score, SDES[name](), x, key, eps=EPS, trace=trace, solver=solver)

    if trace == EXACT:
        return jax.jit(jax.vmap(lambda x: one(x, None)))(examples())
    keys = jax.random.split(jax.random.key(0), 400)
    return jax.jit(jax.vmap(one, (None, 0)))(examples()[0], keys)


def test_the_oracle_agrees_with_scipy_and_with_its_own_gradient() -> None:
    x = examples()[0]
    for name in SDES:
        for kind in ("gaussian", "mixture"):
            data = data_of(kind, name)
            for t in (EPS, 0.1, 1.0):
                gradient = jax.grad(data.logp)(x, jnp.asarray(t))
                np.testing.assert_allclose(data.score(x, jnp.asarray(t)), gradient, rtol=1e-8)
    sde, t = SDES["vp"](), jnp.asarray(0.1)
    data = oracle.mixture(sde)
    alpha, sigma = float(sde.mean_coef(t)), float(sde.std(t))
    density = sum(
        weight
        * scipy.stats.multivariate_normal.pdf(
            np.ravel(x), alpha * part.mean, alpha**2 * part.cov + sigma**2 * np.eye(3)
        )
        for weight, part in zip(data.weights, data.parts, strict=True)
    )
    np.testing.assert_allclose(data.logp(x, t), np.log(density), rtol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", SDES)
def test_log_likelihood_is_the_truth(name: str, kind: str) -> None:
    """The prior stands for p_T; with the true p_T in its place nothing but solver error is left."""
    result, data = solved(kind, name), data_of(kind, name)
    truth = jax.vmap(lambda x: data.logp(x, jnp.asarray(EPS)))(examples())
    end = jax.vmap(lambda z: data.logp(z, jnp.asarray(1.0)))(result.z)
    np.testing.assert_allclose(result.divergence + end, truth, atol=1e-5)
    prior = scipy.stats.norm(0, SDES[name]().prior_std).logpdf(result.z).sum((1, 2))
    np.testing.assert_allclose(result.prior, prior, rtol=1e-10)
    np.testing.assert_allclose(result.logp, result.prior + result.divergence, rtol=1e-14)
    assert np.all(result.stats.success)


@pytest.mark.oracle
@pytest.mark.parametrize("name", SDES)
def test_latents_of_a_gaussian_are_closed_form(name: str) -> None:
    result, data = solved("gaussian", name), data_of("gaussian", name)
    flow = jax.vmap(lambda x: data.flow(x, jnp.asarray(EPS), jnp.asarray(1.0)))(examples())
    assert result.z.shape == (5, *SHAPE)
    np.testing.assert_allclose(result.z, flow, atol=1e-6 * SDES[name]().prior_std)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["tsit5", "heun"])
def test_every_adaptive_method_finds_the_truth(method: str) -> None:
    solver = Solver(method=method, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        solved("mixture", "vp", solver=solver).logp, solved("mixture", "vp").logp, atol=1e-4
    )


@pytest.mark.oracle
def test_looser_tolerances_are_less_exact() -> None:
    tight, loose = solved("mixture", "vp"), solved("mixture", "vp", solver=Solver())
    error = np.abs(loose.logp - tight.logp)
    assert 1e-7 < error.max() < 5e-3
    assert np.all(loose.stats.nfe < tight.stats.nfe)


@pytest.mark.oracle
@pytest.mark.parametrize("trace", [Trace("rademacher"), Trace("gaussian"), Trace("rademacher", 4)])
def test_hutchinson_is_unbiased(trace: Trace) -> None:
    logp = solved("mixture", "vp", trace).logp
    exact = solved("mixture", "vp").logp[0]
    error = np.std(logp) / np.sqrt(len(logp))
    assert error > 1e-3
    assert abs(np.mean(logp) - exact) < 3 * error


@pytest.mark.oracle
def test_probes_reduce_the_variance() -> None:
    """Four probes: a quarter. A Gaussian probe: more than a Rademacher one."""
    one, four = (np.var(solved("mixture", "vp", Trace("rademacher", k)).logp) for k in (1, 4))
    np.testing.assert_allclose(four, one / 4, rtol=0.3)
    assert np.var(solved("mixture", "vp", Trace("gaussian")).logp) > 1.5 * one


@pytest.mark.oracle
def test_a_rademacher_probe_is_exact_for_a_diagonal_covariance() -> None:
    exact = solved("diagonal", "vp").logp[0]
    np.testing.assert_allclose(solved("diagonal", "vp", Trace()).logp, exact, atol=1e-5)
    assert np.std(solved("diagonal", "vp", Trace("gaussian")).logp) > 0.1


def test_results_do_not_depend_on_batch_mates() -> None:
    """Loose steps would show a shared step control; the last example is a hundred times stiffer."""
    data, sde = data_of("mixture"), SDES["vp"]()
    x = examples(3).at[2].multiply(1e4)
    keys = jax.random.split(jax.random.key(1), 3)

    def one(x: Array, key: Key) -> Likelihood:
        return ode_logp(data.score, sde, x, key, eps=EPS)

    together, alone = jax.jit(jax.vmap(one))(x, keys), jax.jit(one)
    for i in range(3):
        single = alone(x[i], keys[i])
        np.testing.assert_allclose(together.logp[i], single.logp, rtol=1e-9)
        np.testing.assert_allclose(together.z[i], single.z, rtol=1e-9)
        for mine, its in zip(together.stats, single.stats, strict=True):
            assert mine[i] == its
    assert together.stats.nfe[2] > 1.5 * together.stats.nfe[0]


def test_giving_up_is_nan_and_spares_the_others() -> None:
    data, sde = data_of("mixture"), SDES["vp"]()
    x = examples(2).at[1].multiply(1e4)
    solver = Solver(max_steps=22)
    result = jax.jit(
        jax.vmap(
            lambda x: ode_logp(data.score, sde, x, None, eps=EPS, trace=EXACT, solver=solver)
        )
    )(x)
    np.testing.assert_array_equal(result.stats.success, [True, False])
    for leaf in (result.logp, result.prior, result.divergence, result.z):
        assert np.all(np.isfinite(leaf[0])) and np.all(np.isnan(leaf[1]))
    assert result.stats.accepted[1] + result.stats.rejected[1] == 22


def test_a_score_that_is_nan_is_not_hidden() -> None:
    def broken(x: Array, t: Array, key: Key | None) -> Array:
        return jnp.full_like(x, jnp.nan)

    solver = Solver(max_steps=50)
    x = examples()[0]
    for s in (solver, Solver(fixed_steps=3)):
        result = ode_logp(broken, SDES["vp"](), x, None, eps=EPS, trace=EXACT, solver=s)
        assert np.isnan(result.logp) and np.all(np.isnan(result.z))


def test_float32_reaches_its_precision() -> None:
    with jax.enable_x64(False):
        data, x = data_of("mixture"), np.asarray(examples()[0], np.float32)
        solver = Solver(rtol=1e-5, atol=1e-5)
        result = jax.jit(
            lambda x: ode_logp(
                data.score, SDES["vp"](), x, None, eps=EPS, trace=EXACT, solver=solver
            )
        )(x)
    assert result.logp.dtype == result.z.dtype == jnp.float32
    np.testing.assert_allclose(result.logp, solved("mixture", "vp").logp[0], atol=1e-3)


# The solver beneath.

Field = Callable[[Array, Array], Array]


def _flow_field(name: str) -> tuple[oracle.Gaussian, Field]:
    data, sde = oracle.gaussian(SDES[name]()), SDES[name]()
    return data, lambda t, x: ode.velocity(data.score, sde, x, t)


def test_velocity_by_hand() -> None:
    """Linear VE at t = 0.1 has f = 0 and g^2 = 500."""
    x = jnp.asarray([1.0, -2.0])
    v = ode.velocity(lambda x, t, key: 3 * x, SDES["linear_ve"](), x, jnp.asarray(0.1))
    np.testing.assert_allclose(v, -250 * 3 * x, rtol=1e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("ends", [(EPS, 1.0), (1.0, EPS)])
def test_every_coordinate_and_direction_solves_the_same_flow(
    power: float, ends: tuple[float, float]
) -> None:
    data, field = _flow_field("subvp")
    solver, x = Solver(rtol=1e-9, atol=1e-9, power=power), examples()[0]
    end, stats = jax.jit(lambda x: ode.solve(field, x, *ends, solver))(x)
    np.testing.assert_allclose(end, data.flow(x, *map(jnp.asarray, ends)), atol=1e-6)
    assert stats.success


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("method", "order", "steps"), [("euler", 1, 200), ("heun", 2, 100), ("dopri5", 5, 20), ("tsit5", 5, 20)]
)
def test_fixed_steps_converge_at_the_order_of_the_method(
    method: str, order: int, steps: int
) -> None:
    data, field = _flow_field("ve")
    x = examples()[0]
    truth = data.flow(x, jnp.asarray(EPS), jnp.asarray(1.0))

    def error(steps: int) -> float:
        solver = Solver(method=method, fixed_steps=steps, power=1.0)
        end, stats = jax.jit(lambda x: ode.solve(field, x, EPS, 1.0, solver))(x)
        assert stats.accepted == steps and stats.success
        return float(jnp.max(jnp.abs(end - truth)))

    assert np.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("method", ode.METHODS)
@pytest.mark.parametrize("fixed_steps", [None, 18])
def test_evaluations_are_counted_honestly(method: str, fixed_steps: int | None) -> None:
    if method == "euler" and fixed_steps is None:
        pytest.skip("euler has no step control")
    calls: list[int] = []

    def field(t: Array, y: Array) -> Array:
        jax.debug.callback(lambda: calls.append(1))
        return -y * (1 + 30 * jnp.exp(-(((t - 0.5) / 0.02) ** 2)))

    solver = Solver(method=method, fixed_steps=fixed_steps, rtol=1e-6, atol=1e-6)
    _, stats = jax.jit(lambda y: ode.solve(field, y, EPS, 1.0, solver))(jnp.ones(3))
    jax.effects_barrier()
    assert stats.nfe == len(calls)
    assert (stats.rejected > 0) == (fixed_steps is None)
    assert fixed_steps is None or stats.accepted == fixed_steps


def test_a_likelihood_calls_the_score_as_often_as_it_says() -> None:
    """All directions of the trace share one evaluation of the score."""
    data, calls = data_of("gaussian"), []

    def score(x: Array, t: Array, key: Key | None) -> Array:
        jax.debug.callback(lambda: calls.append(1))
        return data.score(x, t)

    for trace in (EXACT, Trace("rademacher", 2)):
        calls.clear()
        key = jax.random.key(0)
        call = jax.jit(
            lambda x, key=key, trace=trace: ode_logp(
                score, SDES["vp"](), x, key, eps=EPS, trace=trace
            )
        )
        stats = call(examples()[0]).stats
        jax.effects_barrier()
        assert stats.nfe == len(calls)


def test_the_log_determinant_weighs_as_much_as_the_image() -> None:
    assert ode.rms_norm((jnp.full((8, 8, 3), 3.0), jnp.asarray(4.0))) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rk45"}, "unknown ODE method 'rk45'"),
        ({"method": "euler"}, "euler has no error estimate"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"atol": -1.0}, "atol=-1.0"),
        ({"power": 0.0}, "power=0.0"),
        ({"first_step": float("nan")}, "first_step=nan"),
        ({"fixed_steps": 0}, "fixed_steps=0"),
        ({"fixed_steps": -2}, "fixed_steps=-2"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_impossible_solvers_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**arguments)  # type: ignore[arg-type]


def test_impossible_traces_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown trace 'sobol'"):
        Trace("sobol")
    with pytest.raises(ValueError, match="0 probes"):
        Trace("gaussian", 0)


@pytest.mark.parametrize("eps", [0.0, -1.0, 1.0, float("nan")])
def test_impossible_smallest_times_are_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="smallest time eps="):
        ode_logp(data_of("gaussian").score, SDES["vp"](), examples()[0], None, eps=eps, trace=EXACT)


def test_probes_need_a_key() -> None:
    with pytest.raises(ValueError, match="pass a key, or use kind='exact'"):
        ode_logp(data_of("gaussian").score, SDES["vp"](), examples()[0], None, eps=EPS)


def test_integers_are_refused() -> None:
    x = jnp.zeros(SHAPE, jnp.uint8)
    with pytest.raises(ValueError, match="uint8"):
        ode_logp(data_of("gaussian").score, SDES["vp"](), x, None, eps=EPS, trace=EXACT)
