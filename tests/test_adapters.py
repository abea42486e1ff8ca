"""From network to score: every parameterization and label against a formula by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from sbml import integers, losses, predictions, times
from sbml.adapters import LABELS, LEVELS, PARAMETERIZATIONS, Adapter, LinenScore
from sbml.sdes import SDE, SDES, VP
from sbml.types import Array, Key, batch_score
from sbml.verify import oracle

pytestmark = pytest.mark.usefixtures("x64")

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
    """A network that answers with one channel less a dimension: (n, 1, 1, 1)."""

    @nn.compact
    def __call__(self, x: Array, label: Array, *, train: bool) -> Array:
        return label.reshape(-1, 1, 1, 1)


PARAMS = {"w": np.array(0.7), "b": np.array(0.01)}


@pytest.fixture(params=FAMILIES, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


def by_hand(sde: SDE, parameterization: str, label: str) -> np.ndarray:
    t = jnp.asarray(T)
    alpha, sigma, log_snr = (np.asarray(f(t)) for f in (sde.mean_coef, sde.std, sde.log_snr))
    at_eps = float(sde.log_snr(jnp.asarray(1e-5)))
    scaled = 1000 * (13.3 - log_snr) / 18.3
    told = {"time": 999 * T, "log_snr": at_eps - log_snr, "sigma": sigma, "scaled_log_snr": scaled}
    told = told[label]
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
    variance = alpha**2 * 0.5**2 + sigma**2
    network = 0.7 * X / np.sqrt(variance) + 0.01 * told
    if parameterization == "x0":
        return -(X - alpha * network) / sigma**2
    if parameterization == "velocity":
        return -(sigma * X + alpha * network) / (alpha**2 + sigma**2) / sigma
    return -(sigma / variance * X + alpha * 0.5 / np.sqrt(variance) * network) / sigma


@pytest.mark.parametrize(
    ("parameterization", "label"),
    [
        *((p, "log_snr") for p in sorted(set(PARAMETERIZATIONS) - {LEVELS})),
        *(("preconditioned", label) for label in LABELS if label != "log_snr"),
    ],
)
def test_scores_by_hand(sde: SDE, parameterization: str, label: str) -> None:
    score = Adapter(Net(), sde, parameterization, label)(PARAMS)
    values = jax.jit(score.batch)(X, T, None)
    np.testing.assert_allclose(values, by_hand(sde, parameterization, label), rtol=1e-10)


class Logits(nn.Module):
    """Logits of ``outputs`` levels that tell what the network sees."""

    outputs: int = 0

    @nn.compact
    def __call__(self, x: Array, label: Array, *, train: bool) -> Array:
        each = jnp.arange(self.outputs, dtype=x.dtype).reshape((1,) * x.ndim + (-1,))
        return jnp.sin(each * x[..., None] + 0.01 * label.reshape(-1, 1, 1, 1, 1))


@pytest.mark.parametrize("data", ["centre", "uniform"])
def test_an_integer_denoisers_score_is_bayes_rule(data: str) -> None:
    """The formula of ``sbml.integers`` at what the network sees, x / sqrt(v) and the label."""
    sde, t = VP(), jnp.asarray(T[:3])
    adapter = Adapter(
        Logits(5), sde, "levels", "log_snr", data_std=0.7, levels=5, data=data, eps=1e-5
    )
    found = adapter({}).batch(jnp.asarray(X[:3]), t, None)
    for x, at, score in zip(X[:3], T[:3], found, strict=True):
        alpha, sigma = (float(f(jnp.asarray(at))) for f in (sde.mean_coef, sde.std))
        label = float(sde.log_snr(jnp.asarray(1e-5)) - sde.log_snr(jnp.asarray(at)))
        seen = x / np.hypot(0.7 * alpha, sigma)
        out = np.sin(np.arange(5) * seen[..., None] + 0.01 * label)
        y, rho = jnp.asarray(x / alpha), jnp.asarray(sigma / alpha)
        x_0 = integers.posterior_mean(jnp.asarray(out), y, rho, 5, data)
        np.testing.assert_allclose(score, (alpha * x_0 - x) / sigma**2, rtol=1e-9)


def test_only_an_integer_denoiser_of_bin_centres_decodes() -> None:
    t, y, k = jnp.asarray(0.01), jnp.asarray(X[0]), jnp.zeros(SHAPE, int)
    options = {"levels": 5, "data_std": 0.7}
    score = Adapter(Logits(5), VP(), "levels", data="centre", **options)({})
    assert score.decoder_nats(y, t, k) > 0
    for other in (
        Adapter(Logits(5), VP(), "levels", data="uniform", **options)({}),
        Adapter(Net(), VP())(PARAMS),
    ):
        with pytest.raises(ValueError, match="has no learned decoder: train with"):
            other.decoder_nats(y, t, k)
    with pytest.raises(ValueError, match="Net has no field outputs"):
        Adapter(Net(), VP(), "levels", levels=5)
    with pytest.raises(ValueError, match="levels=0"):
        Adapter(Logits(5), VP(), "levels")


def test_one_example_is_a_batch_of_one(sde: SDE) -> None:
    score = Adapter(Net(), sde, "preconditioned", "log_snr")(PARAMS)
    one_by_one = jax.jit(jax.vmap(lambda x, t: score(x, t, None)))(X, T)
    np.testing.assert_allclose(one_by_one, score.batch(jnp.asarray(X), jnp.asarray(T), None), 1e-12)


@pytest.mark.oracle
def test_a_preconditioned_zero_network_is_the_score_of_white_data(sde: SDE) -> None:
    """F = 0 is exact for x_0 ~ N(0, data_std^2 I), at every noise level."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    score = Adapter(Net(), sde, "preconditioned", data_std=0.3)(zero)
    white = oracle.Gaussian(sde, jnp.zeros(4), jnp.full(4, 0.3**2), jnp.eye(4))
    expected = jax.jit(jax.vmap(white.score))(X, T)
    np.testing.assert_allclose(jax.jit(score.batch)(X, T, None), expected, rtol=1e-10)


@pytest.mark.oracle
def test_a_preconditioned_network_sees_and_predicts_unit_variance(sde: SDE) -> None:
    """For white data: Var(c_in x_t) = 1, and Var(z - c_skip x_t) = c_out^2, the target's scale."""
    adapter, t, one = Adapter(Net(), sde, "preconditioned"), jnp.asarray(T), jnp.ones((len(T), 1))
    c_in, c_skip, c_out = (
        np.asarray(c)[:, 0]
        for c in (
            adapter.network_input(one, t),
            adapter.noise(0 * one, one, t),
            adapter.noise(one, 0 * one, t),
        )
    )
    alpha, sigma = np.asarray(sde.mean_coef(jnp.asarray(T))), np.asarray(sde.std(jnp.asarray(T)))
    variance = alpha**2 * 0.25 + sigma**2
    np.testing.assert_allclose(c_in**2 * variance, 1, rtol=1e-12)
    # Cov(z, x_t) = sigma.
    target = 1 - 2 * c_skip * sigma + c_skip**2 * variance
    np.testing.assert_allclose(c_out**2, target, rtol=1e-6, atol=1e-12)


def test_the_log_snr_label_is_a_unit_speed_clock_of_the_log_snr(sde: SDE) -> None:
    """From 0 at eps to the normaliser of the importance distribution at T."""
    label = Adapter(Net(), sde, label="log_snr", eps=1e-3).time_label
    normaliser = times.Importance(sde, 1e-3).normaliser
    ends = jnp.asarray([1e-3, sde.largest_time])
    np.testing.assert_allclose(label(ends), [0, normaliser], atol=1e-9)
    u = jnp.linspace(0, 1 - 2.0**-53, 20)
    np.testing.assert_allclose(
        label(times.Importance(sde, 1e-3).at(u)[0]), normaliser * u, atol=1e-6
    )


def test_the_ends_of_the_scaled_label_are_the_adapters() -> None:
    """They need not be those of the process: the network is told 1000 at l_0 and 0 at l_1."""
    label = Adapter(Net(), VP(), label="scaled_log_snr", log_snr_range=(-4.0, 6.0)).time_label
    told = label(VP().time(jnp.asarray([-4.0, 1.0, 6.0, 8.0])))
    np.testing.assert_allclose(told, [1000, 500, 0, -200], atol=1e-9)


def test_a_class_is_told_to_every_example_of_a_batch() -> None:
    class Conditional(nn.Module):
        @nn.compact
        def __call__(self, x: Array, label: Array, *, train: bool, condition: Array) -> Array:
            return x * condition.reshape(-1, 1, 1, 1)

    sde, x, t = VP(), jnp.asarray(X), jnp.asarray(T)
    score = Adapter(Conditional(), sde)({}, jnp.asarray(3.0))
    expected = -3 * X / np.asarray(sde.std(t)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(score.batch(x, t, None), expected, rtol=1e-12)
    each = jax.vmap(lambda c, x, t: Adapter(Conditional(), sde)({}, c)(x, t, None))
    classes = np.arange(4.0)
    found = each(jnp.asarray(classes), x, t)
    np.testing.assert_allclose(found, expected / 3 * classes.reshape(-1, 1, 1, 1), rtol=1e-12)


def test_init_gives_the_networks_parameters() -> None:
    params = Adapter(Net(), VP()).init(jax.random.key(0), SHAPE)
    assert jax.tree.map(float, params) == pytest.approx({"w": 0.7, "b": 0.01})


def test_a_key_turns_dropout_on() -> None:
    score = Adapter(Net(dropout=0.5), VP())(PARAMS)
    x, t = jnp.ones((1, 64, 64, 1)), jnp.asarray([0.5])
    plain = score.batch(x, t, None)
    np.testing.assert_array_equal(plain, score.batch(x, t, None))
    first, again, second = (score.batch(x, t, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != second)
    label = -0.01 * 499.5 / VP().std(t[0])
    dropped = np.isclose(first, label)
    assert np.mean(dropped) == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(first[~dropped] - label, 2 * (plain[~dropped] - label), rtol=1e-10)


def test_parameters_are_arguments_under_jit_and_grad() -> None:
    """The score is a pytree: one compiled loss serves all parameters and differentiates in them."""
    traces = []

    @jax.jit
    def loss(score: LinenScore, key: Key) -> Array:
        traces.append(1)
        return losses.dsm(score, VP(), jnp.asarray(X[0]), jnp.asarray(0.5), key)

    adapter, key = Adapter(Net(), VP()), jax.random.key(0)
    at = [float(loss(adapter(PARAMS | {"b": jnp.asarray(b)}), key)) for b in (0.0, 1.0, 2.0)]
    assert len(traces) == 1
    gradient = jax.grad(loss)(adapter(PARAMS | {"b": jnp.asarray(1.0)}), key).params["b"]
    np.testing.assert_allclose(gradient, (at[2] - at[0]) / 2, rtol=1e-9)


def test_a_plain_function_is_batched_by_vmap() -> None:
    def score(x: Array, t: Array, key: Key | None) -> Array:
        noise = 0.0 if key is None else jax.random.normal(key, x.shape)
        return -x / t + noise

    x, t, key = jnp.asarray(X), jnp.asarray(T), jax.random.key(3)
    np.testing.assert_allclose(batch_score(score)(x, t, None), -X / T.reshape(-1, 1, 1, 1))
    noise = batch_score(score)(x, t, key) - batch_score(score)(x, t, None)
    expected = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(jax.random.split(key, 4))
    np.testing.assert_allclose(noise, expected, atol=1e-9)


def test_a_score_with_a_batch_form_uses_it() -> None:
    score = Adapter(Net(), VP())(PARAMS)
    x, t = jnp.asarray(X), jnp.asarray(T)
    np.testing.assert_array_equal(batch_score(score)(x, t, None), score.batch(x, t, None))


def test_a_network_of_the_wrong_shape_is_refused() -> None:
    """(4, 1, 1, 1) would broadcast against (4, 2, 2, 1), and the loss could no longer tell."""
    with pytest.raises(ValueError, match=r"\(4, 1, 1, 1\).*\(4, 2, 2, 1\)"):
        Adapter(Wrong(), VP())({}).batch(jnp.asarray(X), jnp.asarray(T), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "speed"}, "unknown parameterization 'speed'"),
        ({"label": "beta"}, "unknown time label 'beta'"),
        ({"data_std": 0.0}, "data_std=0.0"),
        ({"data_std": float("nan")}, "data_std=nan"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"log_snr_range": (5.0, 5.0)}, r"log_snr_range=\(5.0, 5.0\)"),
    ],
)
def test_impossible_adapters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(Net(), VP(), **arguments)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_standard_deviation_that_cannot_be(bad: float) -> None:
    """An infinite one gives infinite scores, and a training that lowering its rate cannot save."""
    message = f"data_std={bad}: must be positive and finite"
    with pytest.raises(ValueError, match=message):
        Adapter(Net(), VP(), data_std=bad)
    with pytest.raises(ValueError, match=message):
        predictions.from_prediction(lambda x, t: x, "edm", VP(), data_std=bad)
