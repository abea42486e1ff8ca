"""The second-order loss has its minimum at the true score, where the ODE's likelihood is right.

Expectations are exact: quadratures over x_0 and z, and means over all signs of the probes.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from families import FAMILIES_VE_SLOW

from sbml import losses, second_order
from sbml.audit.oracle import coefficients
from sbml.core.streams import stream
from sbml.core.types import Array, Key, Score
from sbml.sdes import SDE, SDES, VP

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.oracle]

T = np.asarray(0.3)  # of NumPy, so it is float64 even before the tests enable float64 in JAX
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
VARIANCE = 0.6  # of one-dimensional data


# The losses see an SDE only through its coefficients.
@pytest.fixture(params=FAMILIES_VE_SLOW, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


def expected(f: Callable[[Array, Array], Array], std: float = VARIANCE**0.5) -> Array:
    """E f(x_0, z) for x_0 ~ N(0, std^2) and z ~ N(0, 1), each of shape (1,)."""
    x, z = (g.reshape(-1, 1) for g in np.meshgrid(std * NODES, NODES))
    return np.outer(WEIGHTS, WEIGHTS).ravel() @ jax.vmap(f)(x, z)


def residual(score: Score, sde: SDE, x: Array, z: Array, t: Array) -> Array:
    """r with the exact divergence, a scalar."""
    x_t = losses.perturb(sde, x, t, z)
    s, jacobian = score(x_t, t, None), jax.jacfwd(lambda x: score(x, t, None))(x_t)
    return second_order.residuals(sde, s, jnp.trace(jacobian)[None], t, z)[0]


def linear(sde: SDE, variance: Array | float) -> Score:
    """The score of N(0, variance)."""
    return lambda x, t, key: -x / (sde.mean_coef(t) ** 2 * variance + sde.std(t) ** 2)


def test_the_residual_of_the_true_score_has_mean_0_given_x_t(sde: SDE) -> None:
    """E[r x_t^k] is 0 for k = 0 to 3. The mean of r^2 is 2 Cov[z | x_t]^2."""
    score = linear(sde, VARIANCE)

    @jax.jit
    def moments(t: Array) -> tuple[Array, Array]:
        v = sde.mean_coef(t) ** 2 * VARIANCE + sde.std(t) ** 2

        def one(x: Array, z: Array) -> Array:
            x_t = losses.perturb(sde, x, t, z)[0] / jnp.sqrt(v)
            r = residual(score, sde, x, z, t)
            return jnp.stack([*(r * x_t**power for power in range(4)), r**2])

        return expected(one), 1 - sde.std(t) ** 2 / v

    for t in map(np.asarray, (1e-3, 0.3, 0.95)):
        (*means, square), covariance = map(np.asarray, moments(t))
        assert max(map(abs, means)) < 1e-10
        np.testing.assert_allclose(square, 2 * covariance**2, rtol=1e-9, atol=1e-13)


def test_the_residual_of_a_mixtures_score_has_mean_0_given_x_t() -> None:
    """If x_0 is -1 or 1, the true score is s = (alpha tanh(alpha x / sigma^2) - x) / sigma^2."""
    sde = VP()

    def score(x: Array, t: Array, key: Key | None) -> Array:
        alpha, variance = sde.mean_coef(t), sde.std(t) ** 2
        return (alpha * jnp.tanh(alpha * x / variance) - x) / variance

    nodes, weights = np.polynomial.hermite_e.hermegauss(200)

    @jax.jit
    def moments(x: Array) -> Array:
        def one(z: Array) -> Array:
            t = np.array(0.5)
            x_t = losses.perturb(sde, x, t, z)
            r = residual(score, sde, x, z, t)
            return jnp.stack([r * x_t[0] ** power for power in range(4)])

        return weights @ jax.vmap(one)(nodes[:, None]) / weights.sum()

    total = np.asarray(moments(-np.ones(1))) + np.asarray(moments(np.ones(1)))
    assert np.all(abs(total) < 1e-8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_gradient(family: Callable[[Array], Score], sde: SDE, a: float, t: Array = T) -> Array:
    """d/da of the expected second-order loss; the gradient treats |sigma s + z|^2 as constant."""

    def total(a: Array) -> Array:
        score = family(a)
        return expected(lambda x, z: 0.5 * residual(score, sde, x, z, t) ** 2)

    return jax.grad(total)(jnp.asarray(a))


@jax.jit
def ode_nats(sde: SDE, a: Array, variance: Array) -> Array:
    """E[-log p(x_0)] in nats by the ODE whose score is (1 + a) times that of N(0, variance).

    x_T = M x_0, where log M is the integral of f + g^2 (1 + a) / (2 v), which is computed by
    Gauss-Legendre quadrature in log t.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    ends = np.log(1e-8), 0.0
    s = 0.5 * (ends[1] - ends[0]) * nodes + 0.5 * (ends[0] + ends[1])
    t, weights = np.exp(s), 0.5 * (ends[1] - ends[0]) * weights * np.exp(s)
    v = sde.mean_coef(t) ** 2 * variance + sde.std(t) ** 2
    log_m = weights @ (sde.drift_coef(t) + 0.5 * sde.diffusion(t) ** 2 * (1 + a) / v)
    prior = sde.mean_coef(np.array(1.0)) ** 2 * variance + sde.std(np.array(1.0)) ** 2
    return 0.5 * variance * jnp.exp(2 * log_m) / prior - log_m


def test_the_loss_and_the_odes_nats_have_the_same_minimum() -> None:
    """For (1 + a) times the true score, both are least at a = 0. The gradient of the loss is
    c (a + a^2) with c > 0."""
    sde = VP()

    def family(a: Array) -> Score:
        score = linear(sde, VARIANCE)
        return lambda x, t, key: (1 + a) * score(x, t, key)

    alpha, sigma = coefficients(sde, T)
    for a in (-0.4, -0.05, 0.0, 0.05, 0.4):
        exact = (sigma**2 / (alpha**2 * VARIANCE + sigma**2)) ** 2 * (a + a**2)
        np.testing.assert_allclose(loss_gradient(family, sde, a), exact, rtol=1e-9, atol=1e-12)
    least = scipy.optimize.minimize_scalar(lambda a: float(ode_nats(sde, a, VARIANCE)), (-0.1, 0.1))
    assert abs(least.x) < 1e-6
    root = scipy.optimize.brentq(lambda a: float(loss_gradient(family, sde, a)), -0.3, 0.3)
    assert abs(root) < 1e-9


def test_the_minimum_over_wrong_variances_is_the_true_one(sde: SDE) -> None:
    """The ODE of N(0, c) has -log p = 1/2 (log c + x^2 / c) plus a constant. Its mean is least if c
    is the variance of the data."""

    def family(c: Array) -> Score:
        return linear(sde, c)

    def odes(c: float) -> float:
        """The derivative of the mean of -log p."""
        return 0.5 * (1 / c - VARIANCE / c**2)

    for c, sign in ((0.3, -1.0), (1.2, 1.0)):
        gradient = float(loss_gradient(family, sde, c))
        assert sign * gradient > 1e-9 and sign * odes(c) > 0.1
    assert abs(float(loss_gradient(family, sde, VARIANCE))) < 1e-12 > abs(odes(VARIANCE))


def test_the_second_order_loss_notices_errors_that_oscillate_fast() -> None:
    """The score has the error b / k cos(k x). The first-order loss falls as 1 / k^2, and the
    second-order loss does not.

    The second derivatives with respect to b are sigma^2 E[cos^2 k x] / k^2 for the first order and
    sigma^4 E[sin^2 k x] for the second, where E[cos 2 k x] = e^(-2 k^2 v).
    """
    sde, k = VP(), 5.0

    def family(b: Array) -> Score:
        score = linear(sde, VARIANCE)
        return lambda x, t, key: score(x, t, key) + b / k * jnp.cos(k * x)

    def first(b: Array) -> Array:
        def one(x: Array, z: Array) -> Array:
            s = family(b)(losses.perturb(sde, x, T, z), T, None)
            return losses.residual(sde, s, T, z, "original")

        return expected(one)

    def second(b: Array) -> Array:
        return expected(lambda x, z: 0.5 * residual(family(b), sde, x, z, T) ** 2)

    @jax.jit
    def found(at: Array) -> list[Array]:
        return [
            derivative(f)(at) for derivative in (jax.hessian, jax.grad) for f in (first, second)
        ]

    alpha, sigma = coefficients(sde, T)
    wave = np.exp(-2 * k**2 * (alpha**2 * VARIANCE + sigma**2))
    of_first, of_second, *slopes = map(float, found(np.array(0.0)))
    np.testing.assert_allclose(of_first, sigma**2 * (1 + wave) / 2 / k**2, rtol=1e-6)
    np.testing.assert_allclose(of_second, sigma**4 * (1 - wave) / 2, rtol=1e-6)
    assert max(map(abs, slopes)) < 1e-9


COVARIANCE = np.asarray([[0.7, 0.5], [0.5, 0.9]])


def correlated(sde: SDE, a: Array | float) -> Score:
    """The score of N(0, COVARIANCE), but the off-diagonal entries of its Jacobian times 1 + a."""

    def score(x: Array, t: Array, key: Key | None) -> Array:
        v = sde.mean_coef(t) ** 2 * COVARIANCE + sde.std(t) ** 2 * jnp.eye(2)
        jacobian = -jnp.linalg.inv(v)
        return (jacobian + a * (jacobian - jnp.diag(jnp.diag(jacobian)))) @ x

    return score


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_several_probes_leave_no_bias(probes: int) -> None:
    """With one probe, the gradient at the true score is not 0 but 1/2 sigma^4 d/da 2 sum_{i != j}
    J_ij^2, so training would make the off-diagonal entries of the Jacobian too small."""
    sde, n = VP(), 7
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    grid = np.stack(np.meshgrid(*[nodes] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    mass = np.prod(np.stack(np.meshgrid(*[weights] * 4, indexing="ij"), -1), -1).ravel()
    x = grid[:, :2] @ np.linalg.cholesky(COVARIANCE).T
    signs = itertools.product((-1.0, 1.0), repeat=2 * probes)
    vs = np.reshape(list(signs), (-1, probes, 2))

    def total(a: Array) -> Array:
        score = correlated(sde, a)

        def one(x: Array, z: Array, vs: Array) -> Array:
            x_t = losses.perturb(sde, x, T, z)
            jacobian = jax.jacfwd(lambda x: score(x, T, None))(x_t)
            forms = jnp.sum(vs * (vs @ jacobian.T), axis=1)
            r = second_order.residuals(sde, score(x_t, T, None), forms, T, z)
            return 0.5 * second_order.squared_residual(r)

        over_probes = jax.vmap(lambda x, z: jnp.mean(jax.vmap(lambda v: one(x, z, v))(vs)))
        return mass / mass.sum() @ over_probes(x, grid[:, 2:])

    value, gradient = jax.jit(jax.value_and_grad(total))(np.array(0.0))
    alpha, sigma = coefficients(sde, T)
    inverse = np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    exact = np.eye(2) - sigma**2 * inverse  # Cov[z | x_t]
    variance = sigma**4 * 4 * inverse[0, 1] ** 2 if probes == 1 else 0.0
    np.testing.assert_allclose(value, np.sum(exact**2) + 0.5 * variance, rtol=1e-9)
    np.testing.assert_allclose(gradient, variance, atol=1e-10)
    assert probes > 1 or variance > 0.05


def curved(a: Array | float, sde: SDE) -> Score:
    """A nonlinear score with one parameter a, whose Jacobian is not diagonal."""
    w = np.random.default_rng(0).normal(size=(3, 3))
    return lambda x, t, key: -jnp.tanh(a * w @ x + t) / sde.std(t)


def test_for_vp_the_residual_has_the_form_of_i_dode() -> None:
    """r = -alpha [sigma div F^ - alpha (d - |F - F^|^2)], where F = alpha z - sigma x is the
    velocity and F^ its prediction."""
    sde, t = VP(), np.array(0.2)
    alpha, sigma = coefficients(sde, t)
    x, z = np.array([0.3, -0.9, 0.4]), np.array([1.1, 0.2, -0.7])
    score = curved(0.7, sde)

    def velocity(x_t: Array) -> Array:
        """F^, from which the predicted noise is alpha F^ + sigma x_t."""
        return (-sigma * score(x_t, t, None) - sigma * x_t) / alpha

    @jax.jit
    def both(x: Array, z: Array) -> tuple[Array, Array]:
        x_t = losses.perturb(sde, x, t, z)
        error = jnp.sum((alpha * z - sigma * x - velocity(x_t)) ** 2)
        divergence = jnp.trace(jax.jacfwd(velocity)(x_t))
        theirs = sigma * divergence - alpha * (3 - error)
        return residual(score, sde, x, z, t), -alpha * theirs

    np.testing.assert_allclose(*both(x, z), rtol=1e-12)


def test_with_the_weight_of_i_dode_the_loss_is_their_objective() -> None:
    """Their objective is |F - F^|^2 + 0.1 (sigma div F^ - alpha (d - |F - F^|^2))^2 / d. Ours is
    this times 1/2 w alpha^2. A density of times can cancel this factor."""
    sde, t, d = VP(), np.array(0.2), 3
    alpha, sigma = coefficients(sde, t)
    x, score = np.array([[0.3, -0.9, 0.4]]), curved(0.7, sde)

    def velocity(x_t: Array) -> Array:
        return (-sigma * score(x_t, t, None) - sigma * x_t) / alpha

    @jax.jit
    def both(key: Key) -> tuple[Array, Array]:
        first, second = second_order.dsm_batch(score, sde, x, t[None], key[None], probes=1)
        z = jax.random.normal(stream(key, "noise"), (d,))
        v = jax.random.rademacher(stream(key, "probes"), (d,), float)
        x_t = alpha * x[0] + sigma * z
        # The velocity's target alpha z - sigma x is (z - sigma x_t) / alpha.
        error = jnp.sum(((z - sigma * x_t) / alpha - velocity(x_t)) ** 2)
        form = v @ jax.jvp(velocity, (x_t,), (v,))[1]
        theirs = error + 0.1 * (sigma * form - alpha * (d - error)) ** 2 / d
        return (first + 0.1 * second)[0] / (0.5 * sde.rate(t) * alpha**2), theirs

    np.testing.assert_allclose(*both(jax.random.key(5)), rtol=1e-10)


def test_the_loss_of_one_example_by_hand(sde: SDE) -> None:
    score, t = curved(0.7, sde), np.array(0.4)
    x, vs = np.array([0.3, -0.9, 0.4]), np.array([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])
    counts = (1, 2)

    @jax.jit
    def all_of(key: Key) -> tuple[dict[str, list[Array]], dict[str, Array], Array]:
        found = {
            w: [second_order.loss(score, sde, x, t, key, vs[:k], weighting=w) for k in counts]
            for w in losses.WEIGHTINGS
        }
        z = jax.random.normal(stream(key, "noise"), (3,))  # losses.dsm draws it in the same way.
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        jacobian = jax.jacfwd(lambda x: score(x, t, None))(alpha * x + sigma * z)
        error = jnp.sum((sigma * score(alpha * x + sigma * z, t, None) + z) ** 2)
        weights = {"likelihood": (sde.diffusion(t) / sigma) ** 2, "original": jnp.ones(())}
        return found, weights, jnp.stack([sigma**2 * v @ jacobian @ v + 3 - error for v in vs])

    found, weights, r = jax.device_get(all_of(jax.random.key(3)))
    for weighting, w in weights.items():
        expected = w * np.array([r[0] ** 2, r[0] * r[1]]) / (2 * 3)
        np.testing.assert_allclose(found[weighting], expected, rtol=1e-10)


def test_the_gradient_of_the_loss_is_that_of_its_divergence_only() -> None:
    """The gradient is r sigma^2 d(div s)/da / d, with finite differences of div s, because
    |sigma s + z|^2 in r counts as constant."""
    sde, t, key = VP(), np.array(0.4), jax.random.key(3)
    x, vs, step = np.array([0.3, -0.9, 0.4]), np.array([[1.0, -1.0, 1.0]]), 1e-5

    @jax.jit
    def form(a: Array) -> Array:
        z = jax.random.normal(stream(key, "noise"), (3,))
        f = curved(a, sde)
        jacobian = jax.jacfwd(lambda x: f(x, t, None))(losses.perturb(sde, x, t, z))
        return vs[0] @ jacobian @ vs[0]

    def loss(a: Array) -> Array:
        return second_order.loss(curved(a, sde), sde, x, t, key, vs, weighting="original")

    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = map(float, both(0.7))
    slope = (float(form(0.7 + step)) - float(form(0.7 - step))) / (2 * step)
    r, sigma = np.sqrt(2 * 3 * value), coefficients(sde, t)[1]
    np.testing.assert_allclose(abs(gradient), abs(r * sigma**2 * slope / 3), rtol=1e-7)
    whole = (float(both(0.7 + step)[0]) - float(both(0.7 - step)[0])) / (2 * step)
    assert abs(whole - gradient) > 0.1 * abs(gradient)


@dataclasses.dataclass(frozen=True)
class InBatches:
    """A score that must be called once, for the whole batch."""

    score: Score
    calls: list[Array]

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        raise AssertionError("called for one example, though it has a batch form")

    def batch(self, x: Array, t: Array, key: Key | None) -> Array:
        """The scores of a batch."""
        self.calls.append(x)
        return jax.vmap(lambda x, t: self.score(x, t, None))(x, t)


@pytest.mark.parametrize(
    ("sde", "antithetic"),
    [
        ("vp", True),
        ("rectified_flow", False),
        pytest.param("vp", False, marks=pytest.mark.slow),
        pytest.param("rectified_flow", True, marks=pytest.mark.slow),
        pytest.param("ve", False, marks=pytest.mark.slow),
        pytest.param("ve", True, marks=pytest.mark.slow),
    ],
    indirect=["sde"],
)
def test_a_batch_has_the_losses_of_its_examples(sde: SDE, antithetic: bool) -> None:
    """The first-order losses are those of ``losses.dsm_batch``. The second-order losses are
    computed by hand, with the probes that each key gives."""
    score = curved(0.7, sde)
    x = np.random.default_rng(1).normal(size=(4, 3))
    t, keys = np.array([0.05, 0.2, 0.5, 0.9]), jax.random.split(jax.random.key(0), 4)
    signs = np.array([1.0, -1.0, 1.0, -1.0]) if antithetic else None
    network = InBatches(score, [])

    def by_hand(x: Array, t: Array, key: Key, sign: Array) -> tuple[Array, Array]:
        z = jax.random.normal(stream(key, "noise"), (3,)) * sign
        x_t = losses.perturb(sde, x, t, z)
        s, jacobian = score(x_t, t, None), jax.jacfwd(lambda x: score(x, t, None))(x_t)
        vs = jax.random.rademacher(stream(key, "probes"), (3, 3), float)
        r = [sde.std(t) ** 2 * v @ jacobian @ v + 3 - jnp.sum((sde.std(t) * s + z) ** 2)
             for v in vs]  # fmt: skip
        return sde.rate(t) * r[0] * (r[1] + r[2]) / 2 / (2 * 3), vs

    @jax.jit
    def all_of(keys: Key) -> tuple[Any, ...]:
        found = second_order.dsm_batch(network, sde, x, t, keys, signs=signs, probes=3)
        assert len(network.calls) == 1
        plain = losses.dsm_batch(network, sde, x, t, keys, signs=signs)
        return *found, plain, *jax.vmap(by_hand)(x, t, keys, np.ones(4) if signs is None else signs)

    first, second, plain, expected, vs = all_of(keys)
    np.testing.assert_allclose(first, plain, rtol=1e-12)
    np.testing.assert_allclose(second, expected, rtol=1e-9)
    assert len(np.unique(vs[-1], axis=0)) > 1


def test_arguments_of_wrong_shapes_are_refused() -> None:
    """They would broadcast to a wrong number."""
    sde, key, x = VP(), jax.random.key(0), jnp.zeros(3)
    score = linear(sde, 1.0)
    with pytest.raises(ValueError, match="^t is"):
        second_order.loss(score, sde, x, jnp.asarray([0.1, 0.2]), key, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="^vs is"):
        second_order.loss(score, sde, x, T, key, jnp.ones(3))
    batch = jnp.zeros((2, 3)), jnp.asarray([0.1, 0.2]), jax.random.split(key)
    with pytest.raises(ValueError, match="^probes is 0"):
        second_order.dsm_batch(score, sde, *batch, probes=0)
    with pytest.raises(ValueError, match="^t is"):
        second_order.dsm_batch(score, sde, batch[0], jnp.asarray(0.1), batch[2])


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_noise_of_the_losses_has_full_precision(dtype):
    """Noise that is drawn in half precision does not have the variance 1."""
    sde, key, t = SDES["vp"](), jax.random.key(0), T
    x = np.random.default_rng(1).normal(size=6).astype(dtype)

    @jax.jit
    def each(x):
        return (
            losses.dsm(lambda x, t, key: -x, sde, x, t, key),
            losses.dsm_batch(lambda x, t, key: -x, sde, x[None], t[None], key[None])[0],
            second_order.loss(lambda x, t, key: -x, sde, x, t, key, np.ones((2, 6))),
        )

    np.testing.assert_allclose(each(x), each(x.astype("float32")), rtol=1e-5)
