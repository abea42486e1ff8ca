"""Every way to a number of continuous data, of a table and of a coded file: ``--mode=verify``.

The numbers come from the public methods of ``Density``, and the truth from ``audit.oracle``. With
the exact score, an ODE gives log p_eps(x) but for the prior in place of p_T,

    found = log p_eps(x) + log pi(z) - log p_T(z),

where z is the latent, and the bound has the expectation -log p(x) but for the same difference. With
``FAR`` the prior is p_T within the tolerances. Error bars are compared with the errors that they
claim to describe.
"""

import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import special, stats

from sbml import Density, losses
from sbml.audit import oracle
from sbml.audit.table import EPS, Row, row
from sbml.codec import Chain, Codec, bits_back
from sbml.core.scalars import Number
from sbml.core.types import Array, Key
from sbml.data import Options, load
from sbml.density.estimators.base import Target
from sbml.density.estimators.bound import InSteps
from sbml.density.posterior import Importance
from sbml.dequantizers import uniform
from sbml.likelihood.ode import Solver
from sbml.program.evaluation import coding, densities, samples
from sbml.program.report.comparison import paired
from sbml.samplers import DDIM, Ancestral
from sbml.score.divergence import Trace
from sbml.sdes import SDE, SDES, Schedule
from sbml.statistics.intervals import Interval, difference, mean_interval

FAR = SDES["vp"](beta_max=40.0)  # alpha(T) = 4e-5
SOLVER = Solver(rtol=1e-7, atol=1e-7)
EULER = Solver("euler", fixed_steps=200)
PRIOR = 0.8, 0.2  # of the classes
Data = oracle.Gaussian | oracle.Mixture | oracle.Classes
Law = Callable[[float, DDIM | None], tuple[np.ndarray, np.ndarray]]


def density(data: Data, sde: SDE, d: int = 2, eps: Number = EPS) -> Density:
    """The density of ``data`` with its exact score."""
    score = jax.tree_util.Partial(type(data).score, data)
    return Density(score, sde, (d,), eps=eps, batch_size=4096, solver=SOLVER)


def normal(data: oracle.Gaussian, n: int) -> np.ndarray:
    """``n`` examples ``(n, d)`` of independent normal entries."""
    z = np.random.default_rng(0).normal(size=(n, data.mean.size))
    return np.asarray(data.mean) + np.sqrt(data.eigenvalues) * z


def mean_row(name: str, of: str, gaps: np.ndarray, truth: float = 0.0, slack: float = 0.0) -> Row:
    """truth + the mean of ``gaps`` compared with ``truth``; the tolerance is five standard errors
    and ``slack``."""
    error = 5 * float(np.std(gaps)) / math.sqrt(gaps.size) + slack
    return row(name, of, truth + gaps.mean(), truth, error / max(1.0, abs(truth)))


def covers_row(name: str, of: str, found: Sequence[Interval], truth: float) -> Row:
    """The share of the 95% intervals that contain ``truth``, within five standard errors."""
    share = np.mean([abs(each.mean - truth) <= each.ci95 for each in found])
    return row(f"{name}, coverage", of, share, 0.95, 5 * math.sqrt(0.95 * 0.05 / len(found)))


def ratio_row(name: str, of: str, found: float, true: float, tolerance: float) -> Row:
    """A reported error in units of the true one."""
    return row(f"{name}, reported / true", of, found / true, 1.0, tolerance)


# For every SDE.


def sde_rows(name: str, sde: SDE | None = None) -> Iterator[Row]:
    """log p and the bound of a mixture of Gaussians, for ``sde``, or for that of this name."""
    sde = sde or SDES[name]()
    data = oracle.mixture(sde, 2)
    x = data.sample(0, 2048)
    of = density(data, sde)
    found = of.logp(x[:64], check=False)
    yield row("logp, mixture", name, found.values, _of_ode(data, sde, x[:64], found.latent), 5e-5)
    estimate = of.bound(x, sweeps=2, times_each=64, reduce=False)
    gaps = estimate.values + data.log_prob(x)
    yield mean_row("bound, mixture", name, gaps, -data.log_prob(x).mean(), 2e-3)
    alpha, sigma = (sde.stretch * c for c in oracle.coefficients(sde, sde.largest_time))
    square, s2 = np.sum((alpha * x) ** 2, 1), sde.prior_std**2
    prior = 0.5 * (square / s2 + 2 * (sigma**2 / s2 - 1 - math.log(sigma**2 / s2)))
    yield row("bound, its term prior", name, estimate.terms["prior"], prior, 1e-8)


def _of_ode(data: oracle.Mixture, sde: SDE, x: np.ndarray, z: Array) -> np.ndarray:
    """log p_eps(x) + log pi(z) - log p_T(z)."""
    last = data.log_prob(z / sde.stretch, sde.largest_time) - x.shape[1] * math.log(sde.stretch)
    prior = stats.norm.logpdf(z, scale=sde.prior_std).sum(1)
    return data.log_prob(x, EPS) + prior - last


# For one SDE.


@dataclass(frozen=True)
class Exponential:
    """y = exp(2 x)."""

    def forward(self, x: Array) -> Array:
        """y of ``x``."""
        return jnp.exp(2 * x)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """x of ``y``, and log |det dx/dy|."""
        return jnp.log(y) / 2, -jnp.sum(jnp.log(2 * y))


def class_rows(name: str) -> Iterator[Row]:
    """All methods for two classes of data y = exp(2 x): Gaussians, and the tails of Student's t."""
    data, n = oracle.classes(FAR), 256
    of = replace(density(data, FAR), transform=Exponential(), subset=n)
    x = [data.of(c).sample(c, n) for c in range(2)]
    y = [np.exp(2 * each) for each in x]

    def log_p(c: int, y: ArrayLike, t: float = EPS) -> np.ndarray:
        values = np.asarray(y)
        return data.of(c).log_prob(np.log(values) / 2, t) - np.log(2 * values).sum(1)

    for c, label in enumerate(("Gaussians", "heavy tails")):
        given, truth = jnp.asarray(c), log_p(c, y[c])
        one = of.log_prob(jnp.asarray(y[c]), condition=given)
        yield row(f"log_prob, class and transform, {label}", name, one, truth, 1e-4)
        found = of.logp(y[c], given, check=False).values
        yield row(f"logp, class and transform, {label}", name, found, truth, 1e-4)
        drawn, one = of.sample_and_log_prob(jax.random.key(0), n, given)
        title = f"sample_and_log_prob, class and transform, {label}"
        yield row(title, name, one, log_p(c, drawn), 1e-4)
        truth = log_p(c, y[c], 0.0)
        gaps = of.bound(y[c], given, sweeps=2, times_each=32).values + truth
        yield mean_row(f"bound, class and transform, {label}", name, gaps, -truth.mean(), 2e-3)
    posterior = of.classify(y[0], jnp.arange(2), PRIOR).log_probabilities
    joint = np.log(PRIOR) + np.stack([log_p(i, y[0]) for i in range(2)], 1)
    truth = special.log_softmax(joint, axis=1)
    yield row("classify, prior 0.8 and 0.2", name, posterior, truth, 1e-3)


def steps_rows(name: str) -> Iterator[Row]:
    """The bound of DDPM in steps, by its definition. For independent normal entries of variances l,
    the exact score, and v = alpha^2 l + sigma^2,

        E |z - e|^2 = sum (alpha^2 l / v)^2 + (alpha sigma / v)^2 (x - m)^2.

    The term prior is 0."""
    data, steps, eps = oracle.diagonal(FAR), 50, 1e-2
    mean, variances = np.asarray(data.mean), np.asarray(data.eigenvalues)
    x = normal(data, 4096)
    t = eps + (FAR.largest_time - eps) * np.arange(steps + 1) / steps
    alpha, sigma = (np.asarray(f(jnp.asarray(t)))[:, None] for f in (FAR.mean_coef, FAR.std))
    v = alpha**2 * variances + sigma**2
    each = (alpha**2 * variances / v) ** 2, (alpha * sigma / v) ** 2
    snr = ((alpha / sigma) ** 2)[:, 0]
    weights = 0.5 * (snr[:-1] / snr[1:] - 1)
    weights = np.append(0.5, weights)  # of the reconstruction, at eps
    constant, slope = (weights @ e for e in each)
    truth = np.sum(constant + slope * (x - mean) ** 2, axis=1) + 1.5 * math.log(
        2 * math.pi / snr[0]
    )
    for label, reduce in (("with", True), ("without", False)):
        of = density(data, FAR, 3, eps)
        estimate = of.bound(x, sweeps=2, times_each=8, steps=steps, reduce=reduce)
        gaps = estimate.values - truth
        yield mean_row(f"bound in steps, {label} reduction", name, gaps, float(truth.mean()))


def draws_rows(name: str) -> Iterator[Row]:
    """Rows about random draws: log p with one probe, a bound with one time, and their error bars.

    The bound is computed for copies of one example, so that each copy has the same expectation."""
    data, n = oracle.mixture(FAR, 3), 4096
    x = data.sample(0, n)
    of = replace(density(data, FAR, 3), trace=Trace("rademacher", 1), subset=n)
    found = of.logp(x)
    gaps = found.values - data.log_prob(x, EPS)
    yield mean_row("logp, one probe", name, gaps, data.log_prob(x, EPS).mean())
    true = math.sqrt(np.mean(gaps**2) / n)
    yield ratio_row("logp, noise of the probes", name, found.this_set.stderr, true, 0.2)
    copies, calls = np.repeat(x[:1], 16, axis=0), 100
    of = replace(density(data, FAR, 3), batch_size=16)
    found = [
        replace(of, seed=i).bound(copies, sweeps=4, times_each=1, reduce=False)
        for i in range(calls)
    ]
    values = np.stack([each.values for each in found])
    truth = -float(data.log_prob(x[:1])[0])
    error = 5 * values.std(0).max() / math.sqrt(calls) + 2e-3
    yield row("bound, each place", name, values.mean(0), truth, error / max(1.0, abs(truth)))
    claimed = math.sqrt(np.mean([each.this_set.stderr**2 for each in found]))
    true = float(values.mean(1).std(ddof=1))
    # The variances have the relative errors sqrt(2 / 99) and sqrt(2 / 300).
    yield ratio_row("bound, noise of the sweeps", name, claimed, true, 0.4)


def solver_rows(name: str) -> Iterator[Row]:
    """Euler's method, whose log p is far off without its correction, and the error of a coarse
    solver as it is reported."""
    data = oracle.mixture(FAR, 3)
    x = data.sample(0, 64)
    of = replace(density(data, FAR, 3), solver=EULER)
    truth = data.log_prob(x, EPS)
    yield row("logp by Euler's steps", name, of.logp(x, check=False).values, truth, 1e-2)
    drawn, found = of.sample_and_log_prob(jax.random.key(0), 64)
    truth = data.log_prob(drawn, EPS)
    yield row("sample_and_log_prob by Euler's steps", name, found, truth, 1e-2)
    coarse = replace(of, solver=Solver("euler", fixed_steps=12), subset=64).logp(x)
    assert coarse.solver_error is not None
    true = float(np.mean(coarse.values - data.log_prob(x, EPS)))
    yield ratio_row("logp, solver's error", name, coarse.solver_error.mean, true, 0.1)


def loss_rows(name: str) -> Iterator[Row]:
    """The loss of training with the exact score of independent normal entries, in units of its
    expectation: with the weight w,

        E 1/2 w |e|^2 = 1/2 w sum_i a_i,      where a = alpha^2 l / v."""
    data, n, time = oracle.diagonal(FAR), 2**14, 0.1
    variances = np.asarray(data.eigenvalues)
    x, t = jnp.asarray(normal(data, n)), jnp.full(n, time)
    keys = jax.random.split(jax.random.key(1), n)
    found = jax.jit(lambda x: losses.dsm_batch(data.score, FAR, x, t, keys))(x)
    alpha, sigma = oracle.coefficients(FAR, time)
    a = alpha**2 * variances / (alpha**2 * variances + sigma**2)
    w = float(FAR.diffusion(jnp.asarray(time))) ** 2 / sigma**2
    gaps = np.asarray(found) / (0.5 * w * a.sum()) - 1
    yield mean_row("loss of training in units of its expectation", name, gaps, 1.0)


def table_rows(name: str) -> Iterator[Row]:
    """Rows of a file whose columns are exp(g_1) and 1e9 + g_2, in the units of the file.

    The model has the exact score of the whitened rows. The Gaussian of the training rows has the
    mean and the covariance that whiten them."""
    data = oracle.mixture(FAR, 2)
    g = data.sample(0, 600)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.npz"
        np.savez(path, a=np.exp(g[:, 0]), b=1e9 + g[:, 1])
        options = Options(path=path, test_fraction=0.3)
        train, test = (load("table", s, options, log_columns=("a",)) for s in ("train", "test"))
    logs = np.stack([np.log(test.values[:, 0]), test.values[:, 1]], 1)
    inverse = np.linalg.inv(test.whitening.factor)
    shift = test.whitening.mean - [0, 1e9]
    scaled = data.affine(inverse, -inverse @ shift)
    model = replace(density(scaled, FAR), transform=test.whitening)
    found = model.logp(test.values, check=False)
    truth = data.log_prob(logs - [0, 1e9], EPS) - logs[:, 0]
    yield row("table, log p of the rows", name, found.values, truth, 2e-3)
    # As users call them: float32 has only 32 values of the second column.
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), scaled)
        usual = replace(model, score=single.score, solver=Solver(rtol=1e-4, atol=1e-4))
        drawn, of_drawn = usual.sample_and_log_prob(jax.random.key(0), 64)
        of_rows = usual.log_prob(test.values[:64])
    logs_drawn = np.stack([np.log(drawn[:, 0]), drawn[:, 1]], 1) - [0, 1e9]
    truth_drawn = data.log_prob(logs_drawn, EPS) - logs_drawn[:, 0]
    yield row("table, log_prob of the rows", name, of_rows, truth[:64], 1e-2)
    yield row("table, log p of samples", name, of_drawn, truth_drawn, 1e-2)
    baselines = densities.fit(*np.split(train.array.astype(np.float64), [300]))
    covariance = test.whitening.factor @ test.whitening.factor.T
    gaussian = stats.multivariate_normal(test.whitening.mean - [0, 1e9], covariance)
    truth = gaussian.logpdf(logs - [0, 1e9]) - logs[:, 0]
    known = densities.log_p(baselines, test)["Gaussian"]
    yield row("table, log p of the Gaussian", name, known, truth, 1e-4)


class Half(Schedule):
    """x_t = (1 - t) x_0 + t z up to t = 1/2; from there, the stretch S = 2 leads to T."""

    @property
    def largest_time(self) -> float:
        """See ``Kernel``."""
        return 0.5


HALF, LAST = Half(lambda t: 1 - t, lambda t: t), 0.02  # LAST is eps.
DRAWN, NOISY = DDIM(10, "time"), Ancestral(10)


def of_steps(v: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, a and c of DDIM's steps u -> a u + c z of u = x - alpha m, if x_0 has variances v."""
    s = np.linspace(0.5, LAST, DRAWN.steps + 1)[:, None]
    alpha, gain = 1 - s, (1 - s) * v / ((1 - s) ** 2 * v + s**2)
    c = eta * s[1:] / s[:-1] * np.sqrt(s[:-1] ** 2 - (alpha[:-1] / alpha[1:] * s[1:]) ** 2)
    rest = np.sqrt(s[1:] ** 2 - c**2) / s[:-1]
    return alpha, rest + (alpha[1:] - rest * alpha[:-1]) * gain[:-1], c


def few_steps() -> tuple[Density, Law, oracle.Gaussian]:
    """The density of x whose mean is the condition c times m; the mean and the standard deviation
    of x given c by a sampler, or None for the ODE; and x for c = 1.

    A latent z gives x = c m alpha(eps) + a (z - c m) / 2, where a belongs to the sampler."""
    data = oracle.diagonal(HALF, 5)
    mean, v = np.asarray(data.mean), np.asarray(data.eigenvalues)

    def score(x: Array, t: Array, key: Key | None, c: Array) -> Array:
        return replace(data, mean=c * data.mean).score(x, t)

    def law(c: float, sampler: DDIM | None) -> tuple[np.ndarray, np.ndarray]:
        flow = np.sqrt(((1 - LAST) ** 2 * v + LAST**2) / (0.25 * v + 0.25))
        a = of_steps(v, 0)[1].prod(0) if sampler else flow
        return c * mean * (1 - LAST - a / 2), a / 2

    of = replace(density(data, HALF, 15, LAST), score=score, batch_size=128, subset=128)
    return replace(of, solver=Solver(rtol=1e-5, atol=1e-5)), law, data


def sampler_rows(name: str) -> Iterator[Row]:
    """The densities of samplers with few steps for y = exp(2 x), and the gap to the ODE."""
    (of, law, data), n, key = few_steps(), 128, jax.random.key(0)
    of = replace(of, transform=Exponential())
    y, found = of.sample_and_log_prob(key, n, 2.0, sampler=DRAWN)
    truth = stats.norm.logpdf(np.log(y) / 2, *law(2.0, DRAWN)) - np.log(2 * y)
    yield row("sample_and_log_prob, DDIM", name, found, truth.sum(1), 1e-9)
    path, own = of.sample_path(key, 4 * n, 2.0, sampler=NOISY)
    other, x = np.asarray(of.path_log_prob(path, 1.8).total), np.asarray(path.x)
    alpha, a, c = of_steps(np.asarray(data.eigenvalues), 1)
    u = x - 1.8 * alpha * np.asarray(data.mean)
    truth = stats.norm.logpdf(x[:, 0], scale=0.5) - 2 * x[:, -1] - math.log(2)
    truth += stats.norm.logpdf(u[:, 1:], a * u[:, :-1], c).sum(1)
    yield row("path_log_prob", name, other, truth.sum(1), 1e-9)
    yield mean_row("E[P'/P] of paths", name, np.expm1(other - own.total), 1.0)
    runs = [of.gap(jax.random.key(i), n, 2.0, sampler=DRAWN) for i in range(32)]
    (m, s), (of_m, of_s) = law(2.0, DRAWN), law(2.0, None)
    kl = 0.5 * np.sum((s**2 + (m - of_m) ** 2) / of_s**2 - 1 - 2 * np.log(s / of_s))
    yield mean_row("gap", name, np.array([each.mean for each in runs]) - kl, kl)
    yield covers_row("gap", name, [each.population for each in runs], kl)
    noisy = replace(of, trace=Trace("gaussian", 1)).gap(key, n, 2.0, sampler=DRAWN)
    yield row("gap, random probes", name, noisy.values, runs[0].values, 1e-9)
    said = float(samples.from_model(noisy, of.shape).split()[0])
    yield row("gap in bits/dim", name, said, noisy.mean / (15 * math.log(2)), 1e-4)


def weights_rows(name: str) -> Iterator[Row]:
    """Weights of samples x of N(m, s^2) for exp(-1/2 |g|^2), where g = (x - m) / (w s). For w < 1,
    y = exp(2 x) are weighted; for w > 1, walks in y would be slow. With c = sum log(sqrt(2 pi) s),

        log weight = c + 1/2 (w^2 - 1) |g|^2,      E weight^2 = Z^2 / (w sqrt(2 - w^2))^d
    """
    (of, law, _), n, d = few_steps(), 512, 15

    def weights(w: float, sampler: DDIM | None) -> tuple[float, Importance]:
        m, s = law(2.0, sampler)
        f = Exponential() if w < 1 else None

        def log_target(y: Array) -> Array:
            x, log_det = f.inverse_and_log_det(y) if f else (y, 0.0)
            return log_det - 0.5 * jnp.sum(((x - m) / (w * s)) ** 2)

        of_y, key = replace(of, transform=f), jax.random.key(0)
        found = of_y.importance(key, n, log_target, 2.0, sampler=sampler)
        return float(np.log(math.sqrt(2 * math.pi) * s).sum()), found

    second = (0.8 * math.sqrt(2 - 0.8**2)) ** -d
    stderr = math.sqrt((second - 1) / n)
    for label, sampler in (("ODE", None), ("DDIM", DRAWN)):
        title, (c, found) = f"importance, {label}", weights(0.8, sampler)
        log_z, error = c + d * math.log(0.8), found.log_z.stderr
        yield row(f"{title}, log Z", name, found.log_z.mean, log_z, 5 * stderr / abs(log_z))
        yield ratio_row(f"{title}, standard error of log Z", name, error, stderr, 0.4)
        yield ratio_row(f"{title}, sample size", name, found.effective, n / second, 0.4)
        yield row(f"{title}, marked", name, found.heavy_tailed, 0, 0)
    c, found = weights(1.4, DRAWN)
    squares = stats.chi2(d).ppf((np.arange(4096) + 0.5) / 4096)
    above = c + 0.5 * (1.4**2 - 1) * squares - found.log_weights.max()
    missing = -np.expm1(-above.clip(0))
    tolerance = 5 * missing.std() / math.sqrt(4 * of.subset)
    yield row("importance, wide, missing", name, found.missing, missing.mean(), tolerance)
    yield row("importance, wide, marked", name, found.heavy_tailed, 1, 0)


def prior_rows(name: str) -> Iterator[Row]:
    """The error that the prior in place of p_T makes. Given x_0, x_T is x_0 + z; its mean is
    computed as if x at eps were x_0."""
    of, law, data = few_steps()
    mean, v = (1 - LAST) * 3 * data.mean, (1 - LAST) ** 2 * data.eigenvalues + LAST**2
    x = normal(replace(data, mean=mean, eigenvalues=v), 2048)
    found = of.logp(x, 3.0, check=False)
    assert found.prior_error is not None
    error, truth = found.prior_error.mean, stats.norm.logpdf(x, mean, np.sqrt(v)).sum(1)
    yield mean_row("logp, error of the prior", name, truth - found.values - error, error, 0.1)
    x = 0.2 * np.ones((2, 15))
    p = special.softmax([stats.norm.logpdf(x[0], *law(c, None)).sum() for c in (-0.5, 0.5)])
    true = 2 * float(np.linalg.norm(x[0]) * p.prod())
    given = of.classify(x, np.array([-0.5, 0.5])).prior
    yield ratio_row("classify, error of the prior", name, given, true, 0.02)


def interval_rows(name: str) -> Iterator[Row]:
    """Intervals of differences, of independent values and of the same images."""
    rng, ids = np.random.default_rng(0), np.arange(400)
    both = [[mean_interval(rng.normal(0, s, n)) for s, n in ((1, 30), (3, 10))] for _ in ids]
    found = [difference(*each) for each in both]
    yield covers_row("difference of two means", name, found, 0.0)
    common, noise, order = rng.normal(size=400), rng.normal(0, 0.1, 400), rng.permutation(400)
    gap = paired((ids, common + noise), (order, common[order]))
    assert gap is not None
    yield ratio_row("paired difference, standard error", name, gap.stderr, 0.1 / 20, 0.2)


def codec_rows(name: str) -> Iterator[Row]:
    """The mean number of bits of an image in a file, and its bound in the same steps.

    A formula of the bound may lack a term, but a file that lacked these bits could not be
    decoded."""
    if not bits_back.installed():
        return
    sde, (levels, lanes, rounds) = SDES["ve"](), (16, 128, 4)
    data = oracle.diagonal(sde, 4)
    x = normal(data, lanes * rounds)
    pixels = np.clip((x + 1) * levels / 2, 0, levels - 1).astype(np.uint8)
    chain = Chain(sde, 1e-2, 24, (0.9, 0.5, 0.1, 0.01))
    codec = Codec(data.score, chain, (12,), levels, "uniform", lanes)
    coders, nets = [bits_back.coder(codec.start(lane)) for lane in range(lanes)], []
    for number, batch in enumerate(np.split(pixels, rounds)):
        before = np.array([coder.num_valid_bits() for coder in coders])
        codec.encode(bits_back.Lanes(coders, np.arange(lanes)), batch, number)
        nets.append(np.array([coder.num_valid_bits() for coder in coders]) - before)
    target = Target(sde, chain.eps, levels, uniform.Model())
    of = replace(density(data, sde, 12, chain.eps), levels=levels)
    run = of.measurement(InSteps(48, steps=chain.as_steps), target, pixels)
    found = replace(run, sweeps=2).estimate()
    bound = 12 * found.values
    gaps = np.concatenate(nets) - bound
    yield mean_row("bits of a coded image, and its bound", name, gaps, bound.mean())
    # A file has whole words of 32 bits for each lane.
    words = sum(len(coder.get_compressed()) for coder in coders)
    parts, total = coding.lengths(codec, words, 4 * words, pixels.size), np.sum(nets)
    slack = 32 * lanes / total
    yield row("bits of a file", name, parts["net"] * pixels.size, total, slack)


ONCE: tuple[Callable[[str], Iterator[Row]], ...] = (
    class_rows,
    steps_rows,
    draws_rows,
    solver_rows,
    loss_rows,
    table_rows,
    sampler_rows,
    weights_rows,
    prior_rows,
    interval_rows,
    codec_rows,
)
