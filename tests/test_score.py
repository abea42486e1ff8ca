"""From what a network predicts to a score: foreign networks and those of this package.

All kinds are compared with the exact score and its derivative, and those that need no division by
alpha also with E[x_0 | x_t] and E[z | x_t]. They see an SDE only through its coefficients, which
have tests of their own, and whether its signal vanishes. The ODE and the bound use these functions
only, so they are computed for two kinds each. What an ideal network predicts follows from the
data's E[x_0 | x_t] and E[z | x_t], which ``audit.oracle`` knows without a division by alpha.

For networks of this package, every parameterization and label is compared with a formula by hand.
"""

import functools
import math
from collections.abc import Callable

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, coefficients

from sbml import likelihood, losses, samplers
from sbml.audit import oracle
from sbml.core.types import Array, Key, batch_score
from sbml.density import Density
from sbml.dequantizers.decoders import Learned
from sbml.likelihood import bound, ode
from sbml.score import (
    FOREIGN,
    LABELS,
    LEVELS,
    PARAMETERIZATIONS,
    PREDICTIONS,
    Adapter,
    Network,
    NetworkScore,
    OfData,
    from_prediction,
    integers,
)
from sbml.score.divergence import Trace
from sbml.score.prediction import U
from sbml.sdes import SDE, SDES, VP, AlphaBarTable, RectifiedFlow, Schedule, times

pytestmark = pytest.mark.usefixtures("x64")

EPS, DATA_STD, D = 1e-2, 0.5, 3
# The kinds whose formula of x_0 does not divide by alpha.
DENOISED = ("x0", "velocity", "flow")

# One of each family, a discrete-time model's, and a pair of functions from which all else is
# derived, the signal of which vanishes.
SCHEDULES: dict[str, SDE] = {
    **{name: SDES[name]() for name in (*FAMILIES, "cosine_vp")},
    "table": AlphaBarTable(np.cumprod(1 - np.linspace(0.01, 0.9, 8))),
    "vanishing_pair": Schedule(lambda t: (1 - t) * (1 + t), lambda t: 2 * t),
}
# The ODE and the bound are computed for these schedules. Those of the others follow from the equal
# scores and the tests of ``likelihood`` and ``bound``.
INTEGRATED = ("table", "vanishing_pair")
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


def ideal(kind: str, sde: SDE, data: oracle.Mixture) -> Network:
    """What an ideal network predicts, by the definition of ``kind``."""

    def network(x: Array, t: Array) -> Array:
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        v = sigma**2 + (alpha * DATA_STD) ** 2
        x = x * jnp.sqrt(v) if PREDICTIONS[kind].foreign == U else x
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
            score = OneOf(FOREIGN, chosen, sde, data)

            def one(xt: tuple[Array, Array]) -> Array:
                return with_slope(lambda x: score(x, xt[1], None), xt[0])

            return {"found": jax.lax.map(one, (x, t))}

        def pair_of(chosen: Array) -> dict[str, Array]:
            score = OneOfPairs(DENOISED, chosen, sde, data)

            def one(xt: tuple[Array, Array], i: int) -> Array:
                return with_slope(lambda x: score.predictions(x, xt[1])[i], xt[0])

            return {
                of: jax.lax.map(functools.partial(one, i=i), (x, t))
                for i, of in enumerate(("x_0", "noise"))
            }

        found = {kind: values["found"] for kind, values in each_kind(FOREIGN, of).items()}
        exact = {
            of: jax.vmap(lambda x, t: with_slope(lambda x: moments(data, x, t)[i], x))(x, t)  # noqa: B023
            for i, of in enumerate(("x_0", "noise"))
        }
        slopes = jax.vmap(lambda x, t: with_slope(lambda x: data.score(x, t), x))(x, t)
        return {**found, "exact": slopes}, {**each_kind(DENOISED, pair_of), "exact": exact}

    return scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", [*FAMILIES, "vanishing_pair"])
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", INTEGRATED)
def test_every_likelihood_is_that_of_the_data(name: str, kind: str) -> None:
    """With p_T in the prior's place, the result is exactly log p_eps. Where the signal vanishes,
    p_T is the prior."""
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", INTEGRATED)
def test_every_bound_is_the_one_of_the_exact_score(name: str, kind: str) -> None:
    sde = SCHEDULES[name]
    if kind == "Gaussian":
        case = closed_forms.gaussian_case(sde)
        data = oracle.as_mixture(case.data)
    else:
        case = closed_forms.mixture_case(sde, np.linspace(-7.8, 7.8, 41))
        data = case.data
    # A table's rate has kinks at the levels, which 64 nodes do not see.
    # Lattices of a mixture are exact to 3e-7.
    tolerance = 1e-3 if name == "table" else 1e-7 if kind == "Gaussian" else 1e-6
    _, exact = closed_forms.expected_bound(case, sde, EPS)
    for prediction, found in _bounds(name)(data, case.points).items():
        assert float(found) == pytest.approx(exact, abs=tolerance), prediction


# Where the signal vanishes.


@pytest.mark.parametrize("name", VANISHING)
def test_the_velocity_of_pairs_is_regular_where_there_is_no_signal(name: str) -> None:
    """v = alpha' E[x_0] + sigma' z for x = sigma z, and the score computed from v is -z / sigma."""
    sde, t, z = SCHEDULES[name], np.array(1.0), np.array([0.3, -1.0, 2.0])
    data = oracle.gaussian(sde)
    mixture = oracle.as_mixture(data)
    alpha_slope = {"rectified_flow": -1.0, "cosine_vp": -math.pi / 2, "vanishing_pair": -2.0}[name]
    sigma, sigma_slope = {
        "rectified_flow": (1.0, 1.0),
        "cosine_vp": (1.0, 0.0),
        "vanishing_pair": (2.0, 2.0),
    }[name]

    @jax.jit
    def found(x: Array) -> dict[str, tuple[Array, ...]]:
        scores = {kind: from_prediction(ideal(kind, sde, mixture), kind, sde) for kind in DENOISED}
        v = {kind: ode.velocity(score, sde, x, t) for kind, score in scores.items()}
        return {
            kind: (
                v[kind],
                ode.score_of(v[kind], score, sde, x, t),
                *samplers.predictions(score, sde, x, t),
            )
            for kind, score in scores.items()
        }

    expected = alpha_slope * np.asarray(data.mean) + sigma_slope * z
    for v, s, x_0, noise in found(sigma * z).values():
        np.testing.assert_allclose(v, expected, atol=1e-13)
        np.testing.assert_allclose(s, -z / sigma, atol=1e-13)
        np.testing.assert_allclose(x_0, data.mean, atol=1e-13)
        np.testing.assert_allclose(noise, z, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_samples_from_noise_alone(kind: str) -> None:
    """By the ODE to the data and back, with ``Density``, and by the samplers that use a pair."""
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
    for name in ("ddim", "dpm_solver") if kind in DENOISED else ():
        draw = jax.jit(
            functools.partial(samplers.SAMPLERS[name](steps=60), eps=EPS), static_argnums=1
        )
        x, stats = draw(score, sde, jnp.asarray(z[0]), jax.random.key(0))
        assert stats.success
        np.testing.assert_allclose(x, expected[0], atol=0.05, err_msg=name)
    path, at = samplers.ODE().path(score, sde, jnp.asarray(z[0]), None, eps=EPS, frames=4)
    assert path.shape == (4, 3) and at[0] == 1 and np.isfinite(path).all()


# The interface of ``from_prediction``.


def test_parameters_and_the_sde_are_leaves() -> None:
    """A network that is a pytree is not compiled as a constant, and can be differentiated."""
    sde, x, t = SDES["vp"](), np.ones(2), np.array(0.3)
    net = jax.tree_util.Partial(lambda w, x, t: w * x, jnp.asarray(0.5))
    score = from_prediction(net, "velocity", sde)
    assert jax.tree.leaves(score) == [0.5, sde.beta_min, sde.beta_max, DATA_STD]
    gradient = jax.jit(jax.grad(lambda score: jnp.sum(score(x, t))))(score)
    # s = -(sigma x + alpha w x) / sigma for VP, where alpha^2 + sigma^2 = 1.
    alpha, sigma, _ = coefficients(sde, t)
    expected = -2 * float(alpha) / float(sigma)
    assert float(gradient.how.network.args[0]) == pytest.approx(expected, rel=1e-12)
    assert jax.tree.leaves(from_prediction(jnp.multiply, "noise", SCHEDULES["vanishing_pair"])) == [
        DATA_STD
    ]


def test_a_network_of_batches_is_called_with_one() -> None:
    sde, x, t = SDES["vp"](), np.ones((2, 2)), np.array(0.3)
    one = from_prediction(lambda x, t: t * x, "noise", sde)
    many = from_prediction(lambda x, t: t[:, None, None] * x, "noise", sde, batched=True)
    found, expected = jax.jit(lambda x, t: (many(x, t), one(x, t)))(x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_batched_network_without_batched_is_an_error() -> None:
    score = from_prediction(lambda x, t: t[:, None] * x, "noise", SDES["vp"]())
    with pytest.raises(ValueError, match=r"shape \(2,\).*from_prediction\(..., batched=True\)"):
        score(jnp.ones(2), jnp.asarray(0.3))
    broken = from_prediction(lambda x, t: x @ jnp.ones((3, 3)), "noise", SDES["vp"]())
    with pytest.raises(TypeError, match="dot_general"):  # the network's own error
        broken(jnp.ones(2), jnp.asarray(0.3))


def test_parameters_of_a_network_of_batches_have_gradients() -> None:
    net, x = jax.tree_util.Partial(lambda w, x, t: w * x, jnp.asarray(0.5)), np.ones(2)
    gradient = jax.jit(jax.grad(lambda score: jnp.sum(score(x, np.array(0.3)))))
    gradients = [
        gradient(from_prediction(net, "noise", SDES["vp"](), batched=batched))
        for batched in (False, True)
    ]
    single, batched = map(jax.tree.leaves, gradients)
    np.testing.assert_allclose(batched, single, rtol=1e-12)
    assert len(single) == 4 and single[0] != 0


# Networks of this package.

SHAPE = (2, 2, 1)
T = np.array([1e-4, 0.1, 0.5, 0.99])  # At 1 some SDEs have no signal, and no finite label.
X = np.random.default_rng(0).normal(size=(4, *SHAPE))


class Net(nn.Module):
    """F = w x + b label, with optional dropout: small enough to work out by hand."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, label: Array, *, train: bool) -> Array:
        w = self.param("w", nn.initializers.constant(0.7), ())
        b = self.param("b", nn.initializers.constant(0.01), ())
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return w * x + b * label.reshape(-1, 1, 1, 1)


class Wrong(nn.Module):
    """A network whose result has the wrong shape, (n, 1, 1, 1)."""

    @nn.compact
    def __call__(self, x: Array, label: Array, *, train: bool) -> Array:
        return label.reshape(-1, 1, 1, 1)


PARAMS = {"w": np.array(0.7), "b": np.array(0.01)}


@pytest.fixture(params=FAMILIES, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


def by_hand(sde: SDE, parameterization: str, label: str) -> np.ndarray:
    alpha, sigma, log_snr = map(np.asarray, coefficients(sde, T))
    at_eps = float(coefficients(sde, np.array(1e-5))[2])
    scaled = 1000 * (13.3 - log_snr) / 18.3
    told = {"time": 999 * T, "log_snr": at_eps - log_snr, "sigma": sigma, "scaled_log_snr": scaled}
    told = {**told, "c_noise": np.log(sigma / alpha) / 4}[label]
    told = told.reshape(-1, 1, 1, 1)
    alpha, sigma = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    if parameterization == "noise":
        return -(0.7 * X + 0.01 * told) / sigma
    if parameterization == "scaled_score":
        return (0.7 * X + 0.01 * told) / sigma
    if parameterization == "score":
        return 0.7 * X + 0.01 * told
    if parameterization == "residual":
        return -(X + 0.7 * X + 0.01 * told) / sigma
    if parameterization == "flow":
        return -(X + alpha * (0.7 * X + 0.01 * told)) / (alpha + sigma) / sigma
    variance = alpha**2 * 0.5**2 + sigma**2
    network = 0.7 * X / np.sqrt(variance) + 0.01 * told
    if parameterization == "x0":
        return -(X - alpha * network) / sigma**2
    if parameterization == "velocity":
        return -(sigma * X + alpha * network) / (alpha**2 + sigma**2) / sigma
    if parameterization == "edm":  # D = c_skip y + c_out F of y = x_t / alpha, with rho
        y, rho = X / alpha, sigma / alpha
        skip = 0.25 / (rho**2 + 0.25)
        return -(y - skip * y - rho * 0.5 / np.sqrt(rho**2 + 0.25) * network) / rho / sigma
    return -(sigma / variance * X + alpha * 0.5 / np.sqrt(variance) * network) / sigma


def test_scores_by_hand(sde: SDE) -> None:
    cases = [
        *((p, "log_snr") for p in sorted(set(PARAMETERIZATIONS) - {LEVELS})),
        *(("preconditioned", label) for label in LABELS if label != "log_snr"),
    ]
    scores = [Adapter(Net(), sde, *case)(PARAMS) for case in cases]
    values = jax.jit(lambda x, t: [score.batch(x, t, None) for score in scores])(X, T)
    for value, case in zip(values, cases, strict=True):
        np.testing.assert_allclose(value, by_hand(sde, *case), rtol=1e-10, err_msg=str(case))


class Logits(nn.Module):
    """Logits of ``outputs`` levels that depend on both inputs of the network."""

    outputs: int = 0

    @nn.compact
    def __call__(self, x: Array, label: Array, *, train: bool) -> Array:
        each = jnp.arange(self.outputs, dtype=x.dtype).reshape((1,) * x.ndim + (-1,))
        return jnp.sin(each * x[..., None] + 0.01 * label.reshape(-1, 1, 1, 1, 1))


@pytest.mark.parametrize("data", ["centre", "uniform"])
def test_an_integer_denoisers_score_is_bayes_rule(data: str) -> None:
    """The formula of ``sbml.integers`` at what the network sees, x / sqrt(v) and the label."""
    sde = VP()
    adapter = Adapter(
        Logits(5), sde, "levels", "log_snr", data_std=0.7, levels=5, data=data, eps=1e-5
    )
    posterior_mean = jax.jit(integers.posterior_mean, static_argnums=(3, 4))
    found = jax.jit(adapter({}).batch)(X[:3], T[:3], None)
    for x, at, score in zip(X[:3], T[:3], np.asarray(found), strict=True):
        alpha, sigma, log_snr = map(np.asarray, coefficients(sde, at))
        label = np.asarray(coefficients(sde, np.array(1e-5))[2]) - log_snr
        seen = x / np.hypot(0.7 * alpha, sigma)
        out = np.sin(np.arange(5) * seen[..., None] + 0.01 * label)
        x_0 = posterior_mean(out, x / alpha, sigma / alpha, 5, data)
        np.testing.assert_allclose(score, (alpha * x_0 - x) / sigma**2, rtol=1e-9)


def test_only_an_integer_denoiser_of_bin_centres_decodes() -> None:
    t, y, k = np.array(0.01), X[0], np.zeros(SHAPE, int)
    options = {"levels": 5, "data_std": 0.7}
    score = Adapter(Logits(5), VP(), "levels", data="centre", **options)({})
    assert float(jax.jit(score.decoder_nats)(y, t, k)) > 0
    for other in (
        Adapter(Logits(5), VP(), "levels", data="uniform", **options)({}),
        Adapter(Net(), VP())(PARAMS),
    ):
        assert other.decoder_nats is other.decoder_log_p is None
        with pytest.raises(ValueError, match="has no learned decoder, .*: train with"):
            Learned().noise(other, 5)
    with pytest.raises(ValueError, match="Net has no field outputs"):
        Adapter(Net(), VP(), "levels", levels=5)
    with pytest.raises(ValueError, match="levels is 0:.* give an integer of at least 2"):
        Adapter(Logits(5), VP(), "levels")


# Networks of this package where the signal vanishes.


class Ideal(nn.Module):
    """The ideal network for Gaussian data: its inputs are x_t / sqrt(v) and a label of the time."""

    sde: SDE
    kind: str
    label: str

    @nn.compact
    def __call__(self, u: Array, label: Array, *, train: bool) -> Array:
        if self.label == "time":
            t = label / 999
        else:
            t = self.sde.time(self.sde.log_snr(jnp.asarray(EPS)) - label)
        x = u * jnp.hypot(self.sde.mean_coef(t) * DATA_STD, self.sde.std(t))[:, None]
        data = oracle.as_mixture(oracle.gaussian(self.sde))
        f = jax.vmap(ideal(self.kind, self.sde, data))(x, t)
        return self.param("scale", nn.initializers.ones, ()) * f


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("rectified_flow", "velocity", "time"),
        ("cosine_vp", "x0", "log_snr"),
    ],
)
def test_a_network_of_this_package_has_the_ode_of_the_same_foreign_one(
    name: str, kind: str, label: str
) -> None:
    """It is compared from the data to the end, where the signal vanishes, and back."""
    sde, x = SDES[name](), jnp.array([0.4, 0.0, 0.1])
    adapter = Adapter(Ideal(sde, kind, label), sde, kind, label, data_std=DATA_STD, eps=EPS)
    exact = ideal(kind, sde, oracle.as_mixture(oracle.gaussian(sde)))

    def same(x: Array, t: Array) -> Array:
        """The labels of log-SNR are constant from the largest time on; the scale of u is not."""
        told = t if label == "time" else jnp.minimum(t, sde.largest_time)
        after, before = (jnp.hypot(DATA_STD * sde.mean_coef(s), sde.std(s)) for s in (told, t))
        return exact(x * after / before, told)

    scores = adapter(adapter.init(jax.random.key(0), (3,))), from_prediction(same, kind, sde)

    @jax.jit
    def solved(x: Array) -> list[tuple[Array, Array, Array]]:
        how = {"eps": EPS, "solver": ode.Solver("heun", fixed_steps=5)}
        found = [likelihood.ode_logp(s, sde, x, None, trace=Trace("exact"), **how) for s in scores]
        samples = [samplers.decode(s, sde, x, **how)[0] for s in scores]
        return [(f.logp, f.z, sample) for f, sample in zip(found, samples, strict=True)]

    for ours, theirs in zip(*solved(x), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_which_networks_have_two_predictions() -> None:
    """Those of x0, velocity and flow where the signal vanishes; elsewhere the score is enough."""
    for kind in set(PARAMETERIZATIONS) - {LEVELS}:
        for sde in (SDES["rectified_flow"](), VP(), VP().levels(50)):
            score = Adapter(Net(), sde, kind, eps=1e-3)(PARAMS)
            both = kind in DENOISED and isinstance(sde, RectifiedFlow)
            assert (score.predictions is not None) == both


def test_one_example_is_a_batch_of_one(sde: SDE) -> None:
    score = Adapter(Net(), sde, "preconditioned", "log_snr")(PARAMS)
    one_by_one = jax.jit(jax.vmap(lambda x, t: score(x, t, None)))(X, T)
    np.testing.assert_allclose(one_by_one, jax.jit(score.batch)(X, T, None), 1e-12)


@pytest.mark.oracle
def test_a_preconditioned_zero_network_is_the_score_of_white_data(sde: SDE) -> None:
    """F = 0 is exact for x_0 ~ N(0, data_std^2 I), at every noise level."""
    zero = jax.tree.map(np.zeros_like, PARAMS)
    score = Adapter(Net(), sde, "preconditioned", data_std=0.3)(zero)
    white = oracle.Gaussian(sde, np.zeros(4), np.full(4, 0.3**2), np.eye(4))
    expected = jax.jit(jax.vmap(white.score))(X, T)
    np.testing.assert_allclose(jax.jit(score.batch)(X, T, None), expected, rtol=1e-10)


@pytest.mark.oracle
def test_a_preconditioned_network_sees_and_predicts_unit_variance(sde: SDE) -> None:
    """For white data: Var(c_in x_t) = 1, and Var(z - c_skip x_t) = c_out^2, the target's scale."""
    adapter, one = Adapter(Net(), sde, "preconditioned"), np.ones((len(T), 1))
    alpha, sigma, _ = map(np.asarray, coefficients(sde, T))
    noise = jax.jit(
        lambda *a: PREDICTIONS["preconditioned"].noise(
            *a, alpha[:, None], sigma[:, None], OfData(0.5)
        )
    )
    c_in, c_skip, c_out = (
        np.asarray(c)[:, 0]
        for c in (
            jax.jit(adapter.network_input)(one, T),
            noise(0 * one, one),
            noise(one, 0 * one),
        )
    )
    variance = alpha**2 * 0.25 + sigma**2
    np.testing.assert_allclose(c_in**2 * variance, 1, rtol=1e-12)
    # Cov(z, x_t) = sigma.
    target = 1 - 2 * c_skip * sigma + c_skip**2 * variance
    np.testing.assert_allclose(c_out**2, target, rtol=1e-6, atol=1e-12)


def test_the_log_snr_label_is_the_decrease_of_the_log_snr(sde: SDE) -> None:
    """It grows from 0 at eps to the normaliser of the importance distribution at T."""
    label = Adapter(Net(), sde, label="log_snr", eps=1e-3).time_label
    importance, u = times.Importance(sde, 1e-3), np.linspace(0, 1 - 2.0**-53, 20)

    @jax.jit
    def found(ends: Array, u: Array) -> tuple[Array, ...]:
        return label(ends), label(importance.at(u)[0]), jnp.asarray(importance.normaliser)

    at_ends, inside, normaliser = found(np.array([1e-3, sde.largest_time]), u)
    np.testing.assert_allclose(at_ends, [0, normaliser], atol=1e-9)
    np.testing.assert_allclose(inside, float(normaliser) * u, atol=1e-6)


@pytest.mark.parametrize("label", sorted(set(LABELS) - {"sigma"}))
def test_labels_are_finite_where_the_signal_has_vanished(label: str) -> None:
    sde = RectifiedFlow()
    labels = Adapter(Net(), sde, "velocity", label).time_label(jnp.asarray([0.5, 0.9999, 1.0]))
    assert np.isfinite(labels).all() and labels[0] < labels[1] <= labels[2]


def test_the_ends_of_the_scaled_label_are_those_of_the_adapter() -> None:
    """They may differ from those of the process. The label is 1000 at l_0 and 0 at l_1."""
    label = Adapter(Net(), VP(), label="scaled_log_snr", log_snr_range=(-4.0, 6.0)).time_label
    told = jax.jit(lambda log_snr: label(VP().time(log_snr)))(np.array([-4.0, 1.0, 6.0, 8.0]))
    np.testing.assert_allclose(told, [1000, 500, 0, -200], atol=1e-9)


def test_one_class_holds_for_every_example_of_a_batch() -> None:
    class Conditional(nn.Module):
        @nn.compact
        def __call__(self, x: Array, label: Array, *, train: bool, condition: Array) -> Array:
            return x * condition.reshape(-1, 1, 1, 1)

    sde = VP()
    score = Adapter(Conditional(), sde)({}, jnp.asarray(3.0))
    expected = -3 * X / np.asarray(coefficients(sde, T)[1]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(jax.jit(score.batch)(X, T, None), expected, rtol=1e-12)
    each = jax.jit(jax.vmap(lambda c, x, t: Adapter(Conditional(), sde)({}, c)(x, t, None)))
    classes = np.arange(4.0)
    found = each(classes, X, T)
    np.testing.assert_allclose(found, expected / 3 * classes.reshape(-1, 1, 1, 1), rtol=1e-12)


def test_init_gives_the_networks_parameters() -> None:
    params = jax.jit(Adapter(Net(), VP()).init, static_argnums=1)(jax.random.key(0), SHAPE)
    assert jax.tree.map(float, params) == pytest.approx({"w": 0.7, "b": 0.01})


def test_a_key_turns_dropout_on() -> None:
    batch = jax.jit(Adapter(Net(dropout=0.5), VP())(PARAMS).batch)
    x, t = np.ones((1, 64, 64, 1)), np.array([0.5])
    plain = np.asarray(batch(x, t, None))
    np.testing.assert_array_equal(plain, batch(x, t, None))
    first, again, second = (np.asarray(batch(x, t, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != second)
    label = -0.01 * 499.5 / float(coefficients(VP(), t[0])[1])
    dropped = np.isclose(first, label)
    assert np.mean(dropped) == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(first[~dropped] - label, 2 * (plain[~dropped] - label), rtol=1e-10)


def test_parameters_are_arguments_under_jit_and_grad() -> None:
    """The score is a pytree: one compiled loss serves all parameters, and has gradients in them."""
    traces = []

    @jax.jit
    def loss(score: NetworkScore, key: Key) -> Array:
        traces.append(1)
        return losses.dsm(score, VP(), X[0], np.array(0.5), key)

    adapter, key = Adapter(Net(), VP()), jax.random.key(0)
    at = [float(loss(adapter(PARAMS | {"b": np.array(b)}), key)) for b in (0.0, 1.0, 2.0)]
    assert len(traces) == 1
    gradient = jax.jit(jax.grad(loss))(adapter(PARAMS | {"b": np.array(1.0)}), key).params["b"]
    np.testing.assert_allclose(gradient, (at[2] - at[0]) / 2, rtol=1e-9)


def test_a_plain_function_is_batched_by_vmap() -> None:
    def score(x: Array, t: Array, key: Key | None) -> Array:
        noise = 0.0 if key is None else jax.random.normal(key, x.shape)
        return -x / t + noise

    @jax.jit
    def all_of(x: Array, t: Array, key: Key) -> tuple[Array, Array, Array]:
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(jax.random.split(key, 4))
        return batch_score(score)(x, t, None), batch_score(score)(x, t, key), noise

    plain, noisy, noise = map(np.asarray, all_of(X, T, jax.random.key(3)))
    np.testing.assert_allclose(plain, -X / T.reshape(-1, 1, 1, 1))
    np.testing.assert_allclose(noisy - plain, noise, atol=1e-9)


def test_a_score_with_a_batch_form_uses_it() -> None:
    score = Adapter(Net(), VP())(PARAMS)
    found, expected = jax.jit(
        lambda x, t: (batch_score(score)(x, t, None), score.batch(x, t, None))
    )(X, T)
    np.testing.assert_array_equal(found, expected)


def test_a_network_of_the_wrong_shape_is_refused() -> None:
    """(4, 1, 1, 1) would broadcast against (4, 2, 2, 1), and the loss would not show it."""
    with pytest.raises(ValueError, match=r"\(4, 1, 1, 1\).*\(4, 2, 2, 1\)"):
        Adapter(Wrong(), VP())({}).batch(jnp.asarray(X), jnp.asarray(T), None)
