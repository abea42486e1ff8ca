"""Every kind of prediction: its score under all schedules, likelihood and bound under some.

All kinds are compared with the exact score and its derivative, and those that need no division by
alpha also with E[x_0 | x_t] and E[z | x_t]. The ODE and the bound use these functions only, so they
are computed for two kinds each.

What an ideal network predicts follows from the data's E[x_0 | x_t] and E[z | x_t], which
``verify.oracle`` knows without a division by alpha.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import bound, likelihood, ode, predictions, samplers, sampling, times
from sbml.density import Density
from sbml.divergence import Trace
from sbml.predictions import DENOISED, NOISE, SCALED, from_prediction
from sbml.sdes import SDE, SDES, AlphaBarTable, Schedule
from sbml.types import Array, Key
from sbml.verify import continuous, oracle

pytestmark = pytest.mark.usefixtures("x64")

EPS, DATA_STD, D = 1e-2, 0.5, 3
KINDS = tuple(NOISE)

# Those with closed forms, a discrete-time model's, and two pairs of functions from which all else
# is derived. The signal of the second one vanishes.
SCHEDULES: dict[str, SDE] = {
    **{name: kind() for name, kind in SDES.items()},
    "table": AlphaBarTable(np.cumprod(1 - np.linspace(0.01, 0.9, 8))),
    "pair": Schedule(lambda t: 1 / (1 + 3 * t**2), lambda t: jnp.sqrt(t * (2 + t))),
    "vanishing_pair": Schedule(lambda t: (1 - t) * (1 + t), lambda t: 2 * t),
}
# The ODE and the bound are computed for these schedules. Those of the others follow from the equal
# scores and the tests of ``likelihood`` and ``bound``.
INTEGRATED = ("rectified_flow", "table", "pair", "vanishing_pair")
VANISHING = ("rectified_flow", "cosine_vp", "vanishing_pair")

# The Gaussian is a mixture too, of equal parts: both kinds of data share compiled functions.
DATA: dict[str, Callable[[SDE], oracle.Mixture]] = {
    "Gaussian": lambda sde: oracle.as_mixture(oracle.gaussian(sde)),
    "mixture": oracle.mixture,
}


@jax.jit  # All kinds share its trace.
def moments(data: oracle.Mixture, x: Array, t: Array) -> tuple[Array, Array]:
    """E[x_0 | x_t] and E[z | x_t]: of each part, weighted by its posterior probability."""
    weights = jax.nn.softmax(data._joint(x, t))
    x_0 = jax.vmap(lambda part: part.posterior_mean(x, t))(data.parts)
    noise = jax.vmap(lambda part: -part.sde.std(t) * part.score(x, t))(data.parts)
    return jnp.tensordot(weights, x_0, 1), jnp.tensordot(weights, noise, 1)


def ideal(kind: str, sde: SDE, data: oracle.Mixture) -> predictions.Network:
    """What an ideal network predicts, by the definition of ``kind``."""

    def network(x: Array, t: Array) -> Array:
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        v = sigma**2 + (alpha * DATA_STD) ** 2
        x = x * jnp.sqrt(v) if kind in SCALED else x
        x_0, noise = moments(data, x, t)
        return {
            "noise": noise,
            "score": data.score(x, t),
            "x0": x_0,
            "velocity": alpha * noise - sigma * x_0,
            "flow": noise - x_0,
            "residual": noise - x,
            "scaled_score": -noise,
            # What is left of x_0 after the best linear denoiser of white data, sign reversed.
            "preconditioned": (alpha * DATA_STD**2 * x / v - x_0) * v**0.5 / (sigma * DATA_STD),
        }[kind]

    def edm(scaled: Array, label: Array) -> Array:
        """(D(y) - c_skip y) / c_out, in the numbers of EDM's table 1."""
        rho, d = jnp.exp(4 * label), DATA_STD
        t = sde.time(-2 * jnp.log(rho))
        y = scaled * jnp.sqrt(rho**2 + d**2)
        x_0, _ = moments(data, sde.mean_coef(t) * y, t)
        c_skip, c_out = d**2 / (rho**2 + d**2), rho * d / jnp.sqrt(rho**2 + d**2)
        return (x_0 - c_skip * y) / c_out

    return edm if kind == "edm" else network


class OneOf:
    """The scores of some kinds, of which a number, ``chosen``, selects one without compiling."""

    def __init__(self, kinds: tuple[str, ...], chosen: Array, sde: SDE, data: oracle.Mixture):
        self.scores = [
            from_prediction(ideal(kind, sde, data), kind, sde, data_std=DATA_STD) for kind in kinds
        ]
        self.chosen = chosen

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        return jax.lax.switch(self.chosen, self.scores, x, t)


class OneOfPairs(OneOf):
    def predictions(self, x: Array, t: Array) -> tuple[Array, Array]:
        return jax.lax.switch(self.chosen, [score.predictions for score in self.scores], x, t)


# The kinds whose ODE is solved, and those whose bound is computed.
SOLVED: tuple[tuple[type[OneOf], tuple[str, ...]], ...] = (
    (OneOfPairs, ("velocity",)),
    (OneOf, ("noise",)),
)
BOUNDED = ("velocity", "edm")


def each_kind(
    kinds: tuple[str, ...], f: Callable[[Array], dict[str, Array]]
) -> dict[str, dict[str, Array]]:
    """``f`` of 0, 1, ... one after another, compiled once, by the names of ``kinds``."""
    values = jax.lax.map(f, jnp.arange(len(kinds)))
    return {
        kind: {name: value[i] for name, value in values.items()} for i, kind in enumerate(kinds)
    }


# Scores.

TIMES = np.array([EPS, 0.1, 0.5, 0.9])


def with_slope(f: Callable[[Array], Array], x: Array) -> Array:
    """f(x) and its derivative along one direction, which a divergence needs: ``(2, d)``."""
    return jnp.stack(jax.jvp(f, (x,), (jnp.array([0.6, -0.3, 0.8]),)))


@functools.cache
def _scores(name: str) -> Callable[..., tuple[dict[str, Array], dict[str, dict[str, Array]]]]:
    sde = SCHEDULES[name]

    @jax.jit
    def scores(
        data: oracle.Mixture, x: Array, t: Array
    ) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
        def of(chosen: Array) -> dict[str, Array]:
            score = OneOf(KINDS, chosen, sde, data)

            def one(xt: tuple[Array, Array]) -> Array:
                return with_slope(lambda x: score(x, xt[1], None), xt[0])

            return {"found": jax.lax.map(one, (x, t))}

        def pair_of(chosen: Array) -> dict[str, Array]:
            score = OneOfPairs(tuple(DENOISED), chosen, sde, data)

            def one(xt: tuple[Array, Array], i: int) -> Array:
                return with_slope(lambda x: score.predictions(x, xt[1])[i], xt[0])

            return {
                of: jax.lax.map(functools.partial(one, i=i), (x, t))
                for i, of in enumerate(("x_0", "noise"))
            }

        found = {kind: values["found"] for kind, values in each_kind(KINDS, of).items()}
        exact = {
            of: jax.vmap(lambda x, t: with_slope(lambda x: moments(data, x, t)[i], x))(x, t)  # noqa: B023
            for i, of in enumerate(("x_0", "noise"))
        }
        slopes = jax.vmap(lambda x, t: with_slope(lambda x: data.score(x, t), x))(x, t)
        return {**found, "exact": slopes}, {**each_kind(tuple(DENOISED), pair_of), "exact": exact}

    return scores


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_prediction_is_the_same_score(name: str, kind: str) -> None:
    sde = SCHEDULES[name]
    t = jnp.asarray([*TIMES, sde.largest_time, 1.0])
    starts = jnp.array([[0.4, -0.3, 0.2]]), jnp.array([[1.0, -2.0, 0.5]])
    x = sde.mean_coef(t)[:, None] * starts[0] + sde.std(t)[:, None] * starts[1]
    found, pairs = _scores(name)(DATA[kind](sde), x, t)
    for of in ("x_0", "noise"):
        exact = pairs["exact"][of]
        for prediction in DENOISED:
            pair = pairs[prediction][of]
            np.testing.assert_allclose(pair, exact, rtol=0, atol=1e-10, err_msg=prediction)
    expected = np.asarray(found.pop("exact"))
    for prediction, score in found.items():
        # Where there is no signal, only pairs are defined; EDM's label of the time loses digits.
        rows = slice(None) if prediction in DENOISED or name not in VANISHING else slice(-1)
        tolerance = 1e-8 if prediction == "edm" else 1e-10
        error = (np.abs(score - expected).max(2) / np.abs(expected).max(2)).max(1)
        assert (error[rows] < tolerance).all(), (prediction, error)


# Likelihoods.


@functools.cache
def _likelihoods(name: str) -> Callable[..., dict[str, dict[str, Array]]]:
    # The rate of a table has kinks at its levels, where a step of the solver is less exact.
    sde, tolerance = SCHEDULES[name], 1e-10 if name == "table" else 1e-8
    solver = ode.Solver("dopri5", rtol=tolerance, atol=tolerance)

    @jax.jit
    def likelihoods(data: oracle.Mixture, x: Array) -> dict[str, dict[str, Array]]:
        def of(kinds: tuple[str, ...], group: type[OneOf], chosen: Array) -> dict[str, Array]:
            score = group(kinds, chosen, sde, data)

            def one(x: Array) -> likelihood.Likelihood:
                how = {"eps": EPS, "trace": Trace("exact"), "solver": solver}
                return likelihood.ode_logp(score, sde, x, None, **how)

            found = jax.lax.map(one, x)
            return {"logp": found.logp, "prior": found.prior, "z": found.z}

        found = [each_kind(kinds, functools.partial(of, kinds, group)) for group, kinds in SOLVED]
        return found[0] | found[1]

    return likelihoods


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", INTEGRATED)
def test_every_likelihood_is_the_datas(name: str, kind: str) -> None:
    """With p_T in the prior's place, log p_eps exactly; where the signal vanishes, p_T is the
    prior."""
    sde = SCHEDULES[name]
    data, x = DATA[kind](sde), jnp.array([[0.4, 0.0, 0.1], [-0.3, 0.5, -0.6]])
    exact = jax.vmap(lambda x: data.logp(x, jnp.asarray(EPS)))(x)
    for prediction, found in _likelihoods(name)(data, x).items():
        last, stretch = sde.T, 1.0
        if name in VANISHING and prediction in DENOISED:
            np.testing.assert_allclose(found["logp"], exact, atol=1e-6, err_msg=prediction)
        elif name in VANISHING:
            # The signal at the largest time: 1e-3 of the data's mean, times z.
            np.testing.assert_allclose(found["logp"], exact, atol=3e-3, err_msg=prediction)
            last, stretch = sde.largest_time, float(sde.stretch)
        end = jax.vmap(lambda z: data.logp(z / stretch, jnp.asarray(last)))(found["z"])  # noqa: B023
        total = found["logp"] - found["prior"] + end - D * math.log(stretch)
        np.testing.assert_allclose(total, exact, atol=1e-6, err_msg=prediction)


# Bounds.


@functools.cache
def _bounds(name: str) -> Callable[..., dict[str, dict[str, Array]]]:
    sde = SCHEDULES[name]
    nodes, node_weights = np.polynomial.legendre.leggauss(64)
    weights = jnp.asarray(0.5 * node_weights)

    @jax.jit
    def bounds(data: oracle.Mixture, points: tuple[Array, Array, Array]) -> dict[str, Array]:
        x_0, z, each = points
        t, at = times.Importance(sde, EPS).over_log_snr(jnp.asarray(0.5 * nodes + 0.5))

        def of(chosen: Array) -> dict[str, Array]:
            score = OneOf(BOUNDED, chosen, sde, data)

            def mean(t: Array) -> Array:
                errors = jax.vmap(lambda x, z: bound.noise_error(score, sde, x, t, z))(x_0, z)
                return errors @ each

            diffusion = (weights * at) @ jax.lax.map(mean, t)
            last = jnp.asarray(EPS)
            constant = 0.5 * x_0.shape[1] * (math.log(2 * math.pi) - sde.log_snr(last))
            return {"total": diffusion + mean(last) + constant}

        prior = jax.vmap(lambda x: bound.prior_kl(sde, x))(x_0) @ each
        return {kind: prior + v["total"] for kind, v in each_kind(BOUNDED, of).items()}

    return bounds


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", INTEGRATED)
def test_every_bound_is_the_one_of_the_exact_score(name: str, kind: str) -> None:
    sde = SCHEDULES[name]
    if kind == "Gaussian":
        case = continuous.gaussian_case(sde)
        data = oracle.as_mixture(case.data)
    else:
        case = continuous.mixture_case(sde, np.linspace(-7.8, 7.8, 41))
        data = case.data
    # A table's rate has kinks at the levels, which 64 nodes do not see.
    # Lattices of a mixture are exact to 3e-7.
    tolerance = 1e-3 if name == "table" else 1e-7 if kind == "Gaussian" else 1e-6
    _, exact = continuous.expected_bound(case, sde, EPS)
    for prediction, found in _bounds(name)(data, case.points).items():
        assert float(found) == pytest.approx(exact, abs=tolerance), prediction


# Where the signal vanishes.


@pytest.mark.parametrize("name", VANISHING)
def test_the_velocity_of_pairs_is_regular_where_there_is_no_signal(name: str) -> None:
    """v = alpha' E[x_0] + sigma' z for x = sigma z, and the score that v tells is -z / sigma."""
    sde, t, z = SCHEDULES[name], jnp.asarray(1.0), jnp.array([0.3, -1.0, 2.0])
    data = oracle.gaussian(sde)
    mixture = oracle.as_mixture(data)
    alpha_slope = {"rectified_flow": -1.0, "cosine_vp": -math.pi / 2, "vanishing_pair": -2.0}[name]
    sigma, sigma_slope = {
        "rectified_flow": (1.0, 1.0),
        "cosine_vp": (1.0, 0.0),
        "vanishing_pair": (2.0, 2.0),
    }[name]
    for kind in DENOISED:
        score = from_prediction(ideal(kind, sde, mixture), kind, sde)
        v = jax.jit(lambda x, score=score: ode.velocity(score, sde, x, t))(sigma * z)
        expected = alpha_slope * np.asarray(data.mean) + sigma_slope * z
        np.testing.assert_allclose(v, expected, atol=1e-13)
        s = ode.score_of(v, score, sde, sigma * z, t)
        np.testing.assert_allclose(s, -z / sigma, atol=1e-13)
        x_0, noise = sampling.predictions(score, sde, sigma * z, t)
        np.testing.assert_allclose(x_0, data.mean, atol=1e-13)
        np.testing.assert_allclose(noise, z, atol=1e-13)


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_samples_from_noise_alone(kind: str) -> None:
    """The ODE to the data and back, by the front door, and every sampler."""
    sde = SCHEDULES["rectified_flow"]
    data = oracle.gaussian(sde)
    score = from_prediction(ideal(kind, sde, oracle.as_mixture(data)), kind, sde)
    z = np.random.default_rng(0).normal(size=(5, 3))
    density = Density(score, sde, (3,), eps=EPS, solver=ode.Solver(rtol=1e-8, atol=1e-8))
    first, last = jnp.asarray(EPS), jnp.asarray(1.0 if kind in DENOISED else sde.largest_time)
    stretch = 1.0 if kind in DENOISED else sde.stretch
    expected = [data.flow(jnp.asarray(row) / stretch, last, first) for row in z]
    x = density.decode(z)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(density.latent(x), z, atol=1e-6)
    for name in samplers.SAMPLERS if kind == "noise" else ("ddim", "dpm_solver"):
        made = samplers.SAMPLERS[name](**({} if name == "ode" else {"steps": 60}))
        draw = jax.jit(functools.partial(made, eps=EPS), static_argnums=1)
        x, stats = draw(score, sde, jnp.asarray(z[0]), jax.random.key(0))
        assert stats.success and np.isfinite(x).all(), name
        if name in ("ddim", "dpm_solver", "ode"):
            np.testing.assert_allclose(x, expected[0], atol=0.05, err_msg=name)
    path, at = samplers.ODE().path(score, sde, jnp.asarray(z[0]), None, eps=EPS, frames=4)
    assert path.shape == (4, 3) and at[0] == 1 and np.isfinite(path).all()


# The interface.


def test_parameters_and_the_sde_are_leaves() -> None:
    """A network that is a pytree is not compiled as a constant, and can be differentiated."""
    sde, x, t = SDES["vp"](), jnp.ones(2), jnp.asarray(0.3)
    net = jax.tree_util.Partial(lambda w, x, t: w * x, jnp.asarray(0.5))
    score = from_prediction(net, "velocity", sde)
    assert jax.tree.leaves(score) == [0.5, sde.beta_min, sde.beta_max, DATA_STD]
    gradient = jax.jit(jax.grad(lambda score: jnp.sum(score(x, t))))(score)
    # s = -(sigma x + alpha w x) / sigma for VP, where alpha^2 + sigma^2 = 1.
    expected = -2 * float(sde.mean_coef(t) / sde.std(t))
    assert float(gradient.network.args[0]) == pytest.approx(expected, rel=1e-12)
    assert jax.tree.leaves(from_prediction(jnp.multiply, "noise", SCHEDULES["pair"])) == [DATA_STD]


def test_a_network_of_batches_is_called_with_one() -> None:
    sde, x, t = SDES["vp"](), jnp.ones((2, 2)), jnp.asarray(0.3)
    one = from_prediction(lambda x, t: t * x, "noise", sde)
    many = from_prediction(lambda x, t: t[:, None, None] * x, "noise", sde, batched=True)
    np.testing.assert_allclose(one(x, t), many(x, t), rtol=1e-12)


def test_parameters_of_a_network_of_batches_have_gradients() -> None:
    net, x = jax.tree_util.Partial(lambda w, x, t: w * x, jnp.asarray(0.5)), jnp.ones(2)
    gradients = [
        jax.grad(lambda score: jnp.sum(score(x, jnp.asarray(0.3))))(
            from_prediction(net, "noise", SDES["vp"](), batched=batched)
        )
        for batched in (False, True)
    ]
    single, batched = map(jax.tree.leaves, gradients)
    np.testing.assert_allclose(batched, single, rtol=1e-12)
    assert len(single) == 4 and single[0] != 0


def test_what_cannot_be_is_refused() -> None:
    sde = SDES["vp"]()
    with pytest.raises(ValueError, match="unknown prediction 'v'; choose from noise, score, x0"):
        from_prediction(lambda x, t: x, "v", sde)
    with pytest.raises(ValueError, match="data_std=0.0"):
        from_prediction(lambda x, t: x, "edm", sde, data_std=0.0)
    for kind in ("noise", "flow"):
        with pytest.raises(ValueError, match=r"shape \(\) for an input of \(2,\)"):
            from_prediction(lambda x, t: t, kind, sde)(jnp.ones(2), jnp.asarray(0.5))
