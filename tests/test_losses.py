"""Denoising score matching on Gaussian data, where sigma points make expectations exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from closed_forms import sigma_points
from families import FAMILIES_VE_SLOW

from sbml import likelihood, losses, samplers
from sbml.audit import oracle
from sbml.core.types import Array, Key, Score
from sbml.likelihood import bound, discrete
from sbml.score.divergence import Trace
from sbml.sdes import SDE, SDES, times

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
# The time of most tests: a NumPy number, so it is float64 though JAX has no float64 at import.
TIME = np.asarray(0.3)


class OnlyBatches:
    """A score that must be called in its batch form."""

    def __call__(self, x: Array, t: Array, key: Key | None) -> Array:
        raise AssertionError("called for one example, though it has a batch form")


# The losses see an SDE only through its coefficients.
@pytest.fixture(params=FAMILIES_VE_SLOW, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


def expected_loss(score: Score, data: oracle.Gaussian, t: Array, weighting: str) -> Array:
    """The exact expectation of the loss over x_0 and z, for a score that is affine in x."""

    def one(x: Array, z: Array) -> Array:
        x_t = losses.perturb(data.sde, x, t, z)
        return losses.residual(data.sde, score(x_t, t, None), t, z, weighting)

    return jnp.mean(jax.vmap(one)(*sigma_points(data)))


def score_with_error(data: oracle.Gaussian, a: Array, b: Array) -> Score:
    """The true score plus a x + b."""
    return lambda x, t, key: data.score(x, t) + a @ x + b


def test_weights(sde: SDE) -> None:
    @jax.jit
    def found(t: Array) -> list[Array]:
        return [
            sde.diffusion(t) / sde.std(t),
            *(losses.weight(sde, t, w) for w in losses.WEIGHTINGS),
        ]

    ratio, likelihood, original = map(float, found(TIME))
    np.testing.assert_allclose(likelihood, ratio**2, rtol=1e-14)
    assert original == 1


def test_perturb_by_hand() -> None:
    """Linear VE has alpha = 1 and sigma = 50 t."""
    sde = SDES["linear_ve"]()
    x, z = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[-1.0, 0.5]])
    np.testing.assert_allclose(losses.perturb(sde, x, jnp.asarray(0.1), z), [[-4.0, 4.5]])


def test_residual_by_hand() -> None:
    """sigma = 5, g^2 / sigma^2 = 2 / t = 20 at t = 0.1: 1/2 20 ((5 - 1)^2 + (10 + 0.5)^2)."""
    sde, t = SDES["linear_ve"](), jnp.asarray(0.1)
    score, z = jnp.asarray([1.0, 2.0]), jnp.asarray([-1.0, 0.5])
    likelihood = losses.residual(sde, score, t, z, "likelihood")
    np.testing.assert_allclose(likelihood, 10 * (16 + 10.5**2), rtol=1e-13)
    original = losses.residual(sde, score, t, z, "original")
    np.testing.assert_allclose(original, 0.5 * (16 + 10.5**2), rtol=1e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_the_true_score_is_a_stationary_point(sde: SDE, weighting: str) -> None:
    data = oracle.gaussian(sde)

    def loss(a: Array, b: Array, t: Array) -> tuple[Array, Array]:
        value = expected_loss(score_with_error(data, a, b), data, t, weighting)
        return value, losses.weight(sde, t, weighting)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    for t in (1e-3, 0.1, 0.5, sde.largest_time):
        leaves, weight = gradient(np.zeros((3, 3)), np.zeros(3), np.array(t))
        # For a score with the error delta, the gradient with respect to a is
        # w sigma^2 E[delta x_t^T]; this sets the scale of the tolerance.
        unit = max(1.0, float(weight) * sde.prior_std**2)
        for leaf in leaves:
            np.testing.assert_allclose(leaf, 0, atol=1e-8 * unit)


@pytest.mark.oracle
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_the_gap_of_a_wrong_score_is_its_squared_error(sde: SDE, weighting: str) -> None:
    """E loss(s + delta) - E loss(s) = 1/2 w sigma^2 E|delta(x_t)|^2 for an affine delta.

    So the true score is the minimum."""
    data, rng = oracle.gaussian(sde), np.random.default_rng(5)
    of_time = jax.jit(lambda t: (sde.mean_coef(t), sde.std(t), sde.diffusion(t)))
    alpha, sigma, g = map(float, of_time(TIME))
    mean = alpha * np.asarray(data.mean)
    cov = alpha**2 * np.asarray(data.cov) + sigma**2 * np.eye(3)
    loss = jax.jit(lambda a, b: expected_loss(score_with_error(data, a, b), data, TIME, weighting))
    best = float(loss(np.zeros((3, 3)), np.zeros(3)))
    for _ in range(5):
        a, b = rng.normal(size=(3, 3)), rng.normal(size=3)
        squared = np.trace(a @ cov @ a.T) + np.sum((a @ mean + b) ** 2)
        factor = sigma**2 if weighting == "original" else g**2
        np.testing.assert_allclose(float(loss(a, b)) - best, 0.5 * factor * squared, rtol=1e-9)


@pytest.mark.oracle
def test_the_true_score_of_a_mixture_beats_its_neighbours(sde: SDE) -> None:
    """In random directions of function space, a wrong score has a larger loss on the same draws.

    The difference is more than three standard errors."""
    data, n = oracle.mixture(sde), 2000
    rng = np.random.default_rng(6)
    choice = rng.choice(3, n, p=data.weights)
    part = jax.tree.map(lambda leaf: np.asarray(leaf)[choice], data.parts)
    whitened = np.sqrt(part.eigenvalues) * rng.normal(size=(n, 3))
    x = part.mean + np.einsum("nij,nj->ni", part.basis, whitened)
    keys = jax.random.split(jax.random.key(0), n)

    @jax.jit
    def each(direction: Array, scale: float) -> Array:
        def score(x: Array, t: Array, key: Key | None) -> Array:
            return data.score(x, t) + scale / sde.std(t) * jnp.sin(direction @ x)

        return jax.vmap(lambda x, key: losses.dsm(score, sde, x, TIME, key))(x, keys)

    truth = np.asarray(each(np.zeros((3, 3)), 0.0))
    for _ in range(4):
        excess = np.asarray(each(rng.normal(size=(3, 3)), 0.3)) - truth
        assert excess.mean() > 3 * excess.std() / np.sqrt(n)


@pytest.mark.oracle
def test_likelihood_weighting_cancels_importance_weights(sde: SDE) -> None:
    """weight(t) * loss = Z/2 |sigma s + z|^2 at every importance time."""
    importance = times.Importance(sde, EPS)
    rng = np.random.default_rng(7)
    score, z = rng.normal(size=(7, 4)), rng.normal(size=(7, 4))

    @jax.jit
    def all_of(u: Array) -> tuple[Array, ...]:
        t, weight = importance.at(u)
        loss = jax.vmap(lambda *a: losses.residual(sde, *a, "likelihood"))(score, t, z)
        return weight * loss, sde.std(t), jnp.asarray(importance.normaliser)

    found, sigma, normaliser = map(np.asarray, all_of(np.linspace(0, 0.99, 7)))
    error = np.sum((sigma[:, None] * score + z) ** 2, 1)
    np.testing.assert_allclose(found, normaliser / 2 * error, rtol=1e-9)


@pytest.mark.oracle
def test_the_integral_of_the_loss_is_closed_form(sde: SDE) -> None:
    """The integral over t from eps to T, for the true score and every proposal.

    With rho = sigma / alpha and the variances c_i of the data it is

    likelihood   1/2 sum_i [-log1p(c_i / rho^2)] from t = eps to T
    original     integral 1/2 sum_i alpha^2 c_i / (alpha^2 c_i + sigma^2) dt, by quadrature
    """
    data = oracle.gaussian(sde)
    variances = np.asarray(data.eigenvalues)

    @jax.jit
    def original(t: Array) -> Array:
        signal = sde.mean_coef(t) ** 2 * variances
        return 0.5 * jnp.sum(signal / (signal + sde.std(t) ** 2))

    ends = np.array([EPS, 1.0])
    rho2 = np.asarray(jax.jit(lambda t: sde.std(t) / sde.mean_coef(t))(ends)) ** 2
    expected = {
        "likelihood": 0.5 * np.sum(np.log1p(variances / rho2[0]) - np.log1p(variances / rho2[1])),
        "original": scipy.integrate.quad(
            lambda s: float(original(np.exp(s))) * np.exp(s), np.log(EPS), 0, epsrel=1e-9, limit=200
        )[0],
    }
    nodes, weights = np.polynomial.legendre.leggauss(300)
    loss = jax.jit(jax.vmap(lambda t: {w: expected_loss(data.score, data, t, w) for w in expected}))
    for name, proposal in times.PROPOSALS.items():
        # With uniform times, the integrand has a peak near eps, so the quadrature substitutes
        # u = v^8.
        v, power = 0.5 * (nodes + 1), 1 if name == "importance" else 8
        t, weight = map(np.asarray, jax.jit(proposal(sde, EPS).at)(v**power))
        for weighting, values in loss(t).items():
            each = 0.5 * weights * power * v ** (power - 1) * weight * np.asarray(values)
            np.testing.assert_allclose(np.sum(each), expected[weighting], rtol=1e-6)


def _echo(x: Array, t: Array, key: Key | None) -> Array:
    """A score that returns its input."""
    return x


def test_dsm_draws_standard_normal_noise() -> None:
    """With a zero score and w = 1, the loss is 1/2 |z|^2: 1/2 times a chi-squared variable with six
    degrees of freedom, of mean 3 and variance 3."""
    sde, x, n = SDES["vp"](), np.ones((2, 3)), 4000
    keys = jax.random.split(jax.random.key(1), n)

    def zero(x: Array, t: Array, key: Key | None) -> Array:
        return jnp.zeros_like(x)

    one = jax.vmap(lambda key: losses.dsm(zero, sde, x, TIME, key, weighting="original"))
    loss = np.asarray(jax.jit(one)(keys))
    assert loss.shape == (n,)
    assert abs(np.mean(loss) - 3) < 3 * np.sqrt(3 / n)
    np.testing.assert_allclose(np.var(loss), 3, rtol=0.15)


def test_the_key_of_the_score_differs_from_the_key_of_the_noise() -> None:
    """With the same key, the noise of a stochastic score would double z or cancel it."""
    sde, n = SDES["vp"](), 4000

    def noisy(x: Array, t: Array, key: Key | None) -> Array:
        return jax.random.normal(key, x.shape) / sde.std(t)

    class NoisyBatch(OnlyBatches):
        def batch(self, x: Array, t: Array, key: Key | None) -> Array:
            return jax.random.normal(key, x.shape) / sde.std(t)[:, None]

    def loss(key: Key) -> Array:
        return losses.dsm(noisy, sde, jnp.zeros(4), TIME, key, weighting="original")

    def batch_loss(key: Key) -> Array:
        return losses.dsm_batch(
            NoisyBatch(), sde, jnp.zeros((1, 4)), TIME[None], key[None], weighting="original"
        )

    keys = jax.random.split(jax.random.key(2), n)
    both = jax.jit(jax.vmap(lambda key: (loss(key), batch_loss(key))))
    for values in map(np.asarray, both(keys)):
        # 1/2 |z + z'|^2 with independent z, z' in four dimensions: mean 4, variance 8.
        assert abs(np.mean(values) - 4) < 3 * np.sqrt(8 / n)


@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_batch_loss_is_the_residual_of_its_noise(weighting: str) -> None:
    """The noise is computed from the score's input; there is one call for the whole batch."""
    sde, x = SDES["subvp"](), np.random.default_rng(3).normal(size=(5, 2, 3))
    t, keys = np.linspace(0.1, 0.9, 5), jax.random.split(jax.random.key(4), 5)
    seen = []

    class Recorder(OnlyBatches):
        def batch(self, x: Array, t: Array, key: Key | None) -> Array:
            seen.append((x, t))
            return jnp.sin(x)

    @jax.jit
    @jax.vmap
    def expected(x: Array, x_t: Array, t: Array) -> Array:
        z = (x_t - sde.mean_coef(t) * x) / sde.std(t)
        return losses.residual(sde, jnp.sin(x_t), t, z, weighting)

    def loss_and_input() -> tuple[Array, tuple[Array, Array]]:
        loss = losses.dsm_batch(Recorder(), sde, x, t, keys, weighting=weighting)
        return loss, seen.pop()

    loss, (x_t, t_seen) = jax.jit(loss_and_input)()
    assert not seen
    np.testing.assert_array_equal(t_seen, t)
    np.testing.assert_allclose(loss, expected(x, x_t, t), rtol=1e-9)


def test_single_loss_is_the_residual_of_its_noise(sde: SDE) -> None:
    x, seen = np.ones((2, 3)), []

    def score(x: Array, t: Array, key: Key | None) -> Array:
        seen.append(x)
        return jnp.sin(x)

    @jax.jit
    def both(key: Key) -> tuple[Array, Array]:
        loss, x_t = losses.dsm(score, sde, x, TIME, key), seen.pop()
        z = (x_t - sde.mean_coef(TIME) * x) / sde.std(TIME)
        return loss, losses.residual(sde, jnp.sin(x_t), TIME, z, "likelihood")

    np.testing.assert_allclose(*both(jax.random.key(5)), rtol=1e-9)


def test_batch_loss_is_the_loss_of_each_example() -> None:
    """This holds for scores with and without a batch form. Each example has its own noise."""
    sde = SDES["vp"]()
    x, t = np.ones((4, 3)), np.full(4, 0.4)
    keys = jax.random.split(jax.random.key(7), 4)

    class Batched(OnlyBatches):
        def batch(self, x: Array, t: Array, key: Key | None) -> Array:
            return -x * t[:, None]

    def plain(x: Array, t: Array, key: Key | None) -> Array:
        return -x * t

    @jax.jit
    def all_of(keys: Key) -> list[Array]:
        each = jax.vmap(lambda x, t, key: losses.dsm(plain, sde, x, t, key))(x, t, keys)
        return [each, *(losses.dsm_batch(score, sde, x, t, keys) for score in (Batched(), plain))]

    each, *batches = all_of(keys)
    for batch in batches:
        np.testing.assert_allclose(batch, each, rtol=1e-13)
    assert len(np.unique(each)) == 4


def test_losses_compose_with_jit_vmap_and_grad() -> None:
    """The loss of the score -theta x is a parabola in theta: three values give its gradient."""
    sde = SDES["subvp"]()
    x, t = np.random.default_rng(8).normal(size=(4, 3)), np.linspace(0.1, 0.9, 4)
    keys = jax.random.split(jax.random.key(9), 4)

    def single(theta: Array) -> Array:
        each = jax.vmap(lambda *a: losses.dsm(lambda x, t, k: -theta * x, sde, *a))
        return jnp.mean(each(x, t, keys))

    def batch(theta: Array) -> Array:
        each = losses.dsm_batch(lambda x, t, k: -theta * x, sde, x, t, keys)
        return jnp.mean(each)

    for loss in (single, batch):
        both = jax.jit(jax.value_and_grad(loss))
        low, middle, high = (float(both(v)[0]) for v in (0.0, 1.0, 2.0))
        slope = both(1.0)[1]
        np.testing.assert_allclose(slope, (high - low) / 2, rtol=1e-9)
        assert low + high > 2 * middle


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), ()])
def test_a_score_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Each of these shapes would broadcast against (2, 3) without an error."""

    def wrong(x: Array, t: Array, key: Key | None) -> Array:
        return jnp.zeros(shape)

    sde, x = SDES["vp"](), np.ones((2, 3))
    key, u, pixels = jax.random.key(0), np.array([0.5]), np.ones((2, 3), int)
    steps = {"eps": EPS, "u": u}
    sampler = samplers.Ancestral(steps=1, corrector=samplers.Langevin())
    for call in (
        lambda: losses.dsm(wrong, sde, x, TIME, key),
        lambda: losses.dsm_batch(wrong, sde, x[None], TIME[None], key[None]),
        lambda: bound.elbo(wrong, sde, x, key, **steps),
        lambda: bound.elbo(wrong, sde, x, key, **steps, trace=Trace("exact")),
        lambda: discrete.elbo(wrong, sde, pixels, key, noise=discrete.Categorical(4), **steps),
        lambda: likelihood.ode_logp(wrong, sde, x, key, eps=EPS),
        lambda: sampler(wrong, sde, x, key, eps=EPS),
        lambda: samplers.EulerMaruyama(steps=1)(wrong, sde, x, key, eps=EPS),
        lambda: samplers.ReverseDiffusion(steps=1)(wrong, sde, x, key, eps=EPS),
        lambda: sampler.corrector(wrong, sde, x, TIME, TIME, key),
    ):
        with pytest.raises(ValueError, match=r"score returned shape .* for an input of .*2, 3\)"):
            jax.eval_shape(call)


def test_signs_multiply_the_noise(sde: SDE) -> None:
    """At x = 0 the loss of the constant score c with noise -z is that of -c with noise z."""
    x, t, signs = np.zeros((2, 3)), np.full(2, TIME), np.array([1.0, -1.0])

    @jax.jit
    def both(key: Key) -> list[Array]:
        keys = jnp.stack([key] * 2)
        return [
            losses.dsm_batch(lambda x, t, key, c=c: c + 0 * x, sde, x, t, keys, signs=signs)
            for c in (0.5, -0.5)
        ]

    up, down = map(np.asarray, both(jax.random.key(0)))
    np.testing.assert_allclose(up, down[::-1], rtol=1e-12)
    assert abs(up[0] - up[1]) > 1e-3
