"""The ODE's likelihood, compared with exact ones of Gaussians and mixtures; and the ODE solver."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from families import FAMILIES

from sbml.audit import oracle
from sbml.core.types import Array, Key
from sbml.likelihood import Likelihood, ode, ode_logp
from sbml.likelihood.ode import Solver
from sbml.score import from_prediction
from sbml.score.divergence import Trace
from sbml.sdes import SDES

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
TIGHT = Solver(rtol=1e-8, atol=1e-8)
EXACT = Trace("exact")
SHAPE = (1, 3)


def data_of(kind: str, name: str = "vp") -> oracle.Mixture:
    """The mixture, or a Gaussian as a mixture of one component.

    All kinds of data have the same structure, so they share the compiled functions.
    """
    sde = SDES[name]()
    if kind == "mixture":
        return oracle.mixture(sde)
    return oracle.as_mixture(getattr(oracle, kind)(sde))


def examples() -> Array:
    """Five examples; the last one is an outlier, which needs many times smaller steps."""
    x = np.random.default_rng(0).normal(size=(5, *SHAPE)) * 0.5
    return jnp.asarray(x).at[4].multiply(5)


@functools.cache
def likelihood_function(name: str, trace: Trace, solver: Solver) -> Callable[..., Likelihood]:
    """The likelihood as a compiled function of data, example and key."""

    def call(data: oracle.Mixture, x: Array, key: Key | None) -> Likelihood:
        return ode_logp(data.score, SDES[name](), x, key, eps=EPS, trace=trace, solver=solver)

    exact = trace == EXACT
    return jax.jit(jax.vmap(call, (None, 0, None) if exact else (None, None, 0)))


@functools.cache
def likelihoods(
    kind: str, name: str = "vp", trace: Trace = EXACT, solver: Solver = TIGHT
) -> Likelihood:
    """The likelihoods of all examples; with random probes, those of the first one for 400 keys."""
    call, data = likelihood_function(name, trace, solver), data_of(kind, name)
    if trace == EXACT:
        return call(data, examples(), None)
    return call(data, examples()[0], jax.random.split(jax.random.key(0), 400))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_likelihood_is_exact_up_to_the_prior(name: str, kind: str) -> None:
    """If the true p_T is used instead of the prior, only the error of the solver remains.

    If the signal vanishes at T, p_T is the distribution of x at the largest time, scaled to T.
    """
    result, data, sde = likelihoods(kind, name), data_of(kind, name), SDES[name]()
    logp = jax.jit(jax.vmap(data.logp, (0, None)))
    last = jnp.asarray(sde.largest_time)
    stretch = sde.std(jnp.asarray(1.0)) / sde.std(last)
    end = logp(result.z / stretch, last) - 3 * jnp.log(stretch)
    error = result.divergence + result.correction + end - logp(examples(), EPS)
    np.testing.assert_allclose(error, 0, atol=1e-5)
    prior = scipy.stats.norm(0, SDES[name]().prior_std).logpdf(result.z).sum((1, 2))
    np.testing.assert_allclose(result.prior, prior, rtol=1e-10)
    total = result.prior + result.divergence + result.correction
    np.testing.assert_allclose(result.logp, total, rtol=1e-14, atol=1e-14)
    assert np.all(result.stats.success)


@pytest.mark.slow
@pytest.mark.oracle
def test_far_outliers_are_right_at_the_default_tolerance() -> None:
    """The paths of far outliers turn sharply between the components of a mixture. If the step
    control ignored the correction, the error at this tolerance would be 0.3 bits/dim, whether or
    not the correction is added to the log-likelihood."""
    x, data = 2.5 * jax.random.normal(jax.random.key(0), (200, *SHAPE)), data_of("mixture")
    result = likelihood_function("vp", EXACT, Solver())(data, x, None)
    logp = jax.jit(jax.vmap(data.logp, (0, None)))
    plain = result.divergence + logp(result.z, 1.0) - logp(x, EPS)
    error, uncorrected = (
        np.abs(nats) / (np.prod(SHAPE) * np.log(2)) for nats in (plain + result.correction, plain)
    )
    assert np.max(error) < 0.02
    assert np.quantile(error, 0.9) < 2e-3
    assert np.quantile(uncorrected, 0.9) > 2 * np.quantile(error, 0.9)


@pytest.mark.slow
@pytest.mark.oracle
def test_the_straight_path_in_two_dimensions_is_solved_best_in_t() -> None:
    """The velocity is smooth in t. In sqrt(t), the errors of the same tolerances are four times as
    large. A tenth of the tolerance shows the error of the solver."""
    mean, c = jnp.asarray([[1.5, -1.0], [-2.0, 0.5], [0.5, 2.0]]), jnp.asarray([0.01, 0.1, 1.0])
    x = jax.random.normal(jax.random.key(0), (60, 2)) * jnp.sqrt(jnp.tile(c, 20))[:, None]
    x += jnp.tile(mean, (20, 1))

    def parts(x: Array, t: Array | float) -> tuple[Array, Array, Array]:
        """The components' log densities, and their E[x_0 | x] and E[e | x]."""
        v, r = ((1 - t) ** 2 * c + t**2)[:, None], x[None] - (1 - t) * mean
        logp = -0.5 * jnp.sum(r**2 / v + jnp.log(2 * jnp.pi * v), 1) - jnp.log(3)
        return logp, mean + (1 - t) * c[:, None] * r / v, t * r / v

    def velocity(x: Array, t: Array) -> Array:
        logp, x_0, noise = parts(x, t)
        return jax.nn.softmax(logp) @ (noise - x_0)

    sde = SDES["rectified_flow"]()
    score = from_prediction(velocity, "flow", sde)

    @jax.jit
    def logp(tolerance: Array) -> Array:
        solver = Solver(rtol=tolerance, atol=tolerance, power=1.0)
        solve = functools.partial(ode_logp, score, sde, key=None, trace=EXACT, solver=solver)
        return jax.vmap(lambda x: solve(x, eps=EPS).logp)(x)

    exact = jax.vmap(lambda x: jax.nn.logsumexp(parts(x, EPS)[0]))(x)
    coarse, fine = logp(jnp.asarray(1e-3)), logp(jnp.asarray(1e-4))
    assert jnp.mean(jnp.abs(coarse - exact)) < 3e-3
    assert jnp.mean(jnp.abs(fine - exact)) < 6e-4
    estimate, error = (float(jnp.mean(jnp.abs(coarse - other))) for other in (fine, exact))
    assert estimate == pytest.approx(error, rel=0.3)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_latents_of_a_gaussian_have_a_closed_form(name: str) -> None:
    flow = jax.jit(jax.vmap(oracle.gaussian(SDES[name]()).flow, (0, None, None)))
    z, sde = likelihoods("gaussian", name).z, SDES[name]()
    assert z.shape == (5, *SHAPE)
    last = jnp.asarray(sde.largest_time)
    expected = sde.std(jnp.asarray(1.0)) / sde.std(last) * flow(examples(), EPS, last)
    np.testing.assert_allclose(z, expected, atol=1e-6 * SDES[name]().prior_std)


@pytest.mark.oracle
def test_a_rectified_flow_can_be_solved_to_time_zero_and_back() -> None:
    """For data N(0, 1/4), the flow maps noise z to x = z / 2."""
    sde, z = SDES["rectified_flow"](), jnp.asarray([0.3, -0.2])

    def score(x: Array, t: Array, key: Key | None) -> Array:
        return -x / (sde.mean_coef(t) ** 2 / 4 + sde.std(t) ** 2)

    x = ode.flow(score, sde, z, 1.0, 0.0, TIGHT).x
    np.testing.assert_allclose(x, z / 2, rtol=2e-6)
    half = ode.flow(score, sde, x, 0.0, 0.5, TIGHT).x
    np.testing.assert_allclose(half, z * np.sqrt(1 / 16 + 1 / 4), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.oracle
def test_another_adaptive_method_has_the_same_result() -> None:
    solver = Solver(method="heun", rtol=3e-7, atol=3e-7, max_steps=10_000)
    np.testing.assert_allclose(
        likelihoods("mixture", solver=solver).logp,
        likelihoods("mixture").logp,
        rtol=1e-6,
        atol=1e-4,
    )


def variance(std: float, t: Array) -> Array:
    """The variance of x_t, for data with the standard deviation ``std``."""
    sde = SDES["vp"]()
    return sde.mean_coef(t) ** 2 * std**2 + sde.std(t) ** 2


@functools.cache
def of_narrow_data(std: float, eps: float, first_step: float) -> Callable[[Array], Likelihood]:
    solver = Solver(rtol=1e-6, atol=1e-6, first_step=first_step)
    how = {"eps": eps, "trace": EXACT, "solver": solver}
    score = lambda x, t, key: -x / variance(std, t)  # noqa: E731
    return jax.jit(lambda x: ode_logp(score, SDES["vp"](), x, None, **how))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("width", "std", "eps", "first_step"),
    [
        (0.0, 0.05, EPS, 1e-3),
        (1e-3, 0.05, EPS, 1e-3),
        (1.0, 0.05, EPS, 1e-3),
        pytest.param(0.0, 0.05, EPS, 0.1, marks=pytest.mark.slow),
        pytest.param(0.0, 0.0, 1e-7, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_an_easy_path_does_not_hide_a_rough_divergence(
    width: float, std: float, eps: float, first_step: float
) -> None:
    """At the mode of a narrow Gaussian, x hardly moves, but the divergence changes fast. If the
    step control considered x only, its steps would be too long."""
    x = jnp.asarray([1.0, -1.0, 1.0, -1.0]) * width * 0.05
    result = of_narrow_data(std, eps, first_step)(x)
    first, last = (variance(std, jnp.asarray(t)) for t in (eps, 1.0))
    total = result.divergence + result.correction
    np.testing.assert_allclose(total, 2 * jnp.log(last / first), atol=2e-5)


@pytest.mark.slow
def test_tolerances_are_per_dimension() -> None:
    """Three hundred equal dimensions need as many steps as one dimension."""

    def steps(d: int) -> int:
        sde, x = SDES["vp"](), jnp.full((d,), 0.02)
        score = lambda x, t, key: -x / (sde.mean_coef(t) ** 2 * 1e-3 + sde.std(t) ** 2)  # noqa: E731
        solve = jax.jit(lambda x, v: ode_logp(score, sde, x, v, eps=EPS, solver=Solver()))
        return int(solve(x, jax.random.key(0)).stats.accepted)

    assert steps(300) == steps(1)


@pytest.mark.slow
@pytest.mark.oracle
def test_with_fixed_steps_the_likelihood_has_forward_derivatives_and_gradients() -> None:
    """The derivatives of log p with respect to x are compared with central differences. Those with
    adaptive steps have a test in ``test_distribution``."""
    data, x = data_of("mixture"), examples()[0]
    v = jnp.asarray(np.random.default_rng(3).normal(size=SHAPE))

    def logp(x: Array, solver: Solver) -> Array:
        sde = SDES["vp"]()
        return ode_logp(data.score, sde, x, None, eps=EPS, trace=EXACT, solver=solver).logp

    @functools.partial(jax.jit, static_argnums=1)
    def along_v(x: Array, solver: Solver) -> tuple[Array, Array]:
        return jax.jvp(lambda x: logp(x, solver), (x,), (v,))

    fixed = Solver(fixed_steps=60)
    h = 1e-4
    difference = (along_v(x + h * v, fixed)[0] - along_v(x - h * v, fixed)[0]) / (2 * h)
    np.testing.assert_allclose(along_v(x, fixed)[1], difference, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: logp(x, fixed)))(x)
    np.testing.assert_allclose(jnp.sum(gradient * v), difference, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.oracle
def test_default_tolerances_trade_a_little_exactness_for_speed() -> None:
    tight, loose = likelihoods("mixture"), likelihoods("mixture", solver=Solver())
    error = np.abs(loose.logp - tight.logp)[:4]
    assert 1e-7 < error.max() < 5e-3
    assert np.all(loose.stats.nfe < 0.5 * tight.stats.nfe)


@pytest.mark.slow
@pytest.mark.oracle
def test_hutchinson_is_unbiased() -> None:
    """Rademacher's probes are in the audit of this package, ``--mode=verify``."""
    logp = likelihoods("mixture", trace=Trace("gaussian")).logp
    error = np.std(logp) / np.sqrt(len(logp))
    assert error > 1e-3
    assert abs(np.mean(logp) - likelihoods("mixture").logp[0]) < 3 * error


@pytest.mark.slow
@pytest.mark.oracle
def test_rademacher_probes_are_exact_for_a_diagonal_covariance() -> None:
    exact = likelihoods("diagonal").logp[0]
    np.testing.assert_allclose(
        likelihoods("diagonal", trace=Trace("rademacher", 2)).logp, exact, atol=1e-5
    )
    assert np.std(likelihoods("diagonal", trace=Trace("gaussian")).logp) > 0.1


@pytest.mark.slow
def test_results_do_not_depend_on_batch_mates() -> None:
    """The last example needs more steps. If the batch shared one step control, the results of the
    other examples would change. The tolerances are loose, so that this change would be visible."""
    together, data = likelihoods("mixture", solver=Solver()), data_of("mixture")
    alone = jax.jit(lambda x: ode_logp(data.score, SDES["vp"](), x, None, eps=EPS, trace=EXACT))
    for i, x in enumerate(examples()):
        single = alone(x)
        np.testing.assert_allclose(together.logp[i], single.logp, rtol=1e-6)
        np.testing.assert_allclose(together.z[i], single.z, rtol=1e-6)
        for in_batch, alone_stat in zip(together.stats, single.stats, strict=True):
            assert in_batch[i] == alone_stat
    assert together.stats.nfe[4] > 1.5 * together.stats.nfe[:4].max()


@pytest.mark.slow
def test_a_solver_that_gives_up_returns_nan_for_that_example_only() -> None:
    """One example needs too many steps. Another one is NaN, so it cannot be solved at all."""
    x = examples().at[3].set(jnp.nan)
    result = likelihood_function("vp", EXACT, Solver(max_steps=20))(data_of("mixture"), x, None)
    np.testing.assert_array_equal(result.stats.success, [True, True, True, False, False])
    for leaf in (result.logp, result.prior, result.divergence, result.z):
        assert np.all(np.isfinite(leaf[:3])) and np.all(np.isnan(leaf[3:]))
    # If x is NaN, the error of every step is NaN, so the solver stops after the first one.
    np.testing.assert_array_equal((result.stats.accepted + result.stats.rejected)[3:], [1, 20])


def in_float32(x: Array) -> Likelihood:
    with jax.enable_x64(False):
        data, x = jax.tree.map(lambda a: jnp.asarray(np.float32(a)), (data_of("mixture"), x))
        return likelihood_function("vp", EXACT, Solver(rtol=1e-5, atol=1e-5))(data, x, None)


@pytest.mark.slow
def test_float32_reaches_its_precision() -> None:
    result = in_float32(examples())
    assert result.logp.dtype == result.z.dtype == jnp.float32
    np.testing.assert_allclose(result.logp[0], likelihoods("mixture").logp[0], atol=1e-3)


@pytest.mark.slow
def test_an_example_far_outside_the_data_is_given_up_early() -> None:
    """In float32, the rounding error of such a large x looks like an error of the step. It does not
    become smaller with shorter steps."""
    x = examples()
    result = in_float32(x.at[3].set(1e4).at[4].set(1e19))
    np.testing.assert_array_equal(result.stats.success, [True, True, True, False, False])
    assert result.stats.nfe[3] <= 8_001 and result.stats.nfe[4] < 400
    np.testing.assert_array_equal(result.logp[:3], in_float32(x).logp[:3])


# The ODE solver.


def test_velocity_by_hand() -> None:
    """The SDE ``linear_ve`` has f = 0 and g^2 = 500 at t = 0.1."""
    x = jnp.asarray([1.0, -2.0])
    v = ode.velocity(lambda x, t, key: 3 * x, SDES["linear_ve"](), x, jnp.asarray(0.1))
    np.testing.assert_allclose(v, -250 * 3 * x, rtol=1e-13)


def growth(t: Array, y: Array) -> Array:
    """dy/dt = 3 cos(3 t) y, whose solution with y(0) = 1 is y = exp(sin 3t)."""
    return 3 * jnp.cos(3 * t) * y


@pytest.mark.oracle
@pytest.mark.parametrize(("power", "t0", "t1"), [(1.0, EPS, 1.0), (3.0, EPS, 1.0), (2.0, 1.0, EPS)])
def test_the_solution_depends_on_neither_the_coordinate_nor_the_direction_of_the_steps(
    power: float, t0: float, t1: float
) -> None:
    solver = Solver(rtol=1e-9, atol=1e-9, power=power)
    end, stats = jax.jit(lambda y: ode.solve(growth, y, t0, t1, solver))(jnp.ones(2))
    np.testing.assert_allclose(end, np.exp(np.sin(3 * t1) - np.sin(3 * t0)), rtol=1e-7)
    assert stats.success


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize(
    ("method", "order", "steps"),
    [("euler", 1, 200), ("heun", 2, 100), ("dopri5", 5, 20), ("tsit5", 5, 20)],
)
def test_fixed_steps_converge_at_the_order_of_the_method(
    method: str, order: int, steps: int
) -> None:
    def error(steps: int) -> float:
        solver = Solver(method=method, fixed_steps=steps, power=1.0)
        end, stats = jax.jit(lambda y: ode.solve(growth, y, EPS, 1.0, solver))(jnp.ones(()))
        assert stats.accepted == steps and stats.success
        return abs(float(end) - np.exp(np.sin(3) - np.sin(3 * EPS)))

    assert np.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.3)


def test_a_nan_velocity_gives_a_nan_solution() -> None:
    end, _ = ode.solve(lambda t, y: y * jnp.nan, jnp.ones(2), EPS, 1.0, Solver(fixed_steps=3))
    assert np.all(np.isnan(end))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fixed_steps"),
    [("euler", 18), ("tsit5", 18), ("heun", None), ("dopri5", None), ("tsit5", None)],
)
def test_evaluations_of_the_field_are_counted(method: str, fixed_steps: int | None) -> None:
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


def test_evaluations_of_the_score_are_counted() -> None:
    """All directions of the trace share one evaluation of the score."""
    calls: list[int] = []

    def score(x: Array, t: Array, key: Key | None) -> Array:
        jax.debug.callback(lambda: calls.append(1))
        return -x / (1 + t)

    result = jax.jit(lambda x: ode_logp(score, SDES["vp"](), x, None, eps=EPS, trace=EXACT))(
        examples()[0]
    )
    jax.effects_barrier()
    assert result.stats.nfe == len(calls)
