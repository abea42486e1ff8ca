"""The densities of samplers against closed forms, quadrature and NumPy."""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import sbml
from sbml.audit import oracle
from sbml.core import bits
from sbml.core.types import Array, conditioned
from sbml.density.density import _walk
from sbml.density.estimate import Estimate
from sbml.density.posterior import Importance
from sbml.likelihood.ode import Solver
from sbml.samplers import (
    DDIM,
    ODE,
    Ancestral,
    Chain,
    DPMSolver,
    EulerMaruyama,
    FixedSteps,
    FlowPolicy,
    Langevin,
    Map,
    Midpoint,
    Path,
    ReverseDiffusion,
    Transition,
    denoise,
)
from sbml.samplers.density import MapLogProb, check_folds
from sbml.score import from_prediction
from sbml.score.divergence import Trace
from sbml.sdes import SDE, SDES, VP, RectifiedFlow
from sbml.statistics.intervals import mean_interval

pytestmark = pytest.mark.usefixtures("x64")

EPS, KEY = 1e-3, jax.random.key(0)


class Half(RectifiedFlow):
    """It ends at t = 1/2, from where the stretch S = 2 leads to T."""

    largest_time = 0.5


FAMILIES = {**SDES, "half": Half}


def gaussian(sde: SDE, mean: Array, variances: Array) -> Any:
    """The exact score of data N(mean, diag(variances)), from a prediction of x_0."""

    def network(x: Array, t: Array) -> Array:
        a, s = sde.mean_coef(t), sde.std(t)
        return (variances * a * x + s**2 * mean) / (a**2 * variances + s**2)

    return from_prediction(network, "x0", sde)


class Reference:
    """The steps of the samplers in NumPy, for a score of one time and x ``(..., d)``."""

    def __init__(self, sde: SDE, score: Any) -> None:
        self.sde, self._score = sde, score

    def at(self, t: float) -> tuple[float, float, float]:
        """alpha, sigma and lambda."""
        a, s = (float(f(jnp.asarray(t))) for f in (self.sde.mean_coef, self.sde.std))
        return a, s, 2 * math.log(a / s)

    def score(self, x: np.ndarray, t: float) -> np.ndarray:
        rows = [self._score(jnp.asarray(row), jnp.asarray(t), None) for row in np.atleast_2d(x)]
        return np.reshape(rows, x.shape)

    def transition(self, sampler: Any, x: np.ndarray, s: float, t: float) -> tuple[Any, float]:
        """The mean and the standard deviation of a step from s to t."""
        (a_s, s_s, l_s), (a_t, s_t, l_t) = self.at(s), self.at(t)
        score = self.score(x, s)
        x_0, noise = (x + s_s**2 * score) / a_s, -s_s * score
        b2 = s_s**2 - (a_s / a_t * s_t) ** 2
        if isinstance(sampler, EulerMaruyama):
            g = float(self.sde.diffusion(jnp.asarray(s)))
            drift = np.asarray(self.sde.drift(jnp.asarray(x), jnp.asarray(s))) - g**2 * score
            return x - (s - t) * drift, g * math.sqrt(s - t)
        if isinstance(sampler, ReverseDiffusion):
            return (2 - a_s / a_t) * x + b2 * score, math.sqrt(b2)
        if isinstance(sampler, Midpoint):
            m = float(self.sde.time(jnp.asarray(0.5 * (l_s + l_t))))
            a_m, s_m, _ = self.at(m)
            half = a_m * x_0 + s_m * noise
            x_0 = (half + s_m**2 * self.score(half, m)) / a_m
            return a_t * x_0 + s_t / s_s * (x - a_s * x_0), 0.0
        if isinstance(sampler, ODE):  # Heun's method in sqrt(t)

            def slope(x: np.ndarray, u: float) -> np.ndarray:
                time = jnp.asarray(u**2)
                g2 = float(self.sde.diffusion(time)) ** 2
                drift = np.asarray(self.sde.drift(jnp.asarray(x), time))
                return 2 * u * (drift - 0.5 * g2 * self.score(x, u**2))

            u, v = math.sqrt(s), math.sqrt(t)
            first = slope(x, u)
            return x + 0.5 * (v - u) * (first + slope(x + (v - u) * first, v)), 0.0
        c = sampler.eta * math.sqrt(b2) * s_t / s_s
        return a_t * x_0 + math.sqrt(s_t**2 - c**2) * noise, c

    def logp_of_affine(self, sampler: Chain, x: np.ndarray, eps: float) -> np.ndarray:
        """log p of samples ``x (n, d)`` of a sampler whose steps are affine in each dimension."""
        times = np.asarray(sampler.times(self.sde, eps))
        ends = np.stack([np.zeros(x.shape[1]), np.ones(x.shape[1])])
        for s, t in zip(times[:-1], times[1:], strict=True):
            ends, _ = self.transition(sampler, ends, float(s), float(t))
        std = float(self.sde.prior_std) / float(sampler.stretch(self.sde))
        return stats.norm.logpdf(x, ends[0], np.abs(ends[1] - ends[0]) * std).sum(axis=1)


MAPS = {
    "ddim": lambda n: DDIM(n),
    "midpoint": lambda n: Midpoint(n),
    "ode": lambda n: ODE(Solver("heun", fixed_steps=n)),
}
KERNELS = {
    "euler_maruyama": lambda n: EulerMaruyama(n, "log_snr"),
    "reverse_diffusion": lambda n: ReverseDiffusion(n, "log_snr"),
    "ancestral": lambda n: Ancestral(n, "log_snr"),
    "ddim": lambda n: DDIM(n, eta=0.5),
}


def check_map(name: str, family: str, d: int, n: int) -> None:
    sde, sampler, rng = FAMILIES[family](), MAPS[name](n), np.random.default_rng(d)
    mean, variances = rng.normal(size=d), rng.uniform(0.1, 2.0, d)
    for dtype, atol in ((jnp.float64, 1e-5), (jnp.float32, 1e-3)):
        score = gaussian(sde, jnp.asarray(mean, dtype), jnp.asarray(variances, dtype))
        z = jax.vmap(lambda key: sde.prior_sample(key, (d,)))(jax.random.split(jax.random.key(0)))

        def draw(z: Array, score: Any = score) -> Any:
            return sampler.sample_logp(score, sde, z, eps=EPS)

        def at(x: Array, score: Any = score) -> Any:
            return sampler.logp(score, sde, x, eps=EPS)

        with jax.enable_x64(dtype == jnp.float64):
            x, found = jax.jit(jax.vmap(draw))(jnp.asarray(np.asarray(z), dtype))
            given = jnp.asarray(np.linspace(-1, 1, 2 * d).reshape(2, d), dtype)
            of_given = jax.jit(jax.vmap(at))(given)
        exact = Reference(sde, gaussian(sde, mean, variances))
        expected = exact.logp_of_affine(sampler, np.asarray(given, float), EPS)
        np.testing.assert_allclose(of_given.logp, expected, atol=atol)
        expected = exact.logp_of_affine(sampler, np.asarray(x, float), EPS)
        np.testing.assert_allclose(found.logp, expected, atol=atol)


@pytest.mark.parametrize("name", ["ddim", pytest.param("midpoint", marks=pytest.mark.slow)])
def test_samples_have_the_density_of_the_affine_map(name: str) -> None:
    check_map(name, "half", d=3, n=5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vp", "subvp", "ve", "edm"])
@pytest.mark.parametrize("name", MAPS)
def test_samples_have_the_density_of_the_affine_map_for_every_sde(name: str, family: str) -> None:
    sizes = ((1, 1), (3, 5), (16, 2), (2, 50), (64, 10)) if family == "vp" else ((2, 5),)
    for d, n in sizes:
        check_map(name, family, d, n)


@pytest.mark.parametrize("name", ["ddim", "euler_maruyama"])
def test_samples_of_any_sampler_have_the_moments_of_its_affine_steps(name: str) -> None:
    """Those with a density are the ones that come with it; integers are rounded from E[x_0 | x]."""
    sampler, mean, variances = KERNELS[name](5), np.array([0.3, -0.2]), np.array([0.1, 0.5])
    score, n = gaussian(VP(), mean, variances), 4000
    d = sbml.Density(score, VP(), (2,), eps=EPS, batch_size=n)
    x = np.asarray(d.sample(KEY, n, sampler=sampler))
    exact, times = Reference(VP(), score), np.asarray(sampler.times(VP(), EPS))
    moved, spread = np.stack([np.zeros(2), np.ones(2)]), np.zeros(2)
    for s, t in zip(times[:-1], times[1:], strict=True):
        before = moved[1] - moved[0]
        moved, noise = exact.transition(sampler, moved, float(s), float(t))
        spread = ((moved[1] - moved[0]) / before) ** 2 * spread + noise**2
    std = np.sqrt((moved[1] - moved[0]) ** 2 + spread)
    for i in range(2):
        assert stats.kstest((x[:, i] - moved[0, i]) / std[i], "norm").pvalue > 1e-3
    integers = sbml.Density(score, VP(), (2,), 16, EPS, batch_size=n).sample(
        KEY, 9, sampler=sampler
    )
    x_0 = jax.vmap(lambda x: denoise(score, VP(), x, jnp.asarray(EPS)))(x[:9])
    np.testing.assert_array_equal(integers, bits.to_pixels(x_0, 16))
    same = DDIM(5)
    np.testing.assert_allclose(
        d.sample(KEY, 5, sampler=same), d.sample_and_log_prob(KEY, 5, sampler=same)[0], atol=1e-12
    )


CASES = [("euler_maruyama", "half"), ("ancestral", "ve"), ("ddim", "edm"), ("ddim", "half")]
CASES += [(name, "vp") for name in KERNELS]


@pytest.mark.parametrize(
    ("name", "family"),
    CASES[:1] + [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]],
)
def test_paths_have_the_densities_of_their_normal_steps(name: str, family: str) -> None:
    sde, sampler = FAMILIES[family](), KERNELS[name](4)
    mean, variances = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.1])
    score = gaussian(sde, mean, variances)
    z, key = jnp.asarray([0.4, -1.2]) * sde.prior_std, jax.random.key(1)
    path, found = jax.jit(lambda z: sampler.sample_path(score, sde, z, key, eps=EPS))(z)
    np.testing.assert_allclose(path.x[-1], sampler(score, sde, z, key, eps=EPS)[0], rtol=1e-12)
    x, times, exact = np.asarray(path.x), np.asarray(path.times), Reference(sde, score)
    std = float(sde.prior_std) / float(sampler.stretch(sde))
    np.testing.assert_allclose(found.prior, stats.norm.logpdf(x[0], 0, std).sum(), rtol=1e-9)
    steps = [
        stats.norm.logpdf(x[i + 1], *exact.transition(sampler, x[i], times[i], times[i + 1])).sum()
        for i in range(4)
    ]
    np.testing.assert_allclose(found.steps, steps, rtol=1e-12)
    assert found.total == pytest.approx(float(found.prior) + sum(steps), rel=1e-9)


def test_flow_policies_have_the_published_step() -> None:
    """x + (v + q^2 (x + (1 - t) v) / (2 t)) dt + q sqrt(-dt) z, in the velocity v."""
    data, _ = exact_flow()
    v = lambda x, t: -x + 3 * t  # noqa: E731
    score = from_prediction(v, "flow", data.sde)
    x, a = np.array([0.4, -1.2]), 0.5
    first = float(data.sde.largest_time)
    for s, t in ((first, 0.7), (0.7, 0.2)):
        found = FlowPolicy(3, a=a).transition(score, data.sde, x, jnp.asarray(s), jnp.asarray(t))
        q, dt = a * math.sqrt(s / (1 - (t if s == first else s))), t - s
        mean = x + (v(x, s) + q**2 / (2 * s) * (x + (1 - s) * v(x, s))) * dt
        np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
        assert float(found.std) == pytest.approx(q * math.sqrt(-dt), rel=1e-9)


def test_a_window_has_the_noise_and_the_densities_of_its_steps_only() -> None:
    (data, d), whole = exact_flow(), DDIM(5, eta=0.7)
    sampler, z = whole.window(1, 3), jnp.asarray([0.4, -1.2])

    @jax.jit
    def drawn(z: Array) -> Any:
        path, logp = sampler.sample_path(d.score, data.sde, z, KEY, eps=EPS)
        again = sampler.path_log_prob(lambda x, t, key: d.score(x, t), data.sde, path)
        return path, logp, again, sampler(d.score, data.sde, z, KEY, eps=EPS)[0]

    path, logp, again, sample = drawn(z)
    np.testing.assert_array_equal(path.x[-1], sample)
    np.testing.assert_array_equal(again.steps, logp.steps)
    exact, x, times = Reference(data.sde, d.score), np.asarray(path.x), np.asarray(path.times)
    for i, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if 1 <= i < 3:
            mean, std = exact.transition(whole, x[i], s, t)
            expected = stats.norm.logpdf(x[i + 1], mean, std).sum()
            assert float(logp.steps[i]) == pytest.approx(expected, rel=1e-9)
        else:
            mean, _ = exact.transition(DDIM(5), x[i], s, t)
            np.testing.assert_allclose(x[i + 1], mean, rtol=1e-9)
            assert logp.steps[i] == 0
    assert sampler.nfe == 5 and hash(sampler) == hash(whole.window(1, 3)) != hash(whole)


MEANS = np.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5], [-1.5, -1.0]])


def mixture() -> Any:
    """log p_t of four Gaussians of standard deviation .5."""
    sde = VP()

    def logp(x: Array, t: Array) -> Array:
        a, v = sde.mean_coef(t), 0.25 * sde.mean_coef(t) ** 2 + sde.std(t) ** 2
        squares = jnp.sum((x[None] - a * MEANS) ** 2, axis=-1)
        return jax.scipy.special.logsumexp(-0.5 * squares / v) - jnp.log(2 * jnp.pi * v * 4)

    return logp


def of_mixture(**options: Any) -> sbml.Density:
    logp = mixture()
    return sbml.Density(lambda x, t, key: jax.grad(logp)(x, t), VP(), (2,), eps=EPS, **options)


def test_the_density_integrates_to_one() -> None:
    """Over the images of the cells of a grid, whose areas are those of their corners."""
    d, sampler = of_mixture(), Midpoint(4)
    side = jnp.linspace(-6, 6, 241)
    z = jnp.stack(jnp.meshgrid(side, side, indexing="ij"), axis=-1)
    middles = 0.25 * (z[:-1, :-1] + z[1:, :-1] + z[1:, 1:] + z[:-1, 1:])

    @jax.jit
    def images(z: Array) -> Any:
        return jax.vmap(lambda z: sampler.sample_logp(d.score, VP(), z, eps=EPS))(z)

    corners = images(z.reshape(-1, 2))[0].reshape(z.shape)
    p = jnp.exp(images(middles.reshape(-1, 2))[1].logp).reshape(middles.shape[:2])
    one, other = corners[1:, 1:] - corners[:-1, :-1], corners[:-1, 1:] - corners[1:, :-1]
    areas = 0.5 * (one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0])
    assert (areas > 0).all()
    assert float(jnp.sum(p * areas)) == pytest.approx(1, abs=2e-3)


def test_weights_of_a_sampler_and_its_gap() -> None:
    logp = mixture()
    found = of_mixture().importance(
        jax.random.key(2), 1000, lambda x: logp(x, jnp.asarray(EPS)) + 3, sampler=Midpoint(10)
    )
    assert abs(found.log_z.mean - 3) < 1.5 * found.log_z.ci95 < 0.03
    assert found.effective > 900 and found.solver_error.mean == 0
    assert found.evaluations == 20 and "20 evaluations for a sample" in str(found)


def test_a_target_that_the_sampler_covers_is_not_marked() -> None:
    """DDIM makes N(0, v I) of the model N(0, I), with v < 1. For a target of sd .6 the weights by
    v have light tails, and those by 1 in the place of v do not."""
    sde, sampler = VP(), DDIM(10)
    times = sampler.times(sde, EPS)
    alpha, sigma = (np.asarray(f(times)) for f in (sde.mean_coef, sde.std))
    ratio = sigma[1:] / sigma[:-1]
    sd = np.prod(ratio + (alpha[1:] - alpha[:-1] * ratio) * alpha[:-1])
    d = sbml.Density(lambda x, t, key: -x, sde, (2,), eps=EPS)
    x = np.linspace(-2, 2, 6).reshape(3, 2)
    expected = stats.norm(scale=sd).logpdf(x).sum(axis=1)
    np.testing.assert_allclose(
        d._log_prob(jnp.asarray(x), None, None, sampler), expected, rtol=1e-6
    )
    found = d.importance(KEY, 200, lambda x: -jnp.sum(x**2) / (2 * 0.6**2), sampler=sampler)
    assert 0.7 < sd < 0.85 and "HEAVY TAILS" not in str(found)
    truth = np.log(2 * np.pi * 0.6**2)
    assert abs(found.log_z.mean - truth) < 1.5 * found.log_z.ci95


def test_walks_adapt_their_step_to_a_narrow_target() -> None:
    """Without it, the squared radii of these ends are 1.6 times as large as those of the target."""
    x = jax.random.normal(KEY, (500, 16))
    walks = functools.partial(_walk, lambda x: -jnp.sum(x**2) / (2 * 0.5**2), jnp.full(16, 0.6))
    y, u = jax.jit(jax.vmap(walks))((x, jax.random.split(KEY, len(x))))
    np.testing.assert_allclose(u, -jnp.sum(y**2, axis=1) / 0.5, rtol=1e-12)
    assert 1.1 < float(jnp.mean(y**2)) / 0.5**2 < 1.35


def test_a_quarter_of_the_error_bar_may_be_missing() -> None:
    for spread, share, marked in (
        (0.5, 0.2, False),
        (0.5, 0.3, True),
        (0.5, math.nan, True),
        (1e-5, 10.0, False),  # No digit that is printed is wrong.
        (1e-5, 1000.0, True),
    ):
        weights = np.random.default_rng(0).normal(0, spread, 200)
        found = Importance.of(np.zeros((200, 1)), weights, np.zeros(2), weights[:9])
        changed = dataclasses.replace(found, missing=share * found.log_z.ci95)
        assert changed.heavy_tailed == ("HEAVY TAILS" in str(changed)) == marked


def test_a_control_shortens_the_interval_of_a_small_gap(monkeypatch: Any) -> None:
    """DDIM makes N(0, v I) of the model N(0, I), whose log p is known without an ODE."""
    d, sampler = sbml.Density(lambda x, t, key: -x, VP(), (2,), eps=EPS), DDIM(80)

    def logp(self: Any, x: np.ndarray, condition: Any) -> Estimate:
        found = stats.norm.logpdf(x).sum(axis=1)
        interval = mean_interval(found)
        return Estimate(found, {"": found}, "nats", EPS, np.zeros(len(x)), interval, interval)

    monkeypatch.setattr(sbml.Density, "logp", logp)
    found = d.gap(KEY, 256, sampler=sampler)
    at = sampler.logp(d.score, VP(), jnp.zeros(2), eps=EPS).logp
    v, plain = math.exp(-float(at)) / (2 * math.pi), mean_interval(found.values)
    assert abs(found.mean - (v - 1 - math.log(v))) < 1.5 * found.population.ci95
    assert found.population.ci95 < 0.3 * plain.ci95
    np.testing.assert_allclose(found.values, sum(found.terms.values()), atol=1e-9)
    # The control of N(0, .6^2) for N(0, 1) has a heavy tail, and that of a NaN is not known.
    x = 0.6 * np.random.default_rng(0).normal(size=256)
    heavy = stats.norm.logpdf(x, scale=0.6) - stats.norm.logpdf(x)
    for values in (heavy, np.append(found.values[1:], np.nan)):
        given = dataclasses.replace(found, values=values, population=mean_interval(values))
        assert given.with_control(np.expm1(-values)) is given


@pytest.mark.usefixtures("unchecked")
def test_the_gap_is_that_to_the_ode_of_the_same_condition_without_noise() -> None:
    """Two conditions differ by 4 nats, and the noise of a probe has the standard deviation 1."""
    sde, sampler, c = VP(), DDIM(6), 3.0

    def score(x: Array, t: Array, key: Any, c: Array) -> Array:
        a = sde.mean_coef(t)
        return (a * c - x) / (0.25 * a**2 + sde.std(t) ** 2)

    how = {"eps": EPS, "batch_size": 64, "subset": 64, "trace": Trace("gaussian", 1)}
    d = sbml.Density(score, sde, (1,), **how)
    found = d.gap(KEY, 64, c, sampler=sampler)
    exact = Reference(sde, lambda x, t, key: score(x, t, key, c))
    ends = np.array([[0.0], [1.0]])
    times = np.asarray(sampler.times(sde, EPS))
    for s, t in zip(times[:-1], times[1:], strict=True):
        ends, _ = exact.transition(sampler, ends, float(s), float(t))
    (m,), (v,), (a, s, _) = ends[0], (ends[1] - ends[0]) ** 2, exact.at(EPS)
    of_model = 0.25 * a**2 + s**2
    kl = 0.5 * (v / of_model + (m - a * c) ** 2 / of_model - 1 - np.log(v / of_model))
    assert abs(found.mean - kl) < 1.5 * found.population.ci95 + 0.01 < 0.2


@pytest.mark.slow
def test_the_gap_is_the_kl_of_two_gaussians() -> None:
    mean, variances = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.1])
    sampler, sde = DDIM(6), VP()
    d = sbml.Density(gaussian(sde, mean, variances), sde, (2,), eps=EPS)
    found = d.gap(jax.random.key(0), 2000, sampler=sampler)
    exact = Reference(sde, d.score)
    times = np.asarray(sampler.times(sde, EPS))
    moved = np.stack([np.zeros(2), np.ones(2)])
    for s, t in zip(times[:-1], times[1:], strict=True):
        moved, _ = exact.transition(sampler, moved, float(s), float(t))
    m, v = moved[0], (moved[1] - moved[0]) ** 2
    a, s, _ = exact.at(EPS)
    of_model, at = a**2 * np.asarray(variances) + s**2, a * np.asarray(mean)
    kl = 0.5 * np.sum(v / of_model + (m - at) ** 2 / of_model - 1 - np.log(v / of_model))
    assert abs(found.mean - kl) < 1.5 * found.population.ci95 + 0.01 < 0.1
    assert set(found.terms) >= {"prior", "sampler"}
    assert found.prior_error is None  # Both densities begin with the prior.
    noisy = dataclasses.replace(d, trace=Trace("gaussian", 1))
    both = [each.gap(jax.random.key(0), 4, sampler=sampler).values for each in (d, noisy)]
    np.testing.assert_array_equal(*both)  # Both have the exact trace.


def exact_flow(d: int = 2) -> tuple[oracle.Gaussian, sbml.Density]:
    data = oracle.gaussian(RectifiedFlow(), d)
    return data, sbml.Density(data.score, data.sde, (d,), eps=EPS)


def test_the_exact_map_of_a_gaussian_has_its_density() -> None:
    """In any number of steps, at its own samples and at given x."""
    (data, d), start = exact_flow(), jnp.zeros(())
    sampler = Map(data.flow, (1.0, 0.4, 0.0))
    z = jnp.asarray([0.4, -1.2])
    (x, drawn), (again, cost), (points, times) = jax.jit(
        lambda z: (
            sampler.sample_logp(d.score, d.sde, z, eps=EPS),
            sampler(d.score, d.sde, z, KEY, eps=EPS),
            sampler.path(d.score, d.sde, z, KEY, eps=EPS, frames=3),
        )
    )(z)
    np.testing.assert_allclose(x, data.flow(z, start + 1, start), rtol=1e-9)
    np.testing.assert_allclose(drawn.logp, data.logp(x, start), rtol=1e-9)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(times, sampler.grid)
    np.testing.assert_allclose(points[1], data.flow(z, start + 1, start + 0.4), rtol=1e-9)
    assert cost.nfe == 2 and drawn.positive.shape == (2,)
    at = jax.jit(lambda x: sampler.logp(d.score, d.sde, x, eps=EPS).logp)
    np.testing.assert_allclose(at(z), data.logp(z, start), rtol=1e-9)


@pytest.mark.slow
def test_the_weights_and_the_gap_of_the_exact_map() -> None:
    data, d = exact_flow()
    target = lambda x: data.logp(x, jnp.zeros(())) + 3  # noqa: E731
    found = d.importance(KEY, 200, target, sampler=Map(data.flow, (1.0, 0.4, 0.0)))
    assert found.log_z.mean == pytest.approx(3, abs=1e-9) and found.evaluations == 2
    gap = d.gap(KEY, 20, sampler=Map(data.flow, (1.0, EPS)))
    np.testing.assert_allclose(gap.values, 0, atol=1e-3)  # The solver of the ODE has an error.


@pytest.mark.slow
def test_a_distilled_map_has_a_density_that_integrates_to_one() -> None:
    """The map from 1 to 0 in two steps, learned from the quantiles of a mixture of two Gaussians.
    It is not exact, and its density is: its weights give the normaliser of the mixture."""
    sde, parts = RectifiedFlow(), np.array([-1.0, 1.0])

    def logp(x: Array, t: Array) -> Array:
        a, s = 1 - t, jnp.sqrt(0.16 * (1 - t) ** 2 + t**2)
        return jax.nn.logsumexp(jax.scipy.stats.norm.logpdf(x, a * parts, s)) - jnp.log(2)

    side = np.linspace(-4, 4, 401)
    times = np.linspace(0, 1, 21)
    quantiles = stats.norm.cdf(side)
    paths = []
    for t in times:  # A flow in one dimension keeps the quantiles.
        fine, s = np.linspace(-8, 8, 8001), math.hypot(0.4 * (1 - t), t)
        cdf = 0.5 * sum(stats.norm.cdf(fine, (1 - t) * part, s) for part in parts)
        inside = (cdf > 1e-9) & (cdf < 1 - 1e-9)
        paths.append(np.interp(quantiles, cdf[inside], fine[inside]))
    table = jnp.asarray(paths)

    def jump(params: Any, x: Array, t: Array, r: Array) -> Array:
        h = jnp.stack([x[0], t, r])
        for w, b in params[:-1]:
            h = jnp.tanh(w @ h + b)
        w, b = params[-1]
        return x - (t - r) * (w @ h + b)

    sizes, keys = [3, 32, 32, 1], jax.random.split(KEY, 3)
    params = [
        (jax.random.normal(key, (m, n)) / n**0.5, jnp.zeros(m))
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 1500))

    def step(state: Any, key: Array) -> Any:
        params, moments = state
        i, j, k = jax.random.randint(key, (3, 256), 0, jnp.asarray([[401], [21], [21]]))
        later, earlier = jnp.maximum(j, k), jnp.minimum(j, k)

        def loss(params: Any) -> Array:
            ends = jnp.asarray(times)[later], jnp.asarray(times)[earlier]
            found = jax.vmap(jump, (None, 0, 0, 0))(params, table[later, i][:, None], *ends)
            return jnp.mean((found[:, 0] - table[earlier, i]) ** 2)

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        start, jax.random.split(KEY, 1500)
    )
    d = sbml.Density(lambda x, t, key: jax.grad(logp)(x, t), sde, (1,), eps=EPS)
    sampler = Map(functools.partial(jump, params), (1.0, 0.5, EPS))
    x = jnp.linspace(-3.5, 3.5, 701)[:, None]
    p = jnp.exp(d._log_prob(x, None, None, sampler))
    assert float(jnp.nansum(p)) * 0.01 == pytest.approx(1, abs=2e-3)
    found = d.importance(KEY, 2000, lambda x: logp(x, jnp.asarray(EPS)) + 3, sampler=sampler)
    assert abs(found.log_z.mean - 3) < 1.5 * found.log_z.ci95 < 0.03
    gap = d.gap(KEY, 500, sampler=sampler)
    exact = jax.vmap(lambda x: logp(x, jnp.asarray(EPS)))(x[:, 0])
    kl = float(jnp.nansum(p * (jnp.log(p) - exact))) * 0.01
    assert abs(gap.mean - kl) < 1.5 * gap.population.ci95 + 1e-3 < 0.03 < kl


def policy(theta: Array) -> sbml.Density:
    """Data N(theta c, .25) for a condition c."""

    def network(theta: Array, x: Array, t: Array, c: Array) -> Array:
        a, s = VP().mean_coef(t), VP().std(t)
        return (0.25 * a * x + s**2 * theta * c) / (0.25 * a**2 + s**2)

    score = from_prediction(jax.tree_util.Partial(network, theta), "x0", VP())
    return sbml.Density(score, VP(), (1,), eps=EPS, batch_size=200_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_policy_gradient_is_that_of_the_expected_reward(seed: int) -> None:
    """The reward is x, whose expectation is affine in the parameter: it is that without noise."""
    theta, sampler, n = jnp.asarray(0.7), Ancestral(4, "log_snr"), 200_000
    c = jnp.asarray(1.5)
    path, _ = policy(theta).sample_path(jax.random.key(seed), n, c, sampler=sampler)
    reward = path.x[:, -1, 0]

    @jax.jit
    @jax.grad
    def gradient(theta: Array) -> Array:
        logp = policy(theta).path_log_prob(path, c).total
        return jnp.mean((reward - reward.mean()) * logp)

    def mean(theta: Array) -> Array:
        score, x = policy(theta).score, jnp.zeros(1)
        times = sampler.times(VP(), EPS)
        for s, t in zip(times[:-1], times[1:], strict=True):
            x = sampler.transition(conditioned(score, c), VP(), x, s, t).mean
        return x[0]

    assert float(gradient(theta)) == pytest.approx(float(jax.grad(mean)(theta)), rel=0.02)


class Exponential:
    """y = exp(x)."""

    def forward(self, x: Array) -> Array:
        return jnp.exp(x)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return jnp.log(y), -jnp.log(y)


@pytest.mark.slow
def test_changes_of_variables_of_samples_and_paths() -> None:
    plain, moved, key = of_mixture(), of_mixture(transform=Exponential()), jax.random.key(0)
    (x, logp), (y, of_y) = (d.sample_and_log_prob(key, 4, sampler=DDIM(5)) for d in (plain, moved))
    np.testing.assert_allclose(y, jnp.exp(x))
    np.testing.assert_allclose(of_y, logp - x.sum(axis=1))
    path, of_path = plain.sample_path(key, 4, sampler=Ancestral(5))
    expected = of_path.total - path.x[:, -1].sum(axis=1)
    np.testing.assert_allclose(moved.path_log_prob(path).total, expected)


@pytest.mark.usefixtures("unchecked")
def test_paths_along_any_leading_axes() -> None:
    """Given a condition, with a change of variables, and an eps that is not the smallest time."""
    how = {"eps": EPS, "transform": Exponential()}
    d = sbml.Density(lambda x, t, key, c: c - x, VP(), (2,), **how)
    path, drawn = d.sample_path(KEY, 6, 2.0, sampler=Ancestral(3))
    for batch in ((), (2, 3)):
        several = jax.tree.map(lambda a, b=batch: a[: math.prod(b)].reshape(*b, *a.shape[1:]), path)
        found = d.path_log_prob(several, 2.0)
        assert found.steps.shape == (*batch, 3)
        np.testing.assert_allclose(found.total.ravel(), drawn.total[: found.total.size], rtol=1e-12)
        np.testing.assert_allclose(found.transform, -several.x[..., -1, :].sum(axis=-1))


def test_a_number_of_jax_is_a_number_of_a_sampler() -> None:
    assert hash(DDIM(eta=jnp.asarray(0.5))) == hash(DDIM(eta=0.5))


class Quiet(DDIM):
    """DDIM whose last step has no noise."""

    def transition(self, score: Any, sde: SDE, x: Any, s: Any, t: Any) -> Transition:
        mean, std = super().transition(score, sde, x, s, t)
        return Transition(mean, jnp.where(t == EPS, 0.0, std))


EULER, TWO = (ODE(Solver("euler", fixed_steps=n)) for n in (1, 2))
FOLD = lambda x, t, key: jnp.where(t > 0.5, -50 * jnp.tanh(3 * x), -x)  # noqa: E731


def euler(score: Any) -> sbml.Density:
    """For one step x + h g^2 score(x) / 2 + ..., which is long."""
    return sbml.Density(lambda x, t, key: score(x), VP(), (2,), eps=EPS)


@pytest.mark.parametrize("matrix", [[[-50, 0], [0, -60]], [[-1, 0], [0, -50]], [[0, 9], [-9, 0]]])
@pytest.mark.usefixtures("unchecked")
def test_an_affine_step_has_a_density_whatever_it_turns(matrix: Any) -> None:
    """A step of Euler's method in sqrt(t) that changes the sign of both axes, of one, or turns."""
    a, h, (g, f) = np.asarray(matrix, float), 1 - EPS**0.5, (20**0.5, -10)
    jacobian = np.eye(2) - 2 * h * (f * np.eye(2) - 0.5 * g**2 * a)
    with warnings.catch_warnings(action="error"):
        d = euler(lambda x: jnp.asarray(a) @ x)
        x, logp = d.sample_and_log_prob(KEY, 3, sampler=EULER)
    z = np.linalg.solve(jacobian, np.asarray(x).T)
    expected = stats.norm.logpdf(z).sum(axis=0) - np.log(abs(np.linalg.det(jacobian)))
    np.testing.assert_allclose(logp, expected, rtol=1e-9)
    np.testing.assert_allclose(d._log_prob(x, None, None, EULER), expected, rtol=1e-9)


def test_a_step_that_turns_and_is_not_affine_may_fold() -> None:
    """Both axes change their sign, and no determinant does."""
    with pytest.warns(UserWarning, match="step 1 of 1 of ODE may fold space.*at 5 of 5 samples"):
        euler(lambda x: -50 * x - jnp.tanh(x)).sample_and_log_prob(KEY, 5, sampler=EULER)


@pytest.mark.parametrize("make", [lambda: DDIM(4), lambda: ODE(Solver("euler", fixed_steps=4))])
def test_no_affine_chain_folds(make: Any) -> None:
    """80 scores A x + b each, whose steps turn, mirror and stretch."""
    rng, sampler = np.random.default_rng(0), make()
    a, b = rng.normal(size=(80, 3, 3)) * rng.choice([1, 10, 50], (80, 1, 1)), rng.normal(size=3)

    @jax.jit
    @jax.vmap
    def drawn(a: Array) -> Any:
        def one(z: Array) -> Any:
            return sampler.sample_logp(lambda x, t, key: a @ x + b, VP(), z, eps=EPS)[1]

        return jax.vmap(one)(jax.random.normal(KEY, (4, 3)))

    found = drawn(jnp.asarray(a))
    assert (found.signs < 0).any() and not found.positive.all()
    with warnings.catch_warnings(action="error"):
        for i in range(80):
            check_folds(sampler, jax.tree.map(lambda leaf, i=i: leaf[i], found))


def of_steps(signs: Any, positive: Any, forms: Any) -> MapLogProb:
    """The densities of 4 samples of 3 steps, whose second step has these numbers."""
    one = np.ones((4, 3))
    columns = (np.stack([one[:, 0], column, one[:, 0]], 1) for column in (signs, positive, forms))
    signs, positive, forms = columns
    zero = jnp.zeros(4)
    return MapLogProb(zero, zero, jnp.asarray(signs), jnp.asarray(positive > 0), jnp.asarray(forms))


def test_one_negative_determinant_folds_and_only_negative_ones_may_fold() -> None:
    mixed, bent = of_steps([1, -1, 1, 1], [1, 0, 1, 1], [1, 2, 3, 4]), [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="step 2 of 3 .*positive at 3 samples, negative at 1"):
        check_folds(EULER, mixed)
    with pytest.raises(ValueError, match="positive at 3 samples, negative at 0, and 0 or not .*1;"):
        check_folds(EULER, of_steps([1, 0, 1, 1], [1, 0, 1, 1], bent))
    with pytest.warns(UserWarning, match="step 2 of 3 of ODE may fold space.* at 4 of 4 samples"):
        check_folds(EULER, of_steps([-1] * 4, [0] * 4, bent))
    single = jax.tree.map(lambda leaf: leaf[1:2], mixed)  # Alone it shows neither a fold nor none.
    with pytest.warns(UserWarning, match="step 2 of 3 of ODE may fold space.* at 1 of 1 samples"):
        check_folds(EULER, single)
    with warnings.catch_warnings(action="error"):  # It is affine.
        check_folds(EULER, of_steps([-1] * 4, [0] * 4, [-2] * 4))


def path_of(d: sbml.Density) -> Path:
    return d.sample_path(KEY, 2, sampler=Ancestral(3))[0]


def half(d: sbml.Density) -> sbml.Density:
    return dataclasses.replace(d, score=lambda x, t, key: -x.astype(jnp.bfloat16))


def drawn_by(f: Any, grid: tuple[float, ...] = (1.0, 0.0), condition: Any = None) -> Any:
    d = exact_flow()[1]
    if condition is not None:
        d = dataclasses.replace(d, score=lambda x, t, key, c: x)
    return d.sample_and_log_prob(KEY, 2, condition, sampler=Map(f, grid))


class Own(FixedSteps):
    """A sampler with a step of its own."""

    def step(self, score: Any, sde: SDE, x: Any, carry: Any, times: Any, z: Any) -> Any:
        return x, carry


WITHOUT_DENSITY = [
    (lambda d: d.sample_and_log_prob(KEY, 2, sampler=Ancestral(3)), "is not a chain of fixed"),
    (lambda d: d.sample_and_log_prob(KEY, 2, sampler=ODE()), "is not a chain of fixed steps"),
    (
        lambda d: d.sample_and_log_prob(KEY, 2, sampler=DPMSolver(3)),
        "DPMSolver has no density.*remembers",
    ),
    (lambda d: d.sample_path(KEY, 2, sampler=DDIM(3)), "the variance of its steps is 0"),
    (lambda d: d.sample_path(KEY, 2, sampler=Own(3)), "Own has no density.*transition"),
    (
        lambda d: d.sample_path(KEY, 2, sampler=Ancestral(3, corrector=Langevin())),
        "corrector=Langevin.*has no density",
    ),
    (
        lambda d: sbml.Density(d.score, VP(), (101,)).sample_and_log_prob(KEY, 2, sampler=DDIM(3)),
        "101 dimensions with a sampler.*as much as 102.*max_dims=101",
    ),
    (
        lambda d: d.importance(KEY, 2, jnp.sum, sampler=DDIM(3), max_dims=1),
        "2 dimensions with a sampler.*max_dims=2",
    ),
    (lambda d: d.sample_path(KEY, 2, sampler=DDIM(3, eta=1e-30)), "step 1 of 3.*has no noise"),
    (lambda d: d.sample_path(KEY, 2, sampler=Quiet(3, eta=1.0)), "step 3 of 3.*has no noise"),
    (lambda d: dataclasses.replace(d, eps=1e-4).path_log_prob(path_of(d)), "path.times are not"),
    (
        lambda d: dataclasses.replace(d, shape=(3,)).path_log_prob(path_of(d)),
        r"path.x has shape \(2, 4, 2\).*give \(..., 4, 3,\)",
    ),
    (lambda d: half(d).path_log_prob(path_of(d)), "the score computes in bfloat16"),
    (lambda d: half(d).sample_path(KEY, 2, sampler=Ancestral(3)), "computes in bfloat16"),
    (
        lambda d: Ancestral(4).path_log_prob(
            d.score, VP(), Ancestral(3).sample_path(d.score, VP(), jnp.ones(2), KEY, eps=EPS)[0]
        ),
        r"path of Ancestral\(steps=3",
    ),
    (
        lambda d: euler(lambda x: -50 * jnp.tanh(3 * x)).sample_and_log_prob(
            KEY, 20, sampler=EULER
        ),
        "density of 20 samples is not known: step 1 of 1 of ODE folds space",
    ),
    (
        lambda d: sbml.Density(FOLD, VP(), (2,)).sample_and_log_prob(KEY, 20, sampler=TWO),
        "density of 20 samples is not known: step 1 of 2 of ODE folds space",
    ),
    (lambda d: Ancestral(4).window(2, 5), r"window\(2, 5\) of 4 steps: give 0 <= first < last"),
    (lambda d: Ancestral(4).window(2, 2), r"window\(2, 2\) of 4 steps"),
    (lambda d: Ancestral(4).window(0.5, 2), "first is 0.5.*give an integer"),
    (lambda d: DDIM(4).window(0, 2), "the variance of its steps is 0"),
    (lambda d: DPMSolver(4).window(0, 2), "DPMSolver has no density"),
    (
        lambda d: d.sample_and_log_prob(KEY, 2, sampler=Ancestral(4).window(0, 2)),
        "is not a chain of fixed",
    ),
    (
        lambda d: d.sample_path(
            KEY, 2, sampler=dataclasses.replace(Ancestral(4).window(0, 2), corrector=Langevin())
        ),
        "corrector=Langevin.*has no density",
    ),
    (lambda d: drawn_by(jnp.add, (1.0, 1.0)), r"grid=\(1.0, 1.0\): give times that decrease"),
    (lambda d: drawn_by(jnp.add, (1.0,)), r"grid=\(1.0,\): give times that decrease"),
    (lambda d: drawn_by(jnp.add, (0.9, 0.0)), "give times from T=1.0 down to 0 or eps=0.001"),
    (lambda d: drawn_by(jnp.add, (1.0, 0.1)), "give times from T=1.0 down to 0 or eps=0.001"),
    (lambda d: drawn_by(lambda x, t, r: x[:1]), r"Map returned shape \(1,\) for \(2,\)"),
    (
        lambda d: drawn_by(lambda x, t, r: x.astype(jnp.bfloat16).astype(x.dtype)),
        "computed in bfloat16: return.*computed in float32",
    ),
    (lambda d: drawn_by(jnp.add, condition=jnp.ones(())), "Map does not use it: leave it out"),
    (
        lambda d: euler(lambda x: x[::-1] * jnp.inf).sample_and_log_prob(KEY, 2, sampler=EULER),
        "or is not finite.*0 or not finite at 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), WITHOUT_DENSITY)
@pytest.mark.usefixtures("unchecked")
def test_samplers_without_a_density_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(of_mixture())
