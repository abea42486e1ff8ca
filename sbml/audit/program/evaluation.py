"""What an evaluation computes, by ``Density`` and by the drivers of estimators: ``--mode=verify``.

The data are those of ``program.integers``, x_0 ~ N(m, diag(l)), or integers with this density of
k + u. For c times the true score and v = alpha^2 l + sigma^2, the error of the noise prediction is

    z - e = (1 - c sigma^2 / v) z - c sigma alpha (x - m) / v,

so the expectations of the terms of the bound at x follow by integrals over log-SNR, which are the
same for all x. The ODE's density of x_eps is normal as well: x_T = alpha_T m + r (x_eps - alpha m),
r^2 = v_T / v, has the density of the prior.

Euler's method has so large an error that log p without its correction is outside the tolerance.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate, special, stats

from sbml import Density, discrete
from sbml.audit.program import integers, oracle
from sbml.audit.program.integers import LEVELS, MEAN, PIXELS, SHAPE, SIZE, STD
from sbml.audit.program.oracle import coefficients
from sbml.audit.program.table import EPS, Row, jit, row
from sbml.dequantizers import truncated_normal, variational
from sbml.divergence import Trace
from sbml.estimators import base, bound
from sbml.estimators import ode as ode_estimator
from sbml.measurement import Measurement
from sbml.ode import Solver
from sbml.sdes import SDE
from sbml.types import Array, Key

COPIES = 512  # of each of the images of integers
SCALE = 1.3  # of the true score, in the checks of the bound
EULER = Solver("euler", fixed_steps=200, adjoint="reverse")


def _scaled(data: oracle.Gaussian, scale: Array, x: Array, t: Array, key: Key | None = None) -> Any:
    return scale * data.score(x, t)


def _score(sde: SDE, scale: float = 1.0) -> Any:
    """``scale`` times the true score, as a pytree."""
    return jax.tree_util.Partial(_scaled, integers.gaussian(sde), jnp.asarray(scale))


def _ends(sde: SDE, eps: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(alpha, sigma) at eps and at the end of the diffusion, and the prior's standard deviation
    there."""
    first, last, at_t = (coefficients(sde, t) for t in (eps, sde.largest_time, sde.T))
    return np.array(first), np.array(last), sde.prior_std * last[1] / at_t[1]


def _of_ode(sde: SDE, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, each ``(SIZE,)``, of the ODE's density of x_eps / alpha."""
    (a0, s0), (a1, s1), prior = _ends(sde, eps)
    ratio = np.sqrt((a1**2 * STD**2 + s1**2) / (a0**2 * STD**2 + s0**2))
    return MEAN - a1 * MEAN / (ratio * a0), prior / (ratio * a0)


def _of_bound(sde: SDE, x: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Expectations of the terms of the bound at ``x (..., SIZE)``, each ``(...)``."""
    (a0, s0), (a1, s1), prior = _ends(sde, EPS)
    times = np.geomspace(EPS, sde.largest_time, 20_001)
    alpha, sigma = (np.asarray(jax.vmap(f)(jnp.asarray(times))) for f in (sde.mean_coef, sde.std))
    v = alpha[:, None] ** 2 * STD**2 + sigma[:, None] ** 2
    own = 1 - scale * sigma[:, None] ** 2 / v
    of_x = scale * (sigma * alpha)[:, None] / v
    log_snr = 2 * np.log(alpha / sigma)
    square = (x - MEAN) ** 2
    constant, slope = (-0.5 * integrate.trapezoid(f**2, log_snr, axis=0) for f in (own, of_x))
    return {
        "prior": 0.5 * np.sum((a1**2 * x**2 + s1**2) / prior**2 - 1 - 2 * np.log(s1 / prior), -1),
        "diffusion": np.sum(constant + slope * square, -1),
        "reconstruction": 0.5 * np.sum(own[0] ** 2 + of_x[0] ** 2 * square, -1)
        + 0.5 * SIZE * math.log(2 * math.pi * (s0 / a0) ** 2),
    }


def _compared(title: str, name: str, gaps: np.ndarray, truth: float, *more: np.ndarray) -> Row:
    """truth + the mean of ``gaps`` compared with ``truth``. The tolerance is five standard errors,
    with those of the means of other independent draws ``more``, and rounding."""
    error = math.sqrt(sum(float(each.var()) / each.size for each in (gaps, *more)))
    tolerance = 5 * error / max(1.0, abs(truth)) + 1e-9
    return row(title, name, truth + gaps.mean(), truth, tolerance)


def _bits(nats: Any) -> Any:
    return nats / (SIZE * math.log(2))


def density_rows(name: str, sde: SDE) -> Iterator[Row]:
    """log p by ``Density``, of data and of samples."""
    rng = np.random.default_rng(0)
    density = Density(_score(sde), sde, SHAPE, eps=EPS, trace=Trace("exact"), solver=EULER)
    alpha, _ = coefficients(sde, EPS)
    of_ode = stats.norm(*(alpha * each for each in _of_ode(sde, EPS)))
    x = MEAN + STD * rng.normal(size=(8, SIZE))
    found = density.logp(x.reshape(-1, *SHAPE), check=False).values
    yield row("Density.logp by Euler's steps", name, found, of_ode.logpdf(x).sum(1), 1e-2)
    samples, found = density.sample_and_log_prob(jax.random.key(0), len(x))
    truth = of_ode.logpdf(np.asarray(samples).reshape(-1, SIZE)).sum(1)
    yield row("Density.sample_and_log_prob by Euler's steps", name, found, truth, 1e-2)


def bound_rows(name: str, sde: SDE) -> Iterator[Row]:
    """The terms of ``Density.bound``, for ``SCALE`` times the true score."""
    x = MEAN + STD * np.random.default_rng(1).normal(size=(4096, SIZE))
    density = Density(_score(sde, SCALE), sde, SHAPE, eps=EPS, batch_size=len(x))
    estimate = density.bound(x.reshape(-1, *SHAPE), sweeps=2, times_each=16)
    for term, expected in _of_bound(sde, x, SCALE).items():
        gaps = estimate.terms[term] - expected
        yield _compared(f"Density.bound, {term}", name, gaps, float(expected.mean()))


def bits_rows(name: str, sde: SDE) -> Iterator[Row]:
    """``Density.bits_per_dim``: its mean over uniform dequantization, and the noise of its draws.

    With the density N(mean, std^2) of x, the bin's centre c and u on [0, 1),
    -log p = 1/2 ((x - mean) / std)^2 + log std + 1/2 log(2 pi), which 8 nodes integrate exactly."""
    pixels = np.tile(np.asarray(integers.images()), (COPIES, 1, 1, 1))
    density = Density(
        *(_score(sde), sde, SHAPE),
        levels=LEVELS,
        eps=EPS,
        trace=Trace("rademacher", 2),
        batch_size=len(pixels),
        subset=len(pixels),
    )
    found = density.bits_per_dim(pixels)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    x = 2 * (PIXELS[..., None] + (nodes + 1) / 2) / LEVELS - 1
    alpha, _ = coefficients(sde, EPS)
    mean, std = (alpha * each[:, None] for each in _of_ode(sde, EPS))
    nats = -stats.norm(mean, std).logpdf(x) + math.log(LEVELS / 2)
    means = nats @ weights / 2  # (images, SIZE)
    variances = ((nats - means[..., None]) ** 2) @ weights / 2
    gaps = found.values - np.tile(_bits(means.sum(1)), COPIES)
    yield _compared("Density.bits_per_dim", name, gaps, float(_bits(means.sum(1).mean())))
    variance = _bits(_bits(variances.sum(1).mean()))
    # The square of the ratio is a mean over the images of D^2 / E D^2, where D is the difference of
    # two draws. The variance of this number is 2.8.
    ratio = found.this_set.stderr / math.sqrt(variance / len(pixels))
    yield row(
        "Density.bits_per_dim, standard error", name, ratio, 1.0, 5 * math.sqrt(3 / len(pixels)) / 2
    )


def _numbers(
    sde: SDE, estimator: base.Estimator, model: Any, eps: float, params: Any
) -> np.ndarray:
    """Bits/dim ``(COPIES * images,)`` of the images of integers by the driver of ``estimator``,
    with the true score."""
    pixels = np.tile(np.asarray(integers.images()), (COPIES, 1, 1, 1))
    target = base.Target(sde, eps, LEVELS, model)
    run = jit(functools.partial(base.rows, target=target))

    def compute(estimator: base.Estimator, batch: base.Rows, u: Any) -> Any:
        return run(estimator, score=_score(sde), params=params, batch=batch, u=u)

    measured = Measurement(
        estimator=estimator,
        target=target,
        data=pixels,
        ids=np.arange(len(pixels)),
        subset=np.arange(0),
        compute=compute,
        batch_size=len(pixels),
    )
    return measured.total(measured.rows(measured.ids))


def importance_rows(name: str, sde: SDE) -> Iterator[Row]:
    """Integers by the ODE, with four draws of the truncated normal dequantizer in one logarithm.

    The expectation is a mean of other draws, whose numbers are known by the exact density of x."""
    k, model = 4, truncated_normal.Model()
    eps = float(discrete.smallest_time(sde, LEVELS, EPS, model.tau))
    noise = stats.truncnorm(-model.tau, model.tau, 0.5, 1 / (2 * model.tau))
    u = noise.rvs((len(PIXELS), integers.DRAWS, SIZE), np.random.default_rng(0))
    log_p = stats.norm(*_of_ode(sde, eps)).logpdf(_in_bin(u)).sum(-1)
    log_w = log_p - noise.logpdf(u).sum(-1) - SIZE * math.log(LEVELS / 2)
    each = special.logsumexp(log_w.reshape(len(PIXELS), -1, k), axis=-1)
    found = _numbers(sde, ode_estimator.Estimator(Trace("exact"), k), model, eps, {})
    yield _images_row("truncated_normal, ODE with 4 draws", name, found, _bits(math.log(k) - each))


def dequantized_bound_rows(name: str, sde: SDE) -> Iterator[Row]:
    """Integers by the bound, with draws of the variational dequantizer."""
    options: dict[str, Any] = integers.OPTIONS["variational"]
    flow = variational.Model(**options)
    params = integers.parameters(flow)
    drawn, log_q = integers.samples(flow, params, integers.images(), jax.random.key(0))
    x = _in_bin(np.asarray(drawn).reshape(len(PIXELS), -1, SIZE))
    nats = sum(_of_bound(sde, x, 1.0).values()) + np.asarray(log_q) + SIZE * math.log(LEVELS / 2)
    by_ssm = bound.ScoreMatching(32, trace=Trace("rademacher", 2))
    found = _numbers(sde, by_ssm, flow, EPS, params)
    yield _images_row("variational, bound_ssm", name, found, _bits(nats))


def _in_bin(u: np.ndarray) -> np.ndarray:
    """x = 2 (k + u) / L - 1 for ``u (images, n, SIZE)``."""
    return 2 * (PIXELS[:, None] + u) / LEVELS - 1


def _images_row(title: str, name: str, found: np.ndarray, truth: np.ndarray) -> Row:
    """The mean of ``found (COPIES * images,)`` compared with that of ``truth (images, n)``."""
    each, means = found.reshape(COPIES, -1), truth.mean(1)
    return _compared(title, name, each - means, float(means.mean()), truth - means[:, None])


def evaluation_rows(name: str, sde: SDE) -> Iterator[Row]:
    """All of these rows; one SDE is enough."""
    for rows in (density_rows, bound_rows, bits_rows, importance_rows, dequantized_bound_rows):
        yield from rows(name, sde)
