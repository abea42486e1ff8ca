"""``Density``: a score's likelihood, bound, bits/dim, samples and latents, with error bars."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import sbml
from sbml.audit import oracle
from sbml.core import pytrees
from sbml.core.streams import stream
from sbml.core.types import Array
from sbml.density import distribution
from sbml.density.estimate import Estimate, contradiction
from sbml.density.estimators import base
from sbml.likelihood import bound
from sbml.likelihood.ode import Solver
from sbml.score import NetworkScore, from_prediction
from sbml.score.divergence import Trace
from sbml.sdes import SDE, SDES, VP, RectifiedFlow, Schedule, times

pytestmark = pytest.mark.usefixtures("x64")

EPS, SDE_VP = 1e-3, VP()
MEAN = jnp.array([0.3, -0.2, 0.1, 0.0])
EIGENVALUES = jnp.array([0.5, 0.2, 0.1, 0.02])


def gaussian(sde: SDE = SDE_VP) -> oracle.Gaussian:
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    return oracle.Gaussian(sde, MEAN, EIGENVALUES, jnp.asarray(basis))


def density(sde: SDE = SDE_VP, **options) -> sbml.Density:
    return sbml.Density(gaussian(sde).score, sde, (2, 2), **{"eps": EPS, **options})


def data(n: int) -> np.ndarray:
    """``n`` draws of the Gaussian."""
    normal = np.random.default_rng(1).normal(size=(n, 4)) * np.sqrt(EIGENVALUES)
    return (np.asarray(MEAN) + normal @ np.asarray(gaussian().basis).T).reshape(n, 2, 2)


def assert_sum_of_terms(estimate: Estimate) -> None:
    """Compare up to the rounding of a sum in any order, relative to the sum of magnitudes."""
    terms = np.stack([*estimate.terms.values()])
    rounding = 4 * np.finfo(float).eps * np.abs(terms).sum(axis=0)
    assert np.all(np.abs(estimate.values - terms.sum(axis=0)) <= rounding)


@pytest.mark.parametrize("name", ["vp", "linear_gamma"])
def test_log_likelihoods_are_those_of_the_closed_form(name: str) -> None:
    sde, x = SDES[name](), data(6)
    estimate = density(sde, solver=Solver(rtol=1e-5, atol=1e-5)).logp(x)
    exact = [gaussian(sde).logp(jnp.asarray(row), jnp.asarray(EPS)) for row in x]
    # The difference is the solver's error and the prior's mismatch at T, where VDM has more signal.
    np.testing.assert_allclose(
        estimate.values, exact, atol=4e-2 if name == "linear_gamma" else 2e-2
    )
    assert_sum_of_terms(estimate)
    assert estimate.converged and estimate.unit == "nats" and (estimate.nfe > 10).all()
    assert estimate.this_set.ci95 < 1e-9  # An exact trace draws nothing.
    assert estimate.mean == estimate.population.mean == pytest.approx(estimate.values.mean())


@pytest.mark.slow
def test_the_batch_size_changes_nothing_and_the_seed_changes_the_probes() -> None:
    x, options = data(7), {"trace": Trace("rademacher", 2)}
    one, other = (density(batch_size=size, **options).logp(x) for size in (3, 7))
    np.testing.assert_allclose(one.values, other.values, rtol=1e-12)
    assert np.all(density(seed=1, batch_size=7, **options).logp(x).values != other.values)
    assert one.this_set.ci95 == pytest.approx(other.this_set.ci95) and one.this_set.ci95 > 0


@pytest.mark.slow
def test_only_an_exact_trace_has_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("density", "distribution"):
        monkeypatch.setattr(f"sbml.density.{place}.exact_batch", lambda dims: 2)
    sizes: list[int] = []

    def recorded(f, ids, size):
        sizes.append(size)
        raise KeyboardInterrupt  # before anything is computed

    monkeypatch.setattr(pytrees, "in_batches", recorded)
    x, found = data(5), {}
    for name, trace in {"exact": Trace("exact"), "probes": Trace("rademacher", 2)}.items():
        for method in ("logp", "latent", "bound"):
            sizes.clear()
            with pytest.raises(KeyboardInterrupt):
                getattr(density(trace=trace), method)(x)
            found[name, method] = set(sizes)
    assert found.pop(("exact", "logp")) == {2} and set(map(tuple, found.values())) == {(5,)}


def test_the_bound_is_the_librarys_mean_over_sweeps_of_new_times() -> None:
    """In batches of 3, each example by itself."""
    x, seed, sweeps = data(7), 5, 3
    found = density(batch_size=3, seed=seed).bound(x, sweeps=sweeps, times_each=2, reduce=False)

    @jax.jit
    @jax.vmap
    def elbo(x: Array, key: Array, u: Array) -> Array:
        return bound.elbo(gaussian().score, VP(), x, key, eps=EPS, u=u).total

    each = []
    for sweep in range(sweeps):
        u = times.lattice(base.times_key(seed, sweep), 7, 2)
        keys = jnp.stack([stream(base.draw_key(seed, sweep, i), "bound") for i in range(7)])
        each.append(elbo(jnp.asarray(x), keys, u))
    np.testing.assert_allclose(found.values, np.mean(each, axis=0), rtol=1e-9)
    assert found.this_set.stderr == pytest.approx(stats.sem(np.mean(each, axis=1)))
    assert found.solver_error is None and found.converged
    assert_sum_of_terms(found)


@pytest.mark.slow
def test_a_wrong_score_has_a_looser_bound() -> None:
    x = data(40)
    wrong = sbml.Density(lambda x, t, key: -x, VP(), (2, 2), eps=EPS).bound(x)
    assert wrong.population.mean > density().bound(x).population.mean + 0.5
    vp = density(eps=None).bound(data(2), sweeps=2)
    assert vp.eps == 1e-5 and "nats at t=1e-5, 95% interval" in str(vp)


def test_bits_per_dim_are_of_the_integers() -> None:
    """By definition they are -log2 of the mean density in the bin, divided by the dimensions."""
    levels, k = 8, np.random.default_rng(2).integers(2, 6, (12, 2, 2))
    d = density(levels=levels, trace=Trace("exact"))
    estimate = d.bits_per_dim(k)
    np.testing.assert_array_equal(d.evaluate(k).values, estimate.values)
    u = np.random.default_rng(3).random((4000, 1, 2, 2))
    x = 2 * (k + u) / levels - 1
    logp = jax.vmap(jax.vmap(lambda x: gaussian().logp(x, jnp.asarray(EPS))))(jnp.asarray(x))
    expected = (-logp.mean(axis=0) + 4 * math.log(levels / 2)) / (4 * math.log(2))
    # Density draws one u for each example: its error bar limits the difference of the means.
    assert abs(estimate.population.mean - expected.mean()) < 2 * estimate.this_set.ci95 + 0.01
    assert 0.01 < estimate.this_set.ci95 < 0.5 and estimate.unit == "bits/dim"
    assert set(estimate.terms) >= {"prior", "divergence", "dequantization", "scale"}
    low, high = estimate.population.bounds
    interval = f"95% interval [{low:.4f}, {high:.4f}]"
    own = f"for these examples +-{estimate.this_set.ci95:.4f}, n=12"
    assert f"bits/dim by uniform dequantization at t=0.001, {interval}, {own}" in str(estimate)
    bound = d.bound(k, sweeps=128)
    assert abs(bound.population.mean - expected.mean()) < 2 * bound.this_set.ci95 + 0.01 < 0.3
    assert "bits/dim by uniform dequantization" in str(bound) and bound.sweeps == 128
    np.testing.assert_allclose(bound.values, sum(bound.terms.values()), rtol=1e-12)
    assert estimate.eps == (-estimate).eps == EPS
    assert estimate.population.ci95 != pytest.approx(estimate.this_set.ci95, rel=1e-3)


@pytest.mark.slow
def test_latents_decode_to_the_data_and_samples_of_integers_are_integers() -> None:
    strict = {"solver": Solver(rtol=1e-7, atol=1e-7)}
    x, d = data(5), density(**strict)
    z = d.latent(x)
    flow = gaussian().flow
    exact = [flow(jnp.asarray(row), jnp.asarray(EPS), jnp.asarray(1.0)) for row in x]
    np.testing.assert_allclose(z, exact, atol=1e-5)
    np.testing.assert_allclose(d.decode(z), x, atol=1e-5)
    integers = density(levels=8).sample(jax.random.key(0), 3)
    assert integers.shape == (3, 2, 2) and integers.dtype == np.uint8 and integers.max() < 8


@pytest.mark.slow
def test_a_number_that_has_not_converged_says_so() -> None:
    loose = density(solver=Solver("heun", fixed_steps=3), budget=1e-6)
    estimate = loose.logp(data(4))
    assert not estimate.converged and "NOT CONVERGED" in str(estimate)


@pytest.mark.slow
def test_an_example_that_dominates_the_mean_is_named() -> None:
    x = data(12)
    x[5] += 40
    found = density().bound(x, sweeps=2)
    number, line = str(found).split("\n")
    assert found.mean > 1000 and number.startswith(f"{found.mean:.4f} nats")
    assert f"standard deviations from the median {np.median(found.values):.4f}: 5 (" in line


@pytest.mark.slow
def test_the_solver_error_of_the_only_example_is_known() -> None:
    estimate = density().logp(data(1))
    assert estimate.converged and estimate.solver_error.ci95 == 0
    assert not density(solver=Solver("heun", fixed_steps=3), budget=1e-6).logp(data(1)).converged


@pytest.mark.slow
def test_data_of_any_precision_are_taken() -> None:
    x, normal = data(2).astype(np.float16), sbml.Density(lambda x, t, key: -x, VP(), (2, 2))
    values = [normal.logp(x.astype(dtype)).values for dtype in (np.float16, np.float32, float)]
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])
    half = jnp.asarray(x, jnp.bfloat16)
    exact = normal.logp(np.asarray(half, float)).values
    np.testing.assert_array_equal(normal.logp(half).values, exact)
    of_array, of_float = (
        sbml.Density(normal.score, VP(), (2, 2), eps=eps).logp(x).values
        for eps in (jnp.asarray(EPS), EPS)
    )
    np.testing.assert_array_equal(of_array, of_float)


class Typed:
    """A score with an attribute of arrays, whose weights are not among the leaves of a pytree."""

    dtype = jnp.float32

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    def __call__(self, x: Array, t: Array, key: None) -> Array:
        return -self.weights["w"] * x


@pytest.mark.slow
@pytest.mark.parametrize("made", ["function", "prediction", "object"])
def test_weights_that_have_changed_are_read_again(made: str) -> None:
    """The score is -w x, which reads w from elsewhere."""
    sde, weights, key, x = VP(), {"w": 1.0}, jax.random.key(0), data(2)
    how = {"eps": EPS, "solver": Solver("heun", fixed_steps=3)}
    score = {
        "function": lambda x, t, key: -weights["w"] * x,
        "prediction": from_prediction(
            lambda x, t: weights["w"] * sde.std(t) * x, "noise", sde, data_std=np.float64(0.5)
        ),
        "object": Typed(weights),
    }[made]
    # All methods compile a score in the same way, and each compilation takes a second.
    every = (("latent", x), ("sample", key, 2))
    methods = every if made == "function" else every[:1]
    now = sbml.Density(score, sde, (2, 2), **how)
    for w in (1.0, 0.5):
        weights["w"] = w
        exact = sbml.Density(jax.tree_util.Partial(scaled, jnp.asarray(w)), sde, (2, 2), **how)
        for method, *arguments in methods:
            found, expected = (getattr(d, method)(*arguments) for d in (now, exact))
            if isinstance(found, Estimate):
                found, expected = found.values, expected.values
            np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_a_function_made_anew_is_compiled_once_for_all_its_weights() -> None:
    kept = distribution._jit(distribution._of_rows, "f", "how", "size").jitted
    before, found = kept._cache_size(), []
    for w in (1.0, 0.5):
        matrix = w * jnp.eye(2)

        def score(x: Array, t: Array, key: None, matrix: Array = matrix) -> Array:
            return -matrix @ x

        how = {"solver": Solver("heun", fixed_steps=2)}
        found.append(sbml.Density(score, VP(), (2, 2), **how).latent(data(1)))
    assert kept._cache_size() == before + 1
    assert np.abs(found[0] - found[1]).min() > 1e-3


@pytest.mark.slow
def test_functions_with_other_derivatives_are_other_programs() -> None:
    """Two functions with equal values, one of which says that its derivative is 0."""

    @jax.custom_jvp
    def constant(x: Array) -> Array:
        return -x

    @jax.custom_jvp
    def usual(x: Array) -> Array:
        return -x

    constant.defjvp(lambda p, t: (-p[0], 0 * t[0]))
    usual.defjvp(lambda p, t: (-p[0], -t[0]))
    x, how = data(1), {"solver": Solver("heun", fixed_steps=4), "eps": EPS}
    terms = [
        sbml.Density(lambda x, t, key, f=f: f(x), VP(), (2, 2), **how)
        .logp(x, check=False)
        .terms["divergence"]
        for f in (constant, usual)
    ]
    # With the true derivative, the divergence of -g^2 s / 2 cancels that of f x.
    assert terms[0] < -10 and abs(terms[1]) < 1e-9


def test_a_wrapped_score_keeps_its_predictions() -> None:
    """With them, the ODE runs up to T, where the signal vanishes."""
    sde, w = RectifiedFlow(), jnp.asarray(2.0)

    def velocity(w: Array, x: Array, t: Array) -> Array:
        return (t - (1 - t) / w) / ((1 - t) ** 2 / w + t**2) * x

    score = from_prediction(jax.tree_util.Partial(velocity, w), "flow", sde)
    function = from_prediction(lambda x, t: velocity(w, x, t), "flow", sde)
    how = {"solver": Solver("heun", fixed_steps=4)}
    latents = [
        sbml.Density(s, sde, (2, 2), **how).latent(3 + data(2))
        for s in (score, function, jax.tree_util.Partial(function))
    ]
    np.testing.assert_allclose(latents[1], latents[0], rtol=1e-12)
    np.testing.assert_allclose(latents[2], latents[0], rtol=1e-12)
    plain = sbml.Density(lambda x, t, key: score(x, t), sde, (2, 2), **how).latent(3 + data(2))
    assert np.abs(plain - latents[0]).min() > 1e-8


def scaled(w: Array, x: Array, t: Array, key: None) -> Array:
    return -w * x


def test_a_score_with_arrays_is_compiled_once() -> None:
    calls = []

    def f(w: Array, x: Array, t: Array, key: None) -> Array:
        calls.append(w)
        return -w * x

    one = sbml.Density(jax.tree_util.Partial(f, jnp.asarray(1.0)), VP(), (2, 2), eps=EPS)
    first = one.logp(data(2)).values
    count = len(calls)
    np.testing.assert_array_equal(one.logp(data(2)).values, first)
    assert len(calls) == count


@pytest.mark.slow
def test_a_module_with_activation_functions_among_its_leaves() -> None:
    class Module(eqx.Module):
        mlp: eqx.nn.MLP

        def __call__(self, x: Array, t: Array, key: None = None) -> Array:
            return self.mlp(x)

    module, sde = Module(eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))), VP()
    x = data(2).reshape(2, 4)
    for score, function in (
        (module, lambda x, t, key: module.mlp(x)),
        (from_prediction(module, "noise", sde), lambda x, t, key: -module.mlp(x) / sde.std(t)),
    ):
        how = {"eps": EPS, "solver": Solver("heun", fixed_steps=3)}
        found, expected = (sbml.Density(s, sde, (4,), **how).latent(x) for s in (score, function))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def made_for(sde: SDE) -> NetworkScore:
    return from_prediction(lambda x, t: -x, "flow", sde)


def lost(*indices: int, n: int = 8, value: float = math.nan) -> np.ndarray:
    """``n`` examples, of which those at ``indices`` have one pixel of this value."""
    x = data(n)
    x[list(indices), 0, 1] = value
    return x


REVERSED = Schedule(lambda t: t, lambda t: 1.001 - t)


KEY = jax.random.key(0)
INVALID = [
    (lambda: density().logp(data(3)[:, 0]), r"data of shape \(3, 2\): give \(n, 2, 2\)"),
    (lambda: density().logp(np.zeros((0, 2, 2))), "n at least 1"),
    (lambda: density().logp(np.zeros((1, 2, 2), int)), "x is of int64: give floating-point"),
    (lambda: density().bits_per_dim(np.zeros((1, 2, 2), int)), "the number of their levels"),
    (
        lambda: density(levels=4).bits_per_dim(data(1)),
        "pixels are float64: give an array of integers",
    ),
    (lambda: density(levels=4).bits_per_dim(np.full((1, 2, 2), 4)), r"lie in 4 .. 4: .*0 .. 3"),
    (lambda: density(levels=1), "^levels is 1: "),
    (lambda: density(levels=70_000), "^levels is 70000:.*65536"),
    (lambda: density(levels=1000).sample(KEY, 1), "levels=1000: give an integer of 2 to 256"),
    (
        lambda: density(levels=8, solver=Solver(max_steps=2)).sample(KEY, 3),
        "3 of 3 samples are not finite, with solver=.*larger max_steps",
    ),
    (
        lambda: sbml.Density(gaussian().score, VP(jnp.asarray(0.1)), (2,)),
        "contains arrays or lists.*tuples of floats",
    ),
    (lambda: density(batch_size=0), "^batch_size is 0"),
    (lambda: density(classes=("b", "a", "a")), "classes has 'a' twice"),
    (
        lambda: sbml.Density(lambda x, t, k, c: -x * c, VP(), (2,)).sample(
            KEY, 2, np.float32([1, np.nan])
        ),
        "condition has a NaN",
    ),
    (lambda: density(eps=2.0), r"must lie in \(0, 1.0\)"),
    (lambda: sbml.Density(gaussian().score, VP(), (2, 0)), r"shape is \(2, 0\)"),
    (lambda: sbml.Density(gaussian().score, VP(), 2), "^shape is 2"),
    (lambda: sbml.Density(gaussian().score, VP(), [2]), r"^shape is \[2\]"),
    (lambda: sbml.Density(gaussian().score, VP, (2,)), "^sde is <class"),
    (lambda: sbml.Density(lambda x, t: x, VP(), (2,)), r"cannot be called as score\(x, t, key\)"),
    (
        lambda: sbml.Density(made_for(RectifiedFlow()), VP(), (2,)),
        r"was made for sde=RectifiedFlow\(\), and Density has sde=VP\(",
    ),
    (lambda: sbml.Density(lambda x, t, key: x, REVERSED, (2,)), "it must decrease"),
    (lambda: density().logp(lost(3, 5)), r"2 of 8 examples have.*indices are 3, 5$"),
    (lambda: density().bound(lost(*range(12), n=40)), r"12 of 40 .* 0, 1, .*, 9, \.\.\.$"),
    (lambda: density().decode(lost(0, value=-math.inf)), "1 of 8 examples .* are 0$"),
    # With an infinite budget, no error would be marked.
    (lambda: density(budget=math.inf), "^budget is inf"),
    (lambda: density(budget=1.5), "^budget is 1.5"),
    (lambda: density().bound(data(2), sweeps=1), "^sweeps is 1"),
    (lambda: density().sample(KEY, 0), "^n is 0"),
]


@pytest.mark.parametrize(("call", "message"), INVALID)
@pytest.mark.usefixtures("unchecked")
def test_invalid_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_ode_far_above_its_bound_is_a_contradiction() -> None:
    """A score of rounded numbers: a step function of x, whose divergence is 0 almost everywhere."""
    d = sbml.Density(
        lambda x, t, key: -jnp.round(x), VP(), (3,), solver=Solver("heun", fixed_steps=9)
    )
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    logp, bound = d.logp(x, check=False), d.bound(x)
    text = contradiction(-logp, bound, most=0.2)
    gap = float(np.mean(-logp.values - bound.values))
    assert gap > 0.5 and text.startswith(f"the number of the ODE is {gap:.3f} +- ")
    assert not contradiction(-logp, bound, most=gap + 1)


@pytest.mark.slow
def test_a_bound_far_above_the_ode_is_a_contradiction() -> None:
    """A network for standard normal data that takes steps 0 to 999 is given the time instead."""

    def noise(scale: Array, x: Array, t: Array) -> Array:
        return VP().std(scale * t / 999) * x

    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    for scale, far in ((999.0, False), (1.0, True)):
        network = jax.tree_util.Partial(noise, jnp.asarray(scale))
        score = from_prediction(network, "noise", VP())
        d = sbml.Density(score, VP(), (3,), solver=Solver("heun", fixed_steps=20))
        logp, bound = d.logp(x, check=False), d.bound(x, sweeps=32)
        text = contradiction(-logp, bound, most=0.07 * 3)
        assert text.startswith("the bound is ") == far == bool(text), (bound, text)
    gap = float(np.mean(logp.values + bound.values))
    assert f"{gap:.3f} +- " in text and "check which times the network takes" in text
    assert logp.mean < -15 and not contradiction(-logp, bound, most=gap / 4)
