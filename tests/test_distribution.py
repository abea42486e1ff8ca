"""``Density`` as a distribution: log p, samples and gradients under JAX's transformations."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import sbml
from sbml.core.types import Array, conditioned
from sbml.density.posterior import Importance, Posterior
from sbml.likelihood import bound
from sbml.likelihood.bound import GaussianControl
from sbml.likelihood.ode import Solver
from sbml.score import NetworkScore, from_prediction
from sbml.score.divergence import Trace
from sbml.sdes import VP, RectifiedFlow

pytestmark = pytest.mark.usefixtures("x64")

SDE = RectifiedFlow()  # Its prior is exact, so log p has the solver's error only.
VARIANCES = np.array([0.5, 0.2, 0.1])
STRICT = Solver(rtol=1e-9, atol=1e-9, adjoint="reverse")
STEPS = Solver(fixed_steps=12, adjoint="reverse")  # smooth in all its arguments
EPS = 1e-3


def velocity(params: dict[str, Array], x: Array, t: Array, mean: Array) -> Array:
    """E[z - x_0 | x_t] for x_0 ~ N(mean, diag(v))."""
    v = (1 - t) ** 2 * params["v"] + t**2
    return (t - (1 - t) * params["v"]) / v * (x - (1 - t) * mean) - mean


PARAMS = {"v": VARIANCES, "mean": np.array([0.3, -0.2, 0.1])}


def score(params: dict[str, Array] = PARAMS) -> NetworkScore:
    def network(params: dict[str, Array], x: Array, t: Array) -> Array:
        return velocity(params, x, t, params["mean"])

    return from_prediction(jax.tree_util.Partial(network, params), "flow", SDE)


def conditional() -> NetworkScore:
    """A Gaussian whose mean is the condition, in every dimension."""
    return from_prediction(lambda x, t, c: velocity(PARAMS, x, t, c * jnp.ones(3)), "flow", SDE)


def density(solver: Solver = STRICT, **options) -> sbml.Density:
    return sbml.Density(score(), SDE, (3,), **{"eps": EPS, "solver": solver, **options})


def exact(x: Array, mean: Array = PARAMS["mean"]) -> Array:
    """log p_eps(x) of the Gaussian."""
    std = jnp.sqrt((1 - EPS) ** 2 * VARIANCES + EPS**2)
    x, mean, std = jnp.broadcast_arrays(jnp.asarray(x), mean, std)
    return jax.scipy.stats.norm.logpdf(x, (1 - EPS) * mean, std).sum(axis=-1)


X = np.random.default_rng(0).normal(size=(4, 3))


def difference(f, x: Array, h: float = 1e-5) -> Array:
    """The gradient of ``f`` at ``x`` by central differences."""
    flat = x.ravel()

    def one(i: int) -> Array:
        step = h * jnp.eye(flat.size)[i]
        return (f((flat + step).reshape(x.shape)) - f((flat - step).reshape(x.shape))) / (2 * h)

    return jnp.stack([one(i) for i in range(flat.size)]).reshape(x.shape)


@pytest.mark.usefixtures("unchecked")
def test_log_p_and_its_gradient_are_those_of_the_closed_form() -> None:
    d = density()

    def total(logp: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
        values = logp(x)
        return values.sum(), values

    both = jax.jit(jax.grad(total, argnums=1, has_aux=True), static_argnums=0)
    (found, values), (expected, truth) = both(d.log_prob, X), both(exact, X)
    np.testing.assert_allclose(values, truth, atol=1e-7)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_log_p_is_the_same_in_jit_vmap_and_scan() -> None:
    d = density()
    np.testing.assert_allclose(d.log_prob(X[0]), exact(X[0]), atol=1e-7)
    nested = jax.jit(lambda d, x: d.log_prob(x))(d, X.reshape(2, 2, 3))
    np.testing.assert_allclose(nested, exact(X).reshape(2, 2), atol=1e-7)
    np.testing.assert_allclose(jax.vmap(d.log_prob)(X), exact(X), atol=1e-7)
    _, scanned = jax.lax.scan(lambda _, x: (None, d.log_prob(x)), None, X)
    np.testing.assert_allclose(scanned, exact(X), atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_gradients_are_finite_differences() -> None:
    """With respect to x, of probes, and to the weights and the condition, of exact traces."""
    d, key = density(STEPS, trace=Trace("rademacher")), jax.random.key(3)

    @jax.jit
    def of_x(x: Array) -> Array:
        return d.log_prob(x, key)

    np.testing.assert_allclose(jax.grad(of_x)(X[0]), difference(of_x, X[0]), atol=1e-6)

    # A density is a pytree of the arrays in its score.
    def network(v: Array, x: Array, t: Array, c: Array) -> Array:
        return velocity({"v": v}, x, t, c * jnp.ones(3))

    given = from_prediction(jax.tree_util.Partial(network, VARIANCES), "flow", SDE)
    d = sbml.Density(given, SDE, (3,), eps=EPS, solver=STEPS)
    leaves, tree = jax.tree.flatten(d)
    [at] = [i for i, leaf in enumerate(leaves) if np.array_equal(leaf, VARIANCES)]

    @jax.jit
    def of_both(d: sbml.Density, c: Array) -> Array:
        return d.log_prob(X[0], condition=c)

    def of_weights(v: Array) -> Array:
        return of_both(jax.tree.unflatten(tree, [*leaves[:at], v, *leaves[at + 1 :]]), c)

    c = jnp.asarray(0.4)
    of_leaves, of_condition = jax.grad(of_both, (0, 1))(d, c)
    found = jax.tree.leaves(of_leaves)[at]
    np.testing.assert_allclose(found, difference(of_weights, VARIANCES), atol=1e-6)
    expected = difference(lambda c: of_both(d, c), c)
    np.testing.assert_allclose(of_condition, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_density_is_a_pytree_for_other_objects_too() -> None:
    """JAX and Equinox put None, booleans and other objects in the place of its arrays."""
    d = density(STEPS)
    marked = jax.tree.map(lambda leaf: True, d)
    assert jax.tree.structure(marked) == jax.tree.structure(d)
    assert jax.tree.leaves(marked) == [True, True]
    again = eqx.combine(*eqx.partition(d, eqx.is_array))
    np.testing.assert_array_equal(again.log_prob(X), d.log_prob(X))
    gradient = eqx.filter_grad(lambda d: d.log_prob(X).mean())(d)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert len(repr(d.logp(X))) < 400 and "\n" not in repr(d)


@pytest.mark.usefixtures("unchecked")
def test_lost_samples_of_integers_are_refused_inside_jit_too() -> None:
    """They would pass for black images."""
    d = density(Solver(max_steps=2), levels=8)
    with pytest.raises(Exception, match="3 of 3 samples are not finite"):
        jax.block_until_ready(jax.jit(lambda key: d.sample(key, 3))(jax.random.key(0)))
        jax.effects_barrier()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_memory_of_a_gradient_grows_much_less_than_the_steps() -> None:
    def memory(steps: int) -> int:
        solver = Solver(fixed_steps=steps, adjoint="reverse")
        d = sbml.Density(lambda x, t, key: -x, VP(), (64,), solver=solver)
        compiled = jax.jit(jax.grad(d.log_prob)).lower(jnp.zeros(64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(1024) < 6 * memory(16)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_forward_solver_says_how_to_get_gradients() -> None:
    with pytest.raises(Exception, match='adjoint="reverse"'):
        jax.grad(density(Solver()).log_prob)(X[0])
    tangent = jax.jvp(density(Solver()).log_prob, (X[0],), (np.ones(3),))[1]
    assert float(tangent) == pytest.approx(float(jax.grad(exact)(X[0]).sum()), abs=1e-2)


@pytest.mark.usefixtures("unchecked")
def test_samples_and_their_log_p_by_one_solve() -> None:
    """They have the Gaussian's density."""
    d, key = density(), jax.random.key(0)
    x, logp = d.sample_and_log_prob(key, 5)
    np.testing.assert_allclose(logp, exact(x), atol=1e-7)
    np.testing.assert_allclose(x, d.sample(key, 5), atol=1e-7)
    np.testing.assert_allclose(logp, d.log_prob(x), atol=1e-7)
    # Few steps leave an error of 8e-4, or of 1e-2 if their correction is subtracted.
    x, logp = density(Solver(rtol=1.0, atol=1.0, adjoint="reverse")).sample_and_log_prob(key, 5)
    np.testing.assert_allclose(logp, exact(x), atol=3e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_samples_have_the_distribution_and_probes_the_mean_of_a_gaussian() -> None:
    many = density(Solver(adjoint="reverse")).sample(jax.random.key(1), 2000)
    spread = (np.asarray(many) - (1 - EPS) * PARAMS["mean"]) / np.sqrt(
        (1 - EPS) ** 2 * VARIANCES + EPS**2
    )
    assert stats.kstest(spread.ravel(), "norm").pvalue > 1e-3
    probes = density(STEPS, trace=Trace("gaussian"))
    same = jnp.broadcast_to(X[0], (4000, 3))
    noisy = probes.log_prob(same, jax.random.key(2))
    mean, stderr = noisy.mean(), noisy.std() / np.sqrt(4000)
    assert stderr > 1e-3
    assert abs(mean - density(STEPS).log_prob(X[0])) < 4 * stderr


@pytest.mark.usefixtures("unchecked")
def test_a_condition_is_for_all_examples_or_for_each() -> None:
    d = sbml.Density(conditional(), SDE, (3,), eps=EPS, solver=STRICT)
    one, each = 0.3, np.array([0.3, -0.1, 0.0, 2.0])
    means = each[:, None] * np.ones(3)
    np.testing.assert_allclose(d.log_prob(X, condition=one), exact(X, means[0]), atol=1e-7)
    np.testing.assert_allclose(d.log_prob(X, condition=each), exact(X, means), atol=1e-7)
    x, logp = d.sample_and_log_prob(jax.random.key(0), 4, each)
    np.testing.assert_allclose(logp, exact(x, means), atol=1e-7)
    plain = conditioned(lambda x, t, key, c: c - x, jnp.asarray(2.0))
    assert plain(jnp.asarray(0.5), jnp.asarray(0.1), None) == 1.5


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_condition_reaches_every_method_and_may_be_a_tree() -> None:
    d = sbml.Density(conditional(), SDE, (3,), eps=EPS, solver=STRICT)
    each = np.array([0.3, -0.1, 0.0, 2.0])
    means = each[:, None] * np.ones(3)
    np.testing.assert_allclose(d.log_prob(X, condition=each.tolist()), exact(X, means), atol=1e-7)
    np.testing.assert_allclose(d.logp(X, each).values, exact(X, means), atol=1e-7)
    np.testing.assert_allclose(d.decode(d.latent(X, each), each), X, atol=1e-6)
    found = d.bound(X, each)
    assert abs(found.mean + float(exact(X, means).mean())) < 4 * found.this_set.stderr

    def pair(x: Array, t: Array, key: None, condition: dict[str, Array]) -> Array:
        mean = condition["a"].sum() + condition["b"].sum()
        v = (1 - t) ** 2 * VARIANCES + t**2
        return -(x - (1 - t) * mean) / v

    shapes = {"a": (2,), "b": (2,)}
    trees = sbml.Density(pair, SDE, (3,), eps=EPS, solver=STRICT, condition_shape=shapes)
    assert jax.tree.unflatten(jax.tree.structure(trees), []).condition_shape == shapes
    condition = {"a": jnp.array([0.1, 0.1]), "b": jnp.tile(jnp.array([0.05, 0.05]), (4, 1))}
    found = trees.log_prob(X, condition=condition)
    # The ODE of a plain score ends where 0.1% of the signal is left.
    np.testing.assert_allclose(found, exact(X, means[:1]), atol=1e-2)


@pytest.mark.usefixtures("unchecked")
def test_the_posterior_of_a_condition_is_that_of_bayes() -> None:
    d = sbml.Density(conditional(), SDE, (3,), eps=EPS, solver=Solver(rtol=1e-5, atol=1e-5))
    conditions, prior = jnp.array([-0.3, 0.0, 0.4]), np.array([0.5, 0.3, 0.2])
    rng = np.random.default_rng(1)
    labels = rng.choice(3, size=300, p=prior)
    x = np.asarray(conditions)[labels][:, None] + rng.normal(size=(300, 3)) * np.sqrt(VARIANCES)
    found = d.classify(x, conditions, prior)
    logp = np.stack([exact(x, c * jnp.ones(3)) for c in conditions], axis=1)
    np.testing.assert_allclose(found.log_prob, logp, atol=1e-3)
    weights = prior * np.exp(logp)
    np.testing.assert_allclose(
        found.probabilities, weights / weights.sum(axis=1, keepdims=True), atol=1e-3
    )
    # An exact posterior is calibrated, and its accuracy is what it expects of itself.
    confidence = found.probabilities.max(axis=1).mean()
    assert abs(found.accuracy(labels).mean - confidence) < found.accuracy(labels).ci95
    assert found.calibration_error(labels) < 0.12
    assert found.log_score(labels).mean < stats.entropy(prior)
    assert found.solver_error.mean < 1e-3 and found.noise.mean == 0 and found.changed < 0.05
    with pytest.raises(ValueError, match="the score ignores its condition"):
        sbml.Density(lambda x, t, key, c: -x, VP(), (3,)).classify(x[:4], conditions)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_posterior_of_classes_and_of_integers() -> None:
    d = sbml.Density(conditional(), SDE, (3,), eps=EPS, solver=Solver(rtol=1e-5, atol=1e-5))
    conditions, x = jnp.array([-0.3, 0.0, 0.4]), np.random.default_rng(1).normal(size=(20, 3)) / 2
    # The conditions of a model with classes are the numbers of all classes.
    of_classes = dataclasses.replace(d, classes=("a", "b", "c")).classify(x[:8])
    np.testing.assert_array_equal(of_classes.log_prob, d.classify(x[:8], np.arange(3)).log_prob)
    with pytest.raises(ValueError, match="this density has no classes"):
        d.classify(x[:8])
    # With probes and integers, all classes have the same draws: the noise of differences is small.
    k = np.clip((x + 1) / 2 * 16, 0, 15).astype(int)
    noisy = sbml.Density(conditional(), SDE, (3,), eps=EPS, levels=16).classify(k, conditions)
    assert noisy.noise.mean < 0.2 and noisy.log_prob.shape == (20, 3)


@pytest.mark.usefixtures("unchecked")
def test_of_no_examples_there_is_no_log_p() -> None:
    d = sbml.Density(lambda x, t, key, c: c - x, VP(), (3,), solver=STEPS, transform=halves())
    assert d.log_prob(X[:0], condition=np.zeros(0)).shape == (0,)
    x, condition = np.zeros((2, 0, 3)), np.float32(0.3)
    assert jax.eval_shape(d.log_prob, x, None, condition).shape == (2, 0)


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [
        ((), [1, 2], np.array([1, 2])),
        ((2,), [0.1, np.float32(0.2)], np.tile([0.1, np.float32(0.2)], (2, 1))),
        ((2,), {"a": [1, 2]}, {"a": np.array([[1, 2]] * 2)}),
        ({"a": (2,), "b": ()}, {"a": [1, 2], "b": 3}, {"a": np.array([[1, 2]] * 2), "b": [3, 3]}),
        ({"a": (1,), "b": ()}, {"a": [(1,), (2,)], "b": 3}, {"a": [[1], [2]], "b": [3, 3]}),
    ],
)
def test_lists_of_numbers_are_arrays_anywhere_in_a_condition(
    shape: Any, given: Any, expected: Any
) -> None:
    score = conditional() if shape == () else lambda x, t, key, c: -x
    found = sbml.Density(score, SDE, (3,), condition_shape=shape)._conditions(given, (2,))
    for name in expected if isinstance(expected, dict) else [None]:
        one, other = (each if name is None else each[name] for each in (found, expected))
        np.testing.assert_array_equal(one, other)


def halves(**methods: Any) -> types.SimpleNamespace:
    """The transform y = x / 2 with other ``methods``."""
    usual = {"forward": lambda x: x / 2, "inverse_and_log_det": lambda y: (2 * y, jnp.log(2))}
    return types.SimpleNamespace(**{**usual, **methods})


class Affine:
    """y = exp(x) / 2, elementwise."""

    def forward(self, x: Array) -> Array:
        return jnp.exp(x) / 2

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return jnp.log(2 * y), -jnp.log(y)


@pytest.mark.usefixtures("unchecked")
def test_a_change_of_variables_keeps_the_mass() -> None:
    d = density(transform=Affine())
    y = np.asarray(Affine().forward(X))
    expected = exact(X) - np.log(y).sum(axis=1)
    np.testing.assert_allclose(d.log_prob(y), expected, atol=1e-7)
    outside = y * [[1, -1, 1]]
    outside[0, 2] = np.nan
    assert np.isnan(d.log_prob(outside)[0]) and (d.log_prob(outside)[1:] == -np.inf).all()
    with pytest.raises(ValueError, match="the examples 0, 1, 2, 3, but -inf.* the mean would be"):
        d.logp(-y)
    both = d.bound(y).mean - density().bound(X).mean
    assert both == pytest.approx(np.log(y).sum(axis=1).mean(), abs=1e-9)
    samples, logp = d.sample_and_log_prob(jax.random.key(0), 3)
    np.testing.assert_allclose(logp, d.log_prob(samples), atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_change_of_variables_in_measurements_and_of_other_packages() -> None:
    d = density(transform=Affine())
    y = np.asarray(Affine().forward(X))
    expected = exact(X) - np.log(y).sum(axis=1)
    measured = d.logp(y)
    np.testing.assert_allclose(measured.values, expected, atol=1e-7)
    np.testing.assert_allclose(measured.terms["transform"], -jnp.log(y).sum(axis=1))
    assert measured.mean == pytest.approx(float(expected.mean()), abs=1e-7)
    np.testing.assert_allclose(d.decode(d.latent(y)), y, atol=1e-6)
    standard = types.SimpleNamespace(
        forward=lambda x: 3.3 + 0.7 * x,
        inverse_and_log_det=lambda y: ((y - 3.3) / 0.7, -jnp.log(0.7) * jnp.ones_like(y)),
    )
    zeros, given = np.zeros((1, 3)), density(transform=standard)
    at_zero = exact((zeros - 3.3) / 0.7) - 3 * np.log(0.7)
    np.testing.assert_allclose(given.log_prob(zeros), at_zero, atol=1e-6)
    flowjax = types.SimpleNamespace(
        transform=Affine().forward, inverse_and_log_det=Affine().inverse_and_log_det
    )
    np.testing.assert_allclose(density(transform=flowjax).log_prob(y), expected, atol=1e-7)
    for forward, inverse, message in (
        (lambda x: 2 * x, Affine().inverse_and_log_det, "transform=SimpleNamespace: forward"),
        (Affine().forward, lambda y: (jnp.log(2 * y), jnp.log(y)), "its log-determinant is"),
    ):
        wrong = types.SimpleNamespace(forward=forward, inverse_and_log_det=inverse)
        with pytest.raises(ValueError, match=message):
            density(transform=wrong).log_prob(y)
    with pytest.raises(ValueError, match="its log-determinant is"):
        density(transform=wrong).sample(jax.random.key(0), 2)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_linear_subspace_has_the_density_of_its_coordinates() -> None:
    """x = B y with orthonormal columns, such as positions without their centre of mass."""
    basis, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 3)))
    whole = score()

    def embedded(x: Array, t: Array) -> Array:  # the score of x in the subspace, in 5 dimensions
        return basis @ whole(basis.T @ x, t)

    inner = sbml.Density(
        from_prediction(
            lambda y, t: -SDE.std(t) * (basis.T @ embedded(basis @ y, t)), "noise", SDE
        ),
        SDE,
        (3,),
        eps=EPS,
        solver=STRICT,
    )
    np.testing.assert_allclose(inner.log_prob(X), exact(X), atol=1e-2)


@pytest.mark.parametrize("d", [2, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unchecked")
def test_importance_weights_give_the_normaliser(d: int) -> None:
    """A Gaussian target with known Z, from a Gaussian that is a little wider."""
    sde, wide, mean = RectifiedFlow(), 1.2, 0.1

    def network(x: Array, t: Array) -> Array:
        v = (1 - t) ** 2 * wide + t**2
        return (t - (1 - t) * wide) / v * x

    proposal = sbml.Density(from_prediction(network, "flow", sde), sde, (d,), eps=1e-4)
    found = proposal.importance(
        jax.random.key(0), 2000, lambda x: -0.5 * jnp.sum((x - mean) ** 2) + 3
    )
    log_z = 3 + 0.5 * d * np.log(2 * np.pi)
    assert abs(found.log_z.mean - log_z) < 1.5 * found.log_z.ci95 < 0.15
    assert 200 < found.effective < 2000 and not found.heavy_tailed
    broad = lambda x: -0.5 * jnp.sum(x**2) / 9  # noqa: E731
    tails = proposal.importance(jax.random.key(0), 2000, broad)
    assert tails.heavy_tailed and "HEAVY TAILS" in str(tails)
    assert tails.missing > 0.05 > 0.01 > found.missing
    noisy = sbml.Density(proposal.score, sde, (d,), trace=Trace("rademacher"))
    with pytest.raises(ValueError, match="^trace=.*exact"):
        noisy.importance(jax.random.key(0), 10, broad)


@pytest.mark.slow
def test_a_control_fitted_to_the_examples_leaves_the_expectation() -> None:
    """The mean over many sweeps with a control of these examples is that without one: the
    expectation of the bound is over noise and times only."""
    wrong, x = sbml.Density(lambda x, t, key: -x, VP(), (3,), eps=EPS), np.asarray(X)
    plain = wrong.bound(x, sweeps=200, times_each=4, reduce=False)
    reduced = wrong.bound(x, sweeps=50)
    stderr = np.hypot(plain.this_set.stderr, reduced.this_set.stderr)
    assert abs(plain.mean - reduced.mean) < 3 * stderr
    assert reduced.this_set.stderr * np.sqrt(50) < 0.5 * plain.this_set.stderr * np.sqrt(200)
    # Exactly: the expectation of the control's error is its integral, for any fit.
    control = GaussianControl.fit(x[:2], noise_variance=0.1)
    control = jax.tree.map(jnp.asarray, control)
    u = (jnp.arange(4096) + 0.5) / 4096
    t, w = sbml.times.draw(VP(), EPS, u, None, "importance")

    def error(t: Array, z: Array, i: int) -> Array:
        x_t = VP().mean_coef(t) * X[3] + VP().std(t) * z
        return 0.5 * (z[i] - control.noise(VP(), jnp.asarray(x_t), t)[i]) ** 2

    # 1/2 |z - e|^2 is a quadratic form in z, so points along the axes give its expectation.
    axes = jnp.concatenate([jnp.sqrt(3) * jnp.eye(3), -jnp.sqrt(3) * jnp.eye(3)])
    each = jax.vmap(
        lambda t: jnp.mean(jnp.stack([sum(error(t, z, i) for i in range(3)) for z in axes]))
    )(t)
    assert float(jnp.mean(w * each)) == pytest.approx(
        float(control.integral(VP(), jnp.asarray(X[3]), EPS)), rel=1e-4
    )


@pytest.mark.usefixtures("unchecked")
def test_the_bound_in_discrete_time() -> None:
    """The sum over all steps in closed form for a Gaussian score."""
    sde, variances = VP(), VARIANCES
    v = lambda t: sde.mean_coef(t) ** 2 * variances + sde.std(t) ** 2  # noqa: E731
    d = sbml.Density(lambda x, t, key: -x / v(t), sde, (3,), eps=0.05)
    x = np.asarray(X)
    t, weights, _ = bound.chain(sde, 0.05, 20)
    rho2 = (sde.std(t) / sde.mean_coef(t)) ** 2
    rho2 = np.asarray(rho2)[:, None]
    variances = np.asarray(variances)
    errors = (variances**2 + rho2 * x[:, None] ** 2) / (variances + rho2) ** 2
    expected = (np.asarray(weights)[:, None] * errors).sum(axis=(1, 2))
    found = d.bound(x, steps=20, sweeps=400)
    plain = d.bound(x, steps=20, sweeps=400, reduce=False)
    for each in (found, plain):
        assert abs(each.terms["diffusion"].mean() - expected.mean()) < 4 * each.this_set.stderr
    assert found.this_set.stderr < 0.7 * plain.this_set.stderr < 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_bound_of_many_steps_is_that_of_continuous_time() -> None:
    sde, x = VP(), np.asarray(X)
    v = lambda t: sde.mean_coef(t) ** 2 * VARIANCES + sde.std(t) ** 2  # noqa: E731
    d = sbml.Density(lambda x, t, key: -x / v(t), sde, (3,), eps=0.05)
    found = d.bound(x, steps=20, sweeps=400)
    integral = d.bound(x, sweeps=64)
    many = d.bound(x, steps=5000, sweeps=64)
    assert found.mean > integral.mean + 0.1
    noise = np.hypot(many.this_set.stderr, integral.this_set.stderr)
    assert abs(many.mean - integral.mean) < 4 * noise < 2


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_measurement_costs_one_solve_and_one_strict_solve_of_a_part() -> None:
    x = np.asarray(np.random.default_rng(4).normal(size=(10, 3)))
    calls: list[tuple[int, int]] = []

    def counted(d: sbml.Density, **how) -> sbml.Estimate:
        from sbml.density.measurement import Measurement

        calls.clear()
        rows = Measurement.rows

        def recorded(self, ids, sweep=0, solver=None):
            calls.append((len(ids), sweep))
            return rows(self, ids, sweep, solver)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Measurement, "rows", recorded)
            return d.logp(x, **how)

    counted(density(STEPS, subset=4))
    assert calls == [(10, 0), (4, 0)]
    counted(density(STEPS, subset=4, trace=Trace()))
    assert calls == [(10, 0), (4, 1), (4, 0)]
    unchecked = counted(density(STEPS, subset=4), check=False)
    assert calls == [(10, 0)]
    assert unchecked.solver_error is None and not unchecked.converged
    assert "error was not measured; leave out check=False" in str(unchecked)
    assert "check=False" in unchecked.unconverged()


class Flow(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, x: Array, t: Array) -> Array:
        return jnp.tanh(self.layer(x)) * t


class NNXFlow(nnx.Module):
    def __init__(self, weight: Array, bias: Array) -> None:
        self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)

    def __call__(self, x: Array, t: Array) -> Array:
        return jnp.tanh(self.weight[...] @ x + self.bias[...]) * t


class LinenFlow(nn.Module):
    @nn.compact
    def __call__(self, x: Array, t: Array) -> Array:
        return jnp.tanh(nn.Dense(3)(x)) * t


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_modules_of_several_frameworks_give_the_same_density() -> None:
    layer = eqx.nn.Linear(3, 3, key=jax.random.key(0), dtype=float)
    weight, bias = layer.weight, layer.bias
    params = {"params": {"Dense_0": {"kernel": weight.T, "bias": bias}}}
    networks = [
        Flow(layer),
        NNXFlow(weight, bias),
        jax.tree_util.Partial(LinenFlow().apply, params),
        lambda x, t: jnp.tanh(weight @ x + bias) * t,
        functools.partial(lambda w, x, t: jnp.tanh(w @ x + bias) * t, weight),
    ]
    found = [
        sbml.Density(from_prediction(n, "flow", SDE), SDE, (3,), eps=EPS, solver=STEPS).log_prob(X)
        for n in networks
    ]
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=1e-9)


def on(score: Any, **options: Any) -> sbml.Density:
    return sbml.Density(score, SDE, (3,), **options)


def ignoring(x: Array, t: Array, key: Any, condition: Any) -> Array:
    return -x


WRONG_CALLS = [
    (lambda: density().log_prob(X[:, :2]), r"x has shape \(4, 2\): give \(\.\.\., 3,\)"),
    (lambda: density(trace=Trace()).log_prob(X), "key=None with a rademacher trace"),
    (
        lambda: on(conditional()).log_prob(X, condition=jnp.zeros(3)),
        r"condition of shape \(3,\): give one for all examples, \(\), or one for each, \(4,\)",
    ),
    (lambda: density().log_prob(X, condition=1.0), "cannot be called as network"),
    (lambda: on(ignoring).log_prob(X), r"cannot be called as score\(x, t, key\)"),
    (
        lambda: on(conditional()).classify(X, jnp.arange(2), [0.5, 0.6]),
        "prior=.*2 positive probabilities",
    ),
    (lambda: density(levels=4, transform=Affine()), "levels=4 with a transform"),
    (lambda: density(transform=3), r"transform is 3 \(int\): give an object with the methods"),
    (lambda: density(transform=Affine), "transform is <class .*: give an object with the m"),
    (lambda: density(transform=halves(forward=None)), "transform is .*: give an object with"),
    (
        lambda: density(transform=halves(inverse_and_log_det=lambda y: y)),
        r"inverse_and_log_det returned float64 of shape \(3,\): return x and log",
    ),
    (
        lambda: density(transform=halves(inverse_and_log_det=lambda y: None)),
        r"inverse_and_log_det returned None \(NoneType\): return x and log",
    ),
    (
        lambda: density(transform=halves(inverse_and_log_det=lambda y: {}["a"])),
        r"inverse_and_log_det of an example of shape \(3,\) failed with KeyError: 'a': correct",
    ),
    (
        lambda: density(transform=halves(forward=lambda x: None)),
        r"forward of an example of shape \(3,\) returned None",
    ),
    (
        lambda: density(transform=halves(inverse_and_log_det=lambda y: (y[:1], y[0]))),
        r"returned float64 of shape \(1,\): return an array of the same shape",
    ),
    (lambda: sbml.Density(3, SDE, (3,)), r"^score is 3 \(int\): give a function"),
    (
        lambda: sbml.Density(
            lambda x, t, key: -x + jax.random.normal(key, x.shape), SDE, (3,)
        ).log_prob(X),
        "the score draws random numbers although key=None",
    ),
    (
        lambda: on(conditional(), condition_shape=3),
        r"condition_shape is 3 \(int\): give a shape such as \(3,\)",
    ),
    (lambda: density(condition_shape={"a": (-1,)}), "condition_shape is {'a'.*: give a shape"),
    (lambda: density(condition_shape=(0,)), "condition_shape is .* with sizes of at least 1"),
    (
        lambda: on(conditional()).log_prob(X, condition={"a": [[1.0, 2.0], [3.0]]}),
        r"condition is \[\[1.0, 2.0\], \[3.0\]\] \(list\): give lists of one length",
    ),
    (
        lambda: on(ignoring, condition_shape={"a": (2,)}).log_prob(X, condition=[0.1, 0.2]),
        r"condition is the pytree .*: give one like condition_shape=\{'a': \(2,\)\}",
    ),
    (
        lambda: on(ignoring, condition_shape={"a": (2,)}).log_prob(X, condition={"a": None}),
        r"condition is None \(NoneType\): give arrays of numbers",
    ),
    (
        lambda: on(conditional(), condition_shape=(2,)).log_prob(X),
        r"condition=None, but condition_shape=\(2,\): give one condition",
    ),
    (
        lambda: on(conditional()).log_prob(X, condition="a"),
        r"condition is 'a' \(str\): give arrays of numbers",
    ),
    (
        lambda: on(conditional()).classify(X, []),
        r"conditions of shapes \[\(0,\)\]: give arrays .* at least 1",
    ),
    (lambda: Solver(adjoint="both"), "^adjoint is 'both'"),
    (lambda: density().log_prob(np.ones((2, 3), int)), "^x is int"),
    (lambda: jax.jvp(density().log_prob, (X[0],), (np.ones(3),)), r'Solver\(adjoint="forward"\)'),
    (
        lambda: density().importance(jax.random.key(0), 4, lambda x: x),
        r"log_target returned shape \(3,\) for one example",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("unchecked")
def test_weights_that_an_inner_function_has_read_are_seen() -> None:
    """``jit``, and others that compile a function by themselves, keep what it has read."""
    found = []
    for w in (1.0, 2.0):
        matrix = w * jnp.eye(3)
        net = jax.jit(lambda x, matrix=matrix: -matrix @ x)
        how = {"eps": EPS, "solver": STEPS}
        found.append(sbml.Density(lambda x, t, key, net=net: net(x), VP(), (3,), **how).log_prob(X))
    assert np.abs(found[0] - found[1]).min() > 1e-3


@pytest.mark.usefixtures("unchecked")
def test_half_precision_is_converted_or_refused() -> None:
    weights = jnp.asarray([[0.5, 0.1, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.3]])

    def score(w: Array, x: Array, t: Array, key: None) -> Array:
        return -w.astype(x.dtype) @ x

    of = [
        sbml.Density(jax.tree_util.Partial(score, w), VP(), (3,), eps=EPS, solver=STEPS)
        for w in (weights.astype(jnp.bfloat16), weights.astype(jnp.bfloat16).astype(jnp.float32))
    ]
    with pytest.warns(UserWarning, match="weights of bfloat16 are evaluated in float32"):
        found = of[0].log_prob(X)
    np.testing.assert_array_equal(found, of[1].log_prob(X))
    half = sbml.Density(
        lambda x, t, key: -x.astype(jnp.bfloat16).astype(x.dtype), VP(), (3,), eps=EPS
    )
    with pytest.raises(ValueError, match="computes in bfloat16.*float32"):
        half.log_prob(X)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_few_examples_and_constant_coordinates_have_a_control() -> None:
    """Without an added variance, the control would be far off in directions without variance."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(8, 16))
    x[:, 3] = 0.2
    d = sbml.Density(lambda x, t, key: -x, VP(), (16,), eps=EPS)
    plain = d.bound(x, reduce=False, sweeps=16)
    for fit in (x[:1], x[:4], rng.normal(size=(40, 16)) * (np.arange(16) != 3)):
        found = d.bound(x, fit=fit, sweeps=16)
        assert found.this_set.stderr < plain.this_set.stderr
        noise = np.hypot(found.this_set.stderr, plain.this_set.stderr)
        assert abs(found.mean - plain.mean) < 4 * noise
    given = sbml.Density(conditional(), SDE, (3,), eps=EPS)
    assert np.isfinite(given.bound(X, 0.3, fit=X + 0.1).mean)


@pytest.mark.usefixtures("unchecked")
def test_lost_examples_are_named_and_large_differences_are_kept() -> None:
    logp = np.array([[-1000.0, -3000.0], [0.0, np.nan], [1.0, 0.0]])
    zero = np.zeros(3)
    found = Posterior.of(logp, zero, np.log([0.5, 0.5]), np.arange(1), logp[:1], logp[:1], np.mean)
    assert found.lost.tolist() == [1] and found.predicted.tolist() == [0, -1, 0]
    assert "gave up for 1 examples" in str(found)
    assert found.accuracy([0, 0, 0]).mean == pytest.approx(2 / 3)
    assert Posterior.of(
        logp[::2], zero[:2], np.log([0.5, 0.5]), np.arange(1), logp[:1], logp[:1], np.mean
    ).log_score([1, 0]).mean == pytest.approx((2000 + np.log1p(np.exp(-1))) / 2)
    even, half = np.log([[0.5, 0.5], [0.8, 0.2]]), np.log([0.5, 0.5])
    known = Posterior.of(even, zero[:2], half, np.arange(2), even, even, lambda w: 0.3)
    assert known.prior == pytest.approx(2 * 0.3 * (0.25 + 0.16) / 2)
    two = Importance.of(np.zeros((3, 1)), np.log([3.0, 2.0, 1.0]), zero[:1], zero[:1])
    assert two.effective == pytest.approx(6**2 / 14)
    weights = np.random.default_rng(6).normal(size=2000) * 5
    none = np.zeros(4)
    assert Importance.of(np.zeros((2000, 1)), weights, none, none).heavy_tailed
    lost = Importance.of(np.zeros((3, 1)), np.array([0.0, np.nan, 1.0]), none, none)
    assert lost.log_z.nonfinite == 1 and np.isnan(lost.log_z.mean) and lost.heavy_tailed
